"""One LoRA a task, apart from all others, and a router by features of the frozen model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.config import Options
from holdfast.errors import ConfigError
from holdfast.hold import Handle
from holdfast.hold.attach import together
from holdfast.hold.cost import Estimate
from holdfast.importance.seeding import sample
from holdfast.models import is_encoder_decoder
from holdfast.models.adapters import check_growable, rank_of
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.lora.grown import Grown, grown_cost
from holdfast.strategies.lora.ranks import Weighted, select
from holdfast.strategies.prompts.pool import check_feature, query
from holdfast.strategies.protocol import Strategy, preset, register
from holdfast.tasks.encode import collate_prompts
from holdfast.tasks.task import Example, TaskStream

_ROWS = 32  # rows whose features are taken at once; no effect on what is answered


class LoraRoutedOptions(Options):
    """How an input finds its LoRA."""

    name: Literal["lora-routed"] = "lora-routed"
    router: Literal["nearest-mean", "oracle"] = Field(
        "nearest-mean", description="by the frozen model's features; oracle: the task is told"
    )
    samples: int = Field(256, ge=1, description="rows of a task whose features make its mean")
    probes: int = Field(64, ge=1, description="further rows, whose features are kept to measure the router")

    @model_validator(mode="after")
    def _goes_together(self) -> LoraRoutedOptions:
        if self.router == "oracle":
            self.refuse_ignored(("samples", "probes"), "where the task is told (`router: oracle`)")
        return self


@torch.no_grad()
def features(model: Any, ids_BT: Tensor, question_BT: Tensor) -> Tensor:
    """Mean last hidden state of each question's tokens in the model without its adapter: (B, K) float32."""
    off = select(model, torch.zeros(rank_of(model), device=ids_BT.device))
    try:
        return query(model.get_base_model(), ids_BT, question_BT, "hidden")
    finally:
        off.remove()


def nearest(features_BK: Tensor, means_NK: Tensor) -> Tensor:
    """Index (B,) of the mean of least Euclidean distance."""
    return torch.cdist(features_BK, means_NK, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)


@register
class LoraRouted(Strategy):
    """Task t trains a LoRA of its own on the frozen model, and a row is answered by one of them alone.

    Nothing is shared, so nothing is forgotten but by the router: which LoRA answers is the nearest mean
    (Euclidean) of the frozen model's features, the mean last hidden state over the question's tokens; of each
    task the mean of `samples` rows is kept. With `router: oracle` (`lora-oracle`) the task is told instead,
    and what is left is the upper bound of isolation: a LoRA by itself for each task. A task that isn't
    learned yet gets the nearest of the others, under the oracle the frozen model.

    All LoRAs stand in one adapter, as under `inc-lora`, but ranks of other tasks are silenced in training
    and for each row of an answer; the frozen ones are never changed. Not written from one paper: routing by
    means of frozen features is common (such as Wang et al. 2024's and SLM's task retrieval).

    Features of `probes` other training rows of each task are kept as well, to measure the router after every
    task on all of them: ``router`` in ``adapters.json``. Extra state: r ranks, a mean and the probes a task.
    """

    name = "lora-routed"
    paper = "the usual upper bound of isolation"
    summary = "one LoRA a task, found by the nearest mean of the frozen model's features"
    Options = LoraRoutedOptions
    state = "per task"
    inference = "per task"
    begins_as_before = False  # earlier LoRAs are silent

    def __init__(self, options: LoraRoutedOptions) -> None:
        super().__init__(options)
        self.needs_task_identity = options.router == "oracle"  # type: ignore[misc]
        self.tasks: list[str] = []
        self.means: list[Tensor] = []  # of each task, (K,)
        self.probes: list[Tensor] = []  # of each task, (rows, K)

    def check(self, model: nn.Module) -> None:
        """See that the model has a plain LoRA adapter, and that it gives features."""
        check_growable(model, self.options.name)
        check_feature(model.get_base_model(), "hidden")  # type: ignore[operator]

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """Of the ranks that later tasks add."""
        return Estimate([grown_cost(model, len(stream) - 1)])

    def begin(self, context: Context, stage: Stage) -> None:
        """Append the task's LoRA."""
        self.grown = Grown.for_task(context.model, stage.index, context.seed)

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Sequence[Handle]:
        """Freeze the earlier ones, and silence them."""
        own = torch.arange(self.grown.rank) >= self.grown.frozen
        device = next(model.parameters()).device
        with together() as handles:
            handles.append(self.grown.attach(model, optimizer))
            handles.append(select(model, own.float().to(device)))
        return handles

    def end(self, context: Context, stage: Stage) -> None:
        """Keep the task's mean, and measure the router."""
        self.tasks.append(stage.name)
        said = self.grown.summary()
        if self.options.router == "nearest-mean":
            found_BK = self._features(context, super().examples(context, stage))
            kept = min(self.options.probes, len(found_BK) // 2)
            self.probes.append(found_BK[:kept])
            self.means.append(found_BK[kept:].mean(0))
            said = said.model_copy(update={"router": self.accuracy()})
        said.write(context.folder / "adapters.json")

    def _features(self, context: Context, examples: Sequence[Example]) -> Tensor:
        """Of probes and samples, in an order without meaning."""
        chosen = sample(examples, self.options.probes + self.options.samples, context.seed)
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(context.seed)).tolist()
        rows = context.encoder.many([chosen[i] for i in order])
        device, parts = next(context.model.parameters()).device, []
        for start in range(0, len(rows), _ROWS):
            batch = collate_prompts(
                rows[start : start + _ROWS],
                context.tokenizer.pad_token_id,
                encoder_decoder=is_encoder_decoder(context.model),
            )
            ids_BT, mask_BT = batch["input_ids"].to(device), batch["attention_mask"].to(device)
            parts.append(features(context.model, ids_BT, mask_BT.bool()))
        return torch.cat(parts).cpu()

    def accuracy(self) -> dict[str, float]:
        """Task to the share of its probes that are sent to its own LoRA; a task of one row has no probe."""
        means_NK = torch.stack(self.means)
        return {
            task: float((nearest(probes, means_NK) == i).float().mean())
            for i, (task, probes) in enumerate(zip(self.tasks, self.probes, strict=True))
            if len(probes)
        }

    def route(self, model: Any, task: str | None) -> Any:
        """The model with the LoRA that each row finds, or that of the task."""
        if not self.tasks:
            return model
        blocks_NR = torch.eye(len(self.tasks)).repeat_interleave(rank_of(model) // len(self.tasks), 1)
        if self.options.router == "oracle":
            told = blocks_NR[self.tasks.index(task)] if task in self.tasks else torch.zeros(rank_of(model))
            return Weighted(model, lambda ids_BT, _: select(model, told.to(ids_BT.device)))
        means_NK = torch.stack(self.means)

        def attach(ids_BT: Tensor, question_BT: Tensor) -> Handle:
            found_BK = features(model, ids_BT, question_BT)
            return select(model, blocks_NR.to(found_BK)[nearest(found_BK, means_NK.to(found_BK))])

        return Weighted(model, attach)

    def export(self, context: Context, folder: Path) -> None:
        """Refuse: no plain model chooses among its ranks."""
        raise ConfigError(
            f"export: strategy '{self.options.name}' answers each row with one task's ranks of the adapter, "
            "which no plain Hugging Face folder can say. Go on with the learner itself "
            "(holdfast.Learner.load)."
        )

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Means, probes, and the order of the tasks."""
        tensors = {f"mean:{i}": mean for i, mean in enumerate(self.means)}
        tensors |= {f"probes:{i}": probes for i, probes in enumerate(self.probes)}
        return tensors, {"tasks": list(self.tasks)}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take them back."""
        self.tasks = list(values["tasks"])
        count = sum(name.startswith("mean:") for name in tensors)
        self.means = [tensors[f"mean:{i}"] for i in range(count)]
        self.probes = [tensors[f"probes:{i}"] for i in range(count)]


class LoraOracleOptions(LoraRoutedOptions):
    """The same, and the task is told."""

    name: Literal["lora-oracle"] = "lora-oracle"  # type: ignore[assignment]
    router: Literal["oracle"] = "oracle"


preset(
    "lora-routed",
    name="lora-oracle",
    Options=LoraOracleOptions,
    summary="one LoRA a task, and the task is told: the upper bound of isolation",
    needs_task_identity=True,
)
