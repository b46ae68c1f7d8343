"""KIF: knowledge localization and fusion (K)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.hold import Gate, Handle
from holdfast.hold.attach import together
from holdfast.hold.cost import Estimate
from holdfast.hold.fusion import fuse, old_shares
from holdfast.hold.reference import weights_of
from holdfast.importance.prior import ImportancePrior, trained_parameters
from holdfast.importance.sensitivity import Sensitivity
from holdfast.importance.skill_units import accumulated, important, masks, unit_scores, write_units
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.kif.options import KifOptions, check, estimate, units_of
from holdfast.strategies.kif.orthogonal import Orthogonality
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.memory import Memory
from holdfast.tasks.task import Example, TaskStream
from holdfast.training.verbs import Held


@register
class Kif(Strategy):
    """K, Algorithm 2: localise while a task is learned, then fuse old and new weights unit by unit."""

    name = "kif"
    paper = "Feng et al. 2024, arXiv 2408.05200"
    summary = "importance of matrices along the training, then old and new weights fused by it"
    Options = KifOptions
    state = "constant"

    def __init__(self, options: KifOptions) -> None:
        super().__init__(options)
        self.accumulated: Tensor | None = None
        self.memory = None if options.memory is None else Memory(options.memory)
        if options.sensitivity.order == "second":
            self.reads = ("labels",)

    def check(self, model: nn.Module) -> None:
        """See that the model has what the options are about."""
        check(self.options, model)

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """Sensitivity, and the old weights; and the replays."""
        return estimate(self.options, model, stream)

    def begin(self, context: Context, stage: Stage) -> None:
        """Keep the weights that the stage starts from: they are the fused model of the tasks before."""
        self.parameters = trained_parameters(context.model)
        self.units = units_of(self.options, self.parameters)
        self.sensitivity = Sensitivity(context.model, self.parameters, self.options.sensitivity)
        self.before = weights_of(context.model, self.parameters)

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Sequence[Handle]:
        """Keep units apart (eq. 5)."""
        with together() as handles:
            self.sensitivity.attach()  # a task may be trained twice, and each time ends with its removal
            handles.append(Handle([self.sensitivity.remove]))
            if self.options.orthogonality > 0:
                apart = Orthogonality(self.parameters, self.options.orthogonality)
                handles.append(apart.attach(model, optimizer))
        return handles

    def watch(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Count each sample's tokens, for eq. 9."""
        self.sensitivity.watch(batch)

    def observe(self, model: nn.Module, step: int, scale: float) -> None:
        """Algorithm 1, one step; under online fusion also blend the old weights in every few steps."""
        self.sensitivity.observe(scale)
        fusion = self.options.fusion
        if self.accumulated is not None and fusion.name == "online" and step % fusion.every == 0:
            self._fuse(self.accumulated, self._scores())

    def stage_state_dict(self) -> Mapping[str, Tensor]:
        """Sensitivity so far."""
        return self.sensitivity.state_dict()

    def load_stage_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the sensitivity back."""
        self.sensitivity.load_state_dict(tensors)

    def _scores(self) -> Tensor:
        return unit_scores(self.units, self.sensitivity.result(), self.options.unit_score or "product")

    def _fuse(self, old: Tensor, new: Tensor) -> None:
        share = old_shares(old, new, self.options.fusion, self.options.important or 0.2)
        fuse(self.units, self.parameters, self.before, share, self.options.averaged or "factors")

    def end(self, context: Context, stage: Stage) -> None:
        """Fuse (eq. 15 or 17), replay if there is a memory (section V), accumulate the scores (eq. 13)."""
        scores, before = self._scores(), self.accumulated
        if before is not None and self.options.fusion.name != "online":  # nothing precedes the first task
            self._fuse(before, scores)
        if self.memory is not None:
            if len(self.memory):
                self._replay(context, stage, scores, self.memory.examples)
            self.memory.add(stage.tasks[0], context.seed, context.write)
        self.accumulated = scores if before is None else accumulated(before, scores, self.options.beta)
        total = None if before is None else self.accumulated
        write_units(context.folder / "units.json", self.options.units, self.units, scores, total)

    def _replay(self, context: Context, stage: Stage, scores: Tensor, rows: list[Example]) -> None:
        """Learn from the memory with this task's important units held fixed (K, section V)."""
        needed = important(scores, self.options.important or 0.2)
        gate = Gate(ImportancePrior(masks(self.units, needed, self.parameters)))
        context.fit(context.model, rows, f"replay after {stage.name}", Held(gate), self.options.replay_epochs)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The accumulated scores alone, whatever the number of tasks; and the memory."""
        tensors = {} if self.accumulated is None else {"accumulated": self.accumulated}
        return tensors, {} if self.memory is None else {"memory": self.memory.state_dict()}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take them back."""
        self.accumulated = tensors.get("accumulated")
        if self.memory is not None:
            self.memory.load_state_dict(values["memory"])
