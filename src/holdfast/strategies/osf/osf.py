"""OSF: the main singular directions of each linear map stay, the others are trained (Nayak et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.config import Options
from holdfast.hold import Handle
from holdfast.hold.cost import Estimate
from holdfast.importance.seeding import sample
from holdfast.names import block_path
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.osf.decomposed import (
    Decomposed,
    check_decomposable,
    decomposed_estimate,
    trained_maps,
)
from holdfast.strategies.osf.similarity import importance_of_blocks, share_of
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.task import TaskStream


class OsfOptions(Options):
    """How much of each linear map is preserved, and how strictly."""

    name: Literal["osf"] = "osf"
    schedule: Literal["constant", "growing", "layers"] = Field(
        "constant",
        description="preserved share: `rank` at every task; or (t - 1) / n at task t of n; or mrr + "
        "I (trr - mrr) of each layer, I how much it leaves its input as it is",
    )
    rank: float | None = Field(None, gt=0, lt=1, description="constant only: preserved share (default 0.5)")
    mrr: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="layers only: the least share, of a layer without importance (default 0.1)",
    )
    trr: float | None = Field(
        None, gt=0, lt=1, description="layers only: the share of a layer of mean importance (default 0.8)"
    )
    samples: int | None = Field(
        None,
        ge=1,
        description="layers only: rows of the task that its importance is measured on (default 128)",
    )
    on: Literal["gradient", "update"] = Field(
        "gradient", description="what is projected: the factors' gradients (PEFT), or their every step too"
    )

    @model_validator(mode="after")
    def _only_what_applies(self) -> OsfOptions:
        if self.rank is not None and self.schedule != "constant":
            raise ValueError(f"`rank` applies to `schedule: constant` only, not to `{self.schedule}`")
        for name in ("mrr", "trr", "samples"):
            if getattr(self, name) is not None and self.schedule != "layers":
                raise ValueError(f"`{name}` applies to `schedule: layers` only, not to `{self.schedule}`")
        if self.least >= self.target:
            raise ValueError(
                f"`mrr` ({self.least}) is the least share, and must be below `trr` ({self.target})"
            )
        return self

    @property
    def least(self) -> float:
        """mrr."""
        return 0.1 if self.mrr is None else self.mrr

    @property
    def target(self) -> float:
        """trr."""
        return 0.8 if self.trr is None else self.trr


@register
class Osf(Strategy):
    """Of W = U_h S_h V_h + U_l S_l V_l, an SVD made before each task, only the lower part l is trained.

    The gradients of U_l and V_l are projected off U_h and V_h: PEFT's OSF, on all linear maps in blocks,
    merged after the task (to 1e-7 of W in float32; of 16-bit weights the change is made in float32). What
    else is trained (norms, biases, embeddings) is not held, as in the authors' code. `layers` is the paper's
    share mrr + I (trr - mrr), mrr 0.1, trr 0.8. I is the cosine of a layer's input and output there, which of
    a map that is not square is not defined: here it is that of the transformer block, for all of its maps,
    measured on rows of the coming task before it is trained. `growing` is the authors' script for 15 tasks
    (AdamW 1e-5, batch 8, 1 epoch): nothing is preserved in the first task. The default is PEFT's, half, from
    the first task on.

    Under AdamW a projected gradient makes no projected step: part of the change lies in U_h and V_h after
    all. `on: update` applies the same projection to U_l and V_l after each step, exact to the precision of
    the SVD; it kept no more (figures in docs/log.md). Weight decay shrinks the lower part only. Extra state:
    none. Cost: SVDs before each task; during it a second copy of the factors.
    """

    name = "osf"
    paper = "Nayak et al. 2025, arXiv 2504.07097"
    summary = "the main singular directions of each linear map stay, the others are trained"
    Options = OsfOptions

    def __init__(self, options: OsfOptions) -> None:
        super().__init__(options)
        self.decomposed: Decomposed | None = None
        self.open_ended = options.schedule != "growing"

    def check(self, model: nn.Module) -> None:
        """See that whole weights are trained, and that PEFT can decompose them."""
        check_decomposable(model)

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """The lower factors, which are trained in place of the maps, and what they started from."""
        return decomposed_estimate(model, [self._share(i, len(stream)) for i in range(len(stream))])

    def _share(self, known: int, tasks: int | None) -> float:
        """What is preserved behind so many of the stream's tasks."""
        if self.options.schedule == "layers":
            return self.options.target  # their mean
        if self.options.schedule == "constant":
            return self.options.rank or 0.5
        assert tasks is not None, "not open-ended"
        return known / tasks

    def begin(self, context: Context, stage: Stage) -> None:
        """Decompose the weights that this stage starts from."""
        share = self._share(stage.index, stage.total)
        by_map = self._by_layer(context, stage) if self.options.schedule == "layers" else lambda _: share
        self.decomposed = Decomposed(context.model, by_map) if share else None

    def _by_layer(self, context: Context, stage: Stage) -> Callable[[str], float]:
        rows = context.encoder.many([row for task in stage.tasks for row in task.train])
        rows = sample(rows, self.options.samples or 128, context.seed)
        blocks = dict.fromkeys(map(block_path, trained_maps(context.model)))
        importance = importance_of_blocks(context.model, blocks, rows, context.tokenizer.pad_token_id)
        return share_of(importance, self.options.least, self.options.target)

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Sequence[Handle]:
        """With `on: update`, project the factors after each step."""
        if self.decomposed is None or self.options.on == "gradient":
            return ()
        return [self.decomposed.attach(model, optimizer)]

    def stage_state_dict(self) -> Mapping[str, Tensor]:
        """What is fixed while the stage is trained."""
        return {} if self.decomposed is None else self.decomposed.buffers()

    def load_stage_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take it back."""
        for name, buffer in self.stage_state_dict().items():
            buffer.copy_(tensors[name])

    def end(self, context: Context, stage: Stage) -> None:
        """Merge, which leaves a plain model."""
        if self.decomposed is not None:
            self.decomposed.merge()
        self.decomposed = None
