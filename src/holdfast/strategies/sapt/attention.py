"""The attention that mixes all tasks' adapters by the input, and its reflection on rows of earlier tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast.config import Options
from holdfast.models import is_encoder_decoder
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.prompts.pool import query
from holdfast.strategies.prompts.soft import question
from holdfast.tasks.encode import collate_prompts
from holdfast.tasks.memory import Memory, MemoryOptions, RowsOptions
from holdfast.tasks.task import Example

_ROWS = 32  # rows whose embeddings are looked up at once; no effect on anything


class AttentionOptions(Options):
    """The network of the query, and what it reflects on."""

    bottleneck: int = Field(100, ge=1, description="width of the network that makes the query")
    temperature: float = Field(1.0, gt=0, description="T of the attention's softmax")
    reflection: float = Field(1.0, ge=0, description="lambda, weight of the KL on rows of earlier tasks")
    memory: RowsOptions = Field(
        default_factory=MemoryOptions, description="rows of earlier tasks, kept or written by the model"
    )

    @model_validator(mode="after")
    def _only_what_applies(self) -> AttentionOptions:
        if not self.reflection:
            self.refuse_ignored(("memory",), "with `reflection: 0`")
        return self

    @model_validator(mode="after")
    def _rows_stay(self) -> AttentionOptions:
        if self.memory.sampling != "reservoir":
            return self
        raise ValueError(
            "`sampling: reservoir` drops rows that reflection has weights for; take `balanced` or `generated`"
        )


class SharedAttention(nn.Module):
    """softmax(q k_i / (T sqrt(D))) over all tasks i; q = LayerNorm(W2 silu(W1 x)), x the mean embedding.

    Parameters
    ----------
    width : int
        D, of an input embedding.
    old_ND : Tensor
        Earlier tasks' keys, which stay; a new one is trained behind them, with the query's network.
    """

    old: Tensor

    def __init__(self, width: int, options: AttentionOptions, old_ND: Tensor, seed: int) -> None:
        super().__init__()
        self.scale = options.temperature * width**0.5
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = nn.Sequential(
                nn.Linear(width, options.bottleneck, bias=False),
                nn.SiLU(),
                nn.Linear(options.bottleneck, width, bias=False),
                nn.LayerNorm(width),
            )
        draw = torch.Generator().manual_seed(seed + len(old_ND))
        self.key = nn.Parameter(torch.randn(width, generator=draw))
        self.register_buffer("old", old_ND.clone())

    @property
    def keys(self) -> Tensor:
        """(N, D): those of all tasks, the newest last."""
        return torch.cat([self.old, self.key[None]])

    def forward(self, features_BD: Tensor) -> Tensor:
        """The tasks' shares (B, N), float32."""
        return (self.network(features_BD) @ self.keys.T / self.scale).softmax(-1)


def reflection(remembered_MN: Tensor, shares_MN: Tensor) -> Tensor:
    """Mean over M rows of KL(remembered || now); where nothing was remembered of a task, it was 0."""
    terms = torch.special.xlogy(remembered_MN, remembered_MN) - torch.special.xlogy(remembered_MN, shares_MN)
    return terms.sum(1).mean()


class Attended:
    """What both kinds of SAPT have beside their adapters: the attention, and the rows that it remembers.

    Attributes
    ----------
    shares : Tensor
        (B, N) of the micro-batch in training.
    """

    shares: Tensor

    def __init__(self, options: AttentionOptions) -> None:
        self.options = options
        self.memory = Memory(options.memory)
        self.remembered: list[Tensor] = []  # of each row of the memory: its shares when it was learned
        self.network: dict[str, Tensor] = {}
        self.keys = torch.empty(0, 0)

    def fresh(self, model: Any, seed: int) -> SharedAttention:
        """The attention for a new task: a new key behind the old ones."""
        width = model.get_input_embeddings().weight.shape[1]
        made = SharedAttention(width, self.options, self.keys.view(-1, width), seed)
        if self.network:
            made.network.load_state_dict(self.network)
        return made

    def begin(self, context: Context, stage: Stage) -> SharedAttention:
        """The module to train; what it must still attend to is looked up."""
        device = next(context.model.parameters()).device
        self.attention = self.fresh(context.model, context.seed).to(device)
        self._features = self._looked_up(context, self.memory.examples)
        width = len(self.keys) + 1
        padded = [F.pad(row, (0, width - len(row))) for row in self.remembered]
        self._targets = torch.stack(padded).to(device) if padded else torch.empty(0, width)
        return self.attention

    def _looked_up(self, context: Context, examples: Sequence[Example]) -> Tensor:
        """Mean embeddings of the questions, (M, D)."""
        model, parts = context.model, []
        device = next(model.parameters()).device
        rows = context.encoder.many(examples)
        for start in range(0, len(rows), _ROWS):
            batch = collate_prompts(
                rows[start : start + _ROWS],
                context.tokenizer.pad_token_id,
                encoder_decoder=is_encoder_decoder(model),
            )
            mask_BT = batch["attention_mask"].bool().to(device)
            parts.append(query(model, batch["input_ids"].to(device), mask_BT, "embeddings"))
        return torch.cat(parts) if parts else torch.empty(0, 0)

    def watch(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Attend, where the labels still tell the question from the answer."""
        labels = None if is_encoder_decoder(model) else batch["labels"]
        asked_BT = question(batch["attention_mask"], labels)
        self.shares = self.attention(query(model, batch["input_ids"], asked_BT, "embeddings"))

    def loss(self, loss: Tensor) -> Tensor:
        """With lambda times the KL on the rows of earlier tasks, all of them at once."""
        if not len(self._features) or not self.options.reflection:
            return loss
        return loss + self.options.reflection * reflection(self._targets, self.attention(self._features))

    def learned(self) -> None:
        """Keep what the stage has trained."""
        network = self.attention.network.state_dict().items()
        self.network = {name: tensor.detach().cpu().clone() for name, tensor in network}
        self.keys = self.attention.keys.detach().cpu().clone()

    def remember(self, context: Context, stage: Stage) -> None:
        """Take rows of the stage's tasks into the memory, with how the attention stands on them."""
        before = len(self.memory)
        for task in stage.tasks:
            self.memory.add(task, context.seed, context.write)
        new = self.memory.examples[before:]
        if new:
            with torch.no_grad():
                self.remembered += list(self.attention(self._looked_up(context, new)).cpu())

    def answering(self, model: Any) -> Any:
        """(ids, question's tokens) -> shares, by the attention as it was kept."""
        made = SharedAttention(self.keys.shape[1], self.options, self.keys[:-1], 0)
        made.network.load_state_dict(self.network)
        with torch.no_grad():
            made.key.copy_(self.keys[-1])
        made.to(next(model.parameters()).device)

        @torch.no_grad()
        def shares(ids_BT: Tensor, asked_BT: Tensor) -> Tensor:
            found: Tensor = made(query(model, ids_BT, asked_BT, "embeddings"))
            return found

        return shares

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Network, keys, and the memory with its shares."""
        if not self.network:
            return {}, {}
        tensors = {f"network:{name}": tensor for name, tensor in self.network.items()} | {"keys": self.keys}
        remembered = [row.tolist() for row in self.remembered]
        return tensors, {"memory": self.memory.state_dict(), "remembered": remembered}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take them back."""
        if not tensors:
            return
        self.network = {n.removeprefix("network:"): t for n, t in tensors.items() if n.startswith("network:")}
        self.keys = tensors["keys"]
        self.memory.load_state_dict(values["memory"])
        self.remembered = [torch.tensor(row) for row in values["remembered"]]
