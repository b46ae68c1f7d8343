"""Where a strategy acts while a task is trained, and what is recorded of each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from holdfast.hold import Handle
from holdfast.progress import Interrupted, stop_requested
from holdfast.storage import write_tensors
from holdfast.training.checkpoints import seal_checkpoint

Batch = Mapping[str, Any]
OBSERVED = "strategy.safetensors"  # in a checkpoint: what the strategy has gathered up to this step


@dataclass
class Interventions:
    """What a strategy does while a task is trained; each is optional.

    Attributes
    ----------
    attach : callable
        ``(model, optimizer) -> handles``, called once when the optimizer exists.
    penalty : callable
        ``(model, batch, outputs) -> scalar tensor or None``, added to the loss of a micro-batch.
    watch : callable
        ``(model, batch)``, called before the forward pass of each micro-batch.
    observe : callable
        ``(model, step, scale)``, called once per optimizer step, when the gradient is accumulated and not
        yet clipped. ``scale`` times ``.grad`` is the gradient of the loss (not 1 in fp16 only).
    state, load_state : callable
        ``() -> tensors`` and ``(tensors)``: what the strategy gathers while a task is trained. It goes into
        every checkpoint, so that a killed training goes on with it.
    """

    attach: Callable[[nn.Module, Optimizer], Sequence[Handle]] | None = None
    penalty: Callable[[nn.Module, Batch, Any], Tensor | None] | None = None
    watch: Callable[[nn.Module, Batch], None] | None = None
    observe: Callable[[nn.Module, int, float], None] | None = None
    state: Callable[[], Mapping[str, Tensor]] | None = None
    load_state: Callable[[Mapping[str, Tensor]], None] | None = None


@dataclass
class TrainingRecord:
    """What one task's training did, as it is written to ``training.json``."""

    steps: int = 0
    seconds: float = 0.0
    trained: int = 0  # numbers with a gradient, earlier ranks of a grown LoRA among them
    loss: list[list[float]] = field(default_factory=list)
    learning_rate: list[list[float]] = field(default_factory=list)


class Steps(TrainerCallback):
    """Progress, the record, the strategy's hooks, sealed checkpoints, and the clean stop."""

    def __init__(self, interventions: Interventions, record: TrainingRecord, bar: Any) -> None:
        self.interventions, self.record, self.bar = interventions, record, bar
        self.handles: list[Handle] = []
        self.stopping = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interventions.attach is not None:
            self.handles = list(self.interventions.attach(kwargs["model"], kwargs["optimizer"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.show(state.global_step, state.max_steps, note=self._note())
        self.record.steps = state.global_step
        if stop_requested():
            control.should_save = self.stopping = True

    def _note(self) -> str:
        return f"loss {self.record.loss[-1][1]:.3f}" if self.record.loss else ""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.record.loss.append([state.global_step, float(logs["loss"])])
            self.record.learning_rate.append([state.global_step, float(logs.get("learning_rate", 0.0))])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.interventions.state is not None:
            write_tensors(folder / OBSERVED, self.interventions.state())
        seal_checkpoint(folder)
        if self.stopping:
            raise Interrupted(f"Stopped after step {state.global_step} of {state.max_steps}; saved.")

    def release(self) -> None:
        for handle in self.handles:
            handle.remove()
