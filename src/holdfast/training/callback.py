"""ProtectCallback: protection for anyone's own transformers or TRL training script."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from holdfast import world
from holdfast.errors import ConfigError
from holdfast.hold import (
    Anchor,
    Control,
    Handle,
    Protection,
    apply_control,
    build_mechanism,
    mechanism_options,
    returns,
    tell_total_rate,
)
from holdfast.hold.attach import together
from holdfast.hold.drift import MOVED, Drift
from holdfast.hold.reference import weights_of
from holdfast.hold.unheld import apart
from holdfast.importance.prior import ImportancePrior
from holdfast.models import unwrapped
from holdfast.storage import write_tensors
from holdfast.training.beginning import warn_of_other_beginning
from holdfast.training.checkpoints import ours, own_checkpoint, saved_checkpoint

REFERENCE = "reference.safetensors"  # in a checkpoint: the weights that training began with


class ProtectCallback(TrainerCallback):
    """Hold what a prior calls important while a `Trainer` or TRL's `SFTTrainer` trains.

    One line for one training, by a mechanism that holds weights. What needs more than that (replay, prompts,
    growing adapters, rating the new task afterwards, one task after another) is `holdfast.Learner`.

    Pass it in the trainer's ``callbacks=[...]``. The weights to return to are those that the trainer's model
    has when the trainer is made, of each model its own where several trainers have the callback. They are
    saved with each checkpoint, and a training that resumes from one returns to these, whatever model its
    trainer was made with.

    Parameters
    ----------
    prior : ImportancePrior or path
        What must be kept; a folder is loaded.
    mechanism : str or options model
        ``"anchor"`` (default), ``"gate"``, ``"penalty"`` or ``"project"``.
    control : {"none", "permuted", "tensor-mean", "layer-mean"}
        See `holdfast.hold.apply_control`.
    seed : int
        Of the control.
    reference : mapping of str to Tensor, optional
        The weights to return to, by canonical name, if not those at the start; for mechanisms that return.
    beside : ImportancePrior or path, optional
        A prior by weight of what `prior` leaves out, from ``holdfast.attribute(..., importance="fisher",
        beside=prior)``: held too, by an anchor at its default strength.
    **options
        Of the mechanism: ``strength`` for anchor and penalty; ``pull``, ``bound``, ``every`` and
        ``coordinates`` for the anchor; ``on``, ``shape``, ``quantile`` and ``fraction`` for the gate;
        ``share`` and ``on`` for the projection.

    Attributes
    ----------
    protection : Protection or None
        The mechanism in use, from the start of training on; ``protection.summary()`` describes it.

    Notes
    -----
    With a prior of the kind ``inputs``, ``old_outputs_moved`` (percent, `Drift.percent`) stands beside the
    loss in the trainer's ``log_history`` and progress bar. A Trainer calls TensorBoard's and W&B's callbacks
    before those in ``callbacks=[...]``: for a curve there give ``report_to="none"`` and pass theirs behind
    this one (`holdfast.Learner` needs no such care).

    Raises
    ------
    ConfigError
        No such mechanism or control, an option that the mechanism doesn't have, or a reference for one that
        returns to no weights.
    DataError
        There is no readable prior in the folder.

    Examples
    --------
    >>> Trainer(model, args, train_dataset=rows, callbacks=[ProtectCallback("prior/", strength=600)])
    """

    def __init__(
        self,
        prior: ImportancePrior | str | os.PathLike[str],
        mechanism: Any = "anchor",
        control: Control = "none",
        seed: int = 0,
        reference: Mapping[str, Tensor] | None = None,
        beside: ImportancePrior | str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        self.prior = apply_control(_loaded(prior), control, seed)
        self.beside = None if beside is None else apply_control(_loaded(beside), control, seed)
        self.mechanism = mechanism_options(mechanism, "ProtectCallback", **options)
        self.given = reference
        if reference is not None and not self._returns:
            raise ConfigError(
                f"ProtectCallback: `reference` does nothing with {self.mechanism.name!r} on the "
                f"{self.mechanism.on}, which returns to no weights; leave it out."
            )
        self.protection: Protection | None = None
        self._captured: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()  # by model
        self._trained: WeakSet[nn.Module] = WeakSet()
        self._handle, self._handle_beside = Handle(), Handle()
        self._figure: tuple[Any, dict[str, float]] | None = None  # what it depends on, and it

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the prior fits, and remember the weights before a checkpoint is loaded over them.

        Raises
        ------
        PriorMismatchError
            The prior doesn't fit the trainer's model.
        """
        self._check(kwargs["model"])
        self._capture(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the trainer's optimizer.

        Raises
        ------
        ConfigError
            Training resumes from a checkpoint, and the weights before it are not known.
        """
        model, optimizer, prior = kwargs["model"], kwargs["optimizer"], self.prior
        if self._needs_reference:
            if state.global_step > 0:
                self._recall(ours(own_checkpoint(args, state), REFERENCE), model)
            elif unwrapped(model) not in self._captured:  # added late, or the trainer has made another model
                self._check(model)
                self._capture(model)
            elif not world.holds_parts(model.parameters()):
                self._tell_if_moved(model)
        self._detach()  # a training that failed left without on_train_end
        reference = self.given if self.given is not None else self._captured.get(unwrapped(model))
        tell_total_rate(optimizer, kwargs.get("lr_scheduler"), state.max_steps)
        with together() as handles:
            if self.beside is not None:
                prior, beside = apart(prior, self.beside, model)
                self._handle_beside = Anchor(beside, reference=reference).attach(model, optimizer)
                handles.append(self._handle_beside)
            self.protection, self._figure = build_mechanism(self.mechanism, prior, reference), None
            self._handle = self.protection.attach(model, optimizer)
        self._trained.add(unwrapped(model))
        if "first_token" in self.prior.meta:
            rows = getattr(kwargs.get("train_dataloader"), "dataset", None)
            first = self.prior.meta["first_token"]
            warn_of_other_beginning(rows, kwargs.get("processing_class"), first, "the prior's rows")

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the weights to return to with the checkpoint."""
        captured = self._captured.get(unwrapped(kwargs["model"]))
        folder = saved_checkpoint(args, state)
        if captured is not None and folder.is_dir():
            whole = {name: world.whole(weight) for name, weight in captured.items()}
            if args.should_save:
                write_tensors(ours(folder, REFERENCE), whole)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach."""
        self._detach()

    def _check(self, model: nn.Module) -> None:
        for prior in self._priors:
            prior.check_fits(model)

    def _detach(self) -> None:
        self._handle.remove()
        self._handle_beside.remove()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the hold's figures beside the loss, in ``log_history`` and before the other loggers.

        ``holdfast/held``: the mean of what is held, as ``protection.summary()`` has it: of an anchor the pull
        a step at the largest rate so far, of a penalty λ·I. Of an anchor with strength ``auto``
        ``holdfast/pull`` instead, the pull over the task until now. ``holdfast/not_held``: how many trained
        tensors are not. ``old_outputs_moved``: see `Drift.percent`, where it is known.
        """
        if logs is None or "loss" not in logs or self.protection is None:
            return
        figures = {**self._held(), "holdfast/not_held": float(len(self._handle.not_held))}
        if self._handle.meter is not None:
            figures[MOVED] = self.drift().percent
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def _held(self) -> dict[str, float]:
        """The mean of the summary, which goes through all weights: made anew only where it has changed."""
        anchor = self.protection if isinstance(self.protection, Anchor) else None
        now = None if anchor is None else (anchor.learning_rate, anchor.pulled)
        if self._figure is None or self._figure[0] != now:
            assert self.protection is not None
            said = self.protection.summary()
            name = "holdfast/pull" if said["held"] is None else "holdfast/held"
            self._figure = now, {name: float(said["mean"])}
        return self._figure[1]

    def drift(self) -> Drift:
        """How far old outputs have moved since training began, by map and in all; see `Handle.drift`.

        Raises
        ------
        ConfigError
            Nothing is attached, or the prior is not of the kind ``inputs``.
        """
        return self._handle.drift()

    @property
    def _priors(self) -> list[ImportancePrior]:
        return [self.prior] if self.beside is None else [self.prior, self.beside]

    @property
    def _returns(self) -> bool:
        return self.beside is not None or returns(self.mechanism)

    @property
    def _needs_reference(self) -> bool:
        return self._returns and self.given is None

    def _capture(self, model: nn.Module) -> None:
        if self._needs_reference:
            names = [name for prior in self._priors for name in prior.tensors]
            self._captured[unwrapped(model)] = weights_of(model, names)

    def _is_as_captured(self, model: nn.Module) -> bool:
        """In the type and on the device that an engine may have given them since."""
        captured = self._captured[unwrapped(model)]
        return all(torch.equal(t, captured[name].to(t)) for name, t in weights_of(model, captured).items())

    def _tell_if_moved(self, model: nn.Module) -> None:
        """Say so where somebody has changed a model between the making of its trainer and its training."""
        if unwrapped(model) not in self._trained and not self._is_as_captured(model):
            warnings.warn(
                "ProtectCallback: the model's weights have changed since the trainer was made, and it is "
                "held to those of then. Load weights before the trainer is made, or give `reference=`.",
                stacklevel=3,
            )

    def _recall(self, file: Path, model: nn.Module) -> None:
        """Take the weights to return to from a checkpoint; where it has none, those that were captured."""
        if file.is_file():
            self._captured[unwrapped(model)] = load_file(file)
            return
        captured = self._captured.get(unwrapped(model))
        if captured is None:
            why = "the callback was added after the trainer was made, or the trainer has made its model anew"
        elif self._is_as_captured(model):
            why = "the trainer was made with the checkpoint's own weights"
        else:
            return
        raise ConfigError(
            f"ProtectCallback: training resumes from a checkpoint without {REFERENCE} (there is no {file}), "
            f"and {why}, so the weights to return to are unknown. Make the trainer with the model that "
            "training began with and pass the callback in Trainer(callbacks=[...]); or, where it resumes "
            f"from another folder than its own, copy {REFERENCE} from there; or give it `reference=`."
        )


def _loaded(prior: ImportancePrior | str | os.PathLike[str]) -> ImportancePrior:
    return prior if isinstance(prior, ImportancePrior) else ImportancePrior.load(prior)
