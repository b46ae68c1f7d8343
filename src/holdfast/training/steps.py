"""Where a method acts while something is trained, and what is recorded of each step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from holdfast import world
from holdfast.hold import Handle, tell_total_rate
from holdfast.hold.drift import MOVED, Drift
from holdfast.progress import Interrupted, stop_requested
from holdfast.quantities import percent
from holdfast.storage import write_json, write_tensors
from holdfast.training.checkpoints import ours, seal_checkpoint
from holdfast.training.parts import mark
from holdfast.training.verbs import Verbs, attach_verbs, has

OBSERVED = "strategy.safetensors"  # in a checkpoint: what the method has gathered up to this step
SPENT = "seconds.json"  # in a checkpoint: what the training had taken up to it
UNLOGGED = "unlogged.safetensors"  # in a checkpoint: the losses since the last that was logged


@dataclass
class TrainingRecord:
    """What one task's training did, as it is written to ``training.json``."""

    steps: int = 0
    seconds: float = 0.0
    earlier: float = 0.0  # of these: of attempts before, up to the checkpoint that was continued; not written
    lm_weight: float = 0.0  # of the loss on prompts
    trained: int = 0  # numbers with a gradient, earlier ranks of a grown LoRA among them
    loss: list[list[float]] = field(default_factory=list)
    learning_rate: list[list[float]] = field(default_factory=list)
    moved: list[list[float]] = field(default_factory=list)  # old outputs, in percent


class Steps(TrainerCallback):
    """The record, the method's verbs, sealed checkpoints, and the clean stop.

    Parameters
    ----------
    bar : Bar, optional
        Shows the steps; without it the trainer shows its own progress.
    before : callable, optional
        Takes off what earlier trainings have left on the model; by default what this one has.
    """

    def __init__(
        self,
        verbs: Verbs,
        record: TrainingRecord,
        bar: Any = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.verbs, self.record, self.bar = verbs, record, bar
        self.before = before or self.release
        self.handles: list[Handle] = []
        self.attached = self.stopping = False
        self._started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before()  # of a training that failed, or that came before this one
        tell_total_rate(kwargs["optimizer"], kwargs.get("lr_scheduler"), state.max_steps)
        self.handles = attach_verbs(self.verbs, kwargs["model"], kwargs["optimizer"])
        self.attached = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.show(state.global_step, state.max_steps, note=self._note())
        self.record.steps = state.global_step
        if world.any_of(stop_requested()):
            control.should_save = self.stopping = True

    def _note(self) -> str:
        if not self.record.loss:
            return ""
        said = f"loss {self.record.loss[-1][1]:.3f}"
        if not self.record.moved:
            return said
        return f"{said}, old outputs moved {percent(self.record.moved[-1][1], 1)}"

    def drift(self) -> Drift | None:
        """How far old outputs have moved since this training began; None where no hold knows it."""
        known = [handle for handle in self.handles if handle.meter is not None]
        return known[0].drift() if known else None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.record.loss.append([state.global_step, float(logs["loss"])])
            self.record.learning_rate.append([state.global_step, float(logs.get("learning_rate", 0.0))])
            if MOVED in logs:
                self.record.moved.append([state.global_step, float(logs[MOVED])])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if has(self.verbs, "stage_state_dict"):
            write_tensors(ours(folder, OBSERVED), self.verbs.stage_state_dict())
        spent = self.record.earlier + time.perf_counter() - self._started
        write_json(ours(folder, SPENT), {"seconds": spent})
        mark(folder, kwargs["model"], last=state.global_step >= state.max_steps)
        world.barrier()  # each process has written its random state there
        if world.leads():
            seal_checkpoint(folder)
        if self.stopping:
            raise Interrupted(f"Stopped after step {state.global_step} of {state.max_steps}; saved.")

    def release(self) -> None:
        """Take the holds off the optimizer."""
        while self.handles:
            self.handles.pop().remove()
