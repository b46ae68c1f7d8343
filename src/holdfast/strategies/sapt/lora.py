"""SAPT with LoRA: a LoRA a task, mixed by shared attention (Zhao et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.errors import ConfigError
from holdfast.hold import Handle
from holdfast.hold.attach import together
from holdfast.hold.cost import Cost, Estimate, trained_numbers
from holdfast.models.adapters import check_growable, rank_of
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.lora.grown import Grown, grown_cost
from holdfast.strategies.lora.ranks import Weighted, weigh
from holdfast.strategies.protocol import Strategy, register
from holdfast.strategies.sapt.attention import Attended, AttentionOptions
from holdfast.tasks.task import TaskStream

SUBMODULE = "shared_attention"  # what is trained beside LoRA, as the model's own submodule


class SaptLoraOptions(AttentionOptions):
    """The attention."""

    name: Literal["sapt-lora"] = "sapt-lora"


@register
class SaptLora(Strategy):
    """W x + alpha/r sum_i a_i B_i A_i x, a = softmax(q k_i): all tasks' LoRAs, by a row's input.

    Task t trains B_t A_t, its key k_t and the network of the query q; earlier LoRAs and keys are frozen
    (shared attentive learning and selection). So that the network still sends rows of earlier tasks where
    they belong, loss + lambda KL(a when the task was learned || a now) on some of their rows (attentive
    reflection). The task is never told. The authors' scripts (gen_script_*.py) have a network of two layers,
    100 wide, T 1, lambda 1 and 2 for Llama-2, 0.5 and 0.1 for T5 (SuperNI, long sequences), LoRA of rank 4
    (8 on T5's long sequences), alpha 32, on queries and values, 3e-4 (Llama-2: 5e-5).

    Their code (src/t5_prompt.py) differs from this in the query: the largest value of each embedding
    dimension over the positions, where ours is the mean; SiLU behind both layers, ours between them; keys
    drawn from U(-1, 1), ours from N(0, 1). It remembers one mean a for all rows of a task, ours each row's.

    It lets a generator of each task write those rows, and takes a batch of each task at each step; here they
    are kept (2 %), or with `memory: generated` written by the model. They are used for the KL alone, all at
    each step; a row's own weights are remembered, with 0 for later tasks. Extra state: r ranks, a key and the
    rows a task.
    """

    name = "sapt-lora"
    paper = "Zhao et al. 2024, arXiv 2401.08295"
    summary = "one LoRA a task, all mixed by attention from the input; the attention reflects on old rows"
    Options = SaptLoraOptions
    reads = ("input_ids", "attention_mask", "labels")
    looks = False
    around_blocks = True
    rehearsal_free = False
    state = "per task"
    inference = "per task"
    begins_as_before = False  # the attention has one more key

    def __init__(self, options: SaptLoraOptions) -> None:
        super().__init__(options)
        self.attended = Attended(options)

    def check(self, model: nn.Module) -> None:
        """See that the model has a plain LoRA adapter."""
        check_growable(model, self.name)

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """Of the ranks that later tasks add, and the attention."""
        attention = trained_numbers(self.attended.fresh(model, 0))
        costs = [grown_cost(model, len(stream) - 1), Cost("shared attention", 16 * attention)]
        return Estimate([c for c in costs if c.size], trained_numbers(model) + attention)

    def begin(self, context: Context, stage: Stage) -> None:
        """Append the task's LoRA, and give the attention its key."""
        self.grown = Grown.for_task(context.model, stage.index, context.seed)
        context.model.add_module(SUBMODULE, self.attended.begin(context, stage))

    def _mix(self, model: Any, shares_of: Any) -> Handle:
        def by(_: int, x_BTD: Tensor, output_BTR: Tensor) -> Tensor:
            shares_BN = shares_of()
            ranks = output_BTR.shape[-1] // shares_BN.shape[-1]
            return output_BTR * shares_BN.repeat_interleave(ranks, -1)[:, None].to(output_BTR)

        return weigh(model, by)

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Sequence[Handle]:
        """Freeze the earlier LoRAs, and mix."""
        with together() as handles:
            handles.append(self.grown.attach(model, optimizer))
            handles.append(self._mix(model, lambda: self.attended.shares))
        return handles

    def watch(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Attend."""
        self.attended.watch(model, batch)

    def loss(self, model: nn.Module, batch: Mapping[str, Any], outputs: Any, loss: Tensor) -> Tensor:
        """With reflection."""
        return self.attended.loss(loss)

    def stage_state_dict(self) -> Mapping[str, Tensor]:
        """The attention: a checkpoint of a PEFT model holds its adapter alone."""
        return {name: value.detach() for name, value in self.attended.attention.state_dict().items()}

    def load_stage_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take it back."""
        self.attended.attention.load_state_dict(dict(tensors))

    def end(self, context: Context, stage: Stage) -> None:
        """Keep the attention, and rows to reflect on."""
        self.attended.learned()
        delattr(context.model, SUBMODULE)
        self.grown.summary().write(context.folder / "adapters.json")
        self.attended.remember(context, stage)

    def route(self, model: Any, task: str | None) -> Any:
        """The model with its LoRAs mixed for each row; `task` is never given."""
        if not self.attended.network:
            return model
        shares_of = self.attended.answering(model)

        def attach(ids_BT: Tensor, asked_BT: Tensor) -> Handle:
            shares_BN = shares_of(ids_BT, asked_BT)
            return self._mix(model, lambda: shares_BN)

        return Weighted(model, attach)

    def export(self, context: Context, folder: Path) -> None:
        """Refuse: no plain adapter attends."""
        raise ConfigError(
            f"export: strategy 'sapt-lora' weights the {rank_of(context.model)} ranks of the adapter by the "
            "input, which no plain Hugging Face folder can say. Go on with the learner itself "
            "(holdfast.Learner.load)."
        )

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The attention, and what it reflects on."""
        return self.attended.state_dict()

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take them back."""
        self.attended.load_state_dict(tensors, values)
