"""What a method may do while something is trained: the verbs that every training loop offers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.errors import ConfigError
from holdfast.hold import Handle
from holdfast.hold.attach import together
from holdfast.models import recomputes_reentrantly

Batch = Mapping[str, Any]
ROWS = "row_ids"  # key of a batch: which of the rows trained on it has, (S,) int64


class Verbs:
    """The verbs, each of which does nothing unless it is overridden.

    They are called in this order: `attach` once, when the optimizer exists; for each micro-batch `watch`,
    the forward pass, `loss`, the backward pass; once per optimizer step `observe`, then the step.
    `stage_state_dict` goes into every checkpoint. Where a trainer evaluates, `watch` sees those batches too,
    without gradients; `loss` is of the training alone.

    Attributes
    ----------
    trains : bool
        Whether there is anything to train; where not, a training makes no step, and none of these is called.
    reads : tuple of str
        What `watch` and `loss` need of each batch; a trainer whose batches are others is refused.
    looks : bool
        Whether `loss` looks at ``outputs``: some trainers make none, and are spared a forward pass more.
    around_blocks : bool
        Whether gradients pass into the model's blocks or out of them otherwise than from block to block.
        Reentrant checkpointing knows no other way, and a training with it is refused.
    loss_trains : bool
        Whether `loss` passes gradients to weights that the forward pass before it leaves out.
    """

    trains: ClassVar[bool] = True
    reads: tuple[str, ...] = ()
    looks: ClassVar[bool] = True
    around_blocks: bool = False
    loss_trains: ClassVar[bool] = False

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Sequence[Handle]:
        """Put holds on the optimizer; the handles are removed when the training ends."""
        return ()

    def watch(self, model: nn.Module, batch: Batch) -> None:
        """Look at a micro-batch before its forward pass: of the training, or without gradients of a test."""

    def loss(self, model: nn.Module, batch: Batch, outputs: Any, loss: Tensor) -> Tensor:
        """The loss of a micro-batch: the one given, something added to it, or another in its place.

        Parameters
        ----------
        batch : mapping of str to Tensor
            What the model was given, its ``labels``, and in our own loop ``row_ids``.
        outputs : ModelOutput
            What it answered; a causal model's logits may be those of the last positions only. It may be None
            where `looks` is False.
        loss : Tensor
            A scalar, scaled as if this micro-batch were its whole optimizer step.
        """
        return loss

    def observe(self, model: nn.Module, step: int, scale: float) -> None:
        """Look at the gradient once per optimizer step, when it is accumulated and not yet clipped.

        Parameters
        ----------
        step : int
            From 1.
        scale : float
            ``scale`` times ``.grad`` is the gradient of the loss (not 1 in fp16 only).
        """

    def stage_state_dict(self) -> Mapping[str, Tensor]:
        """What was gathered so far in this training; it is saved with each checkpoint."""
        return {}

    def load_stage_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `stage_state_dict` gave, when a killed training goes on."""


class Held(Verbs):
    """The verbs of a training under some protections and nothing else."""

    def __init__(self, *protections: Any) -> None:
        self.protections = protections

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Sequence[Handle]:
        """Attach them all."""
        with together() as handles:
            for protection in self.protections:
                handles.append(protection.attach(model, optimizer))
        return handles


def attach_verbs(verbs: Verbs, model: nn.Module, optimizer: Optimizer) -> list[Handle]:
    """`Verbs.attach`, once it is seen that the model's way of training lets the method's gradients through.

    Raises
    ------
    ConfigError
        They pass by ways that reentrant checkpointing doesn't know.
    """
    if verbs.around_blocks and recomputes_reentrantly(model):
        who = getattr(verbs, "name", type(verbs).__name__)
        raise ConfigError(
            f"attach: the model makes activations anew with use_reentrant=True, and strategy '{who}' has "
            "gradients that pass its blocks by hooks, which are lost so, or gone through twice. Give "
            "{'use_reentrant': False} (the same memory): as gradient_checkpointing_kwargs of "
            "TrainingArguments, or to model.gradient_checkpointing_enable where you call it."
        )
    return list(verbs.attach(model, optimizer))


def has(verbs: Verbs, name: str) -> bool:
    """Whether a verb is overridden; one that isn't costs nothing in a loop."""
    return getattr(type(verbs), name) is not getattr(Verbs, name)


def model_inputs(batch: Batch) -> dict[str, Any]:
    """A batch without what is not for the model."""
    return {key: value for key, value in batch.items() if key != ROWS}
