"""Penalty: the quadratic term of EWC, with any importance (Kirkpatrick et al. 2017, eq. 3)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.config import Options, validate
from holdfast.errors import ConfigError, HoldfastError, PriorMismatchError
from holdfast.hold.attach import (
    Chunk,
    Handle,
    add_to_gradients,
    hook,
    logarithmic_summary,
    place,
    reference_weights,
)
from holdfast.hold.kept import Kept
from holdfast.hold.operator import Operator
from holdfast.hold.reference import watch_reference
from holdfast.hold.schedule import total_rate_of
from holdfast.hold.spectrum import Spectrum
from holdfast.hold.strength import mean_of, warn_if_pull_is_faint
from holdfast.hold.unheld import Unheld
from holdfast.importance.prior import ImportancePrior, parameters_by_name

_STRENGTH = 3e3


class PenaltyOptions(Options):
    """Add λ/2 Σ I (θ − θ*)² to the loss, as its gradient."""

    name: Literal["penalty"] = "penalty"
    strength: float | None = Field(
        None, ge=0, description="λ (default 3000); the importance is taken as it is, not normalised"
    )
    pull: float | None = Field(
        None,
        ge=0,
        description="λ · mean importance · Σ η over a task, in place of `strength`: the same on every model",
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> PenaltyOptions:
        if self.strength is not None and self.pull is not None:
            raise ValueError("give `strength` (λ) or `pull` (a whole task's, of mean importance), not both")
        return self


class Penalty:
    """EWC's λ/2 Σ I (θ − θ*)², added as its exact gradient λ·I·(θ − θ*) before each optimizer step.

    Parameters
    ----------
    prior : ImportancePrior
        I, as it is; negative values count as 0. EWC takes Fisher's diagonal, summed over tasks. Of the kind
        ``inputs`` the term is λ/2 tr(Δ C Δᵀ), Δ = θ − θ*, C scaled to mean eigenvalue 1.
    strength : float, optional
        λ; 3000 where nothing is given.
    pull : float, optional
        In place of it: λ · mean importance · Σ_t η_t over the task (`holdfast.hold.tell_total_rate`), so that
        it means the same whatever the size of the importance. It is of the gradient: Adam divides that by its
        own size, which an anchor's pull doesn't go through.
    reference : mapping of str to Tensor, optional
        θ*, by canonical name; copies of the weights at `attach` when omitted.

    Notes
    -----
    The gradient is added once per optimizer step, after accumulation and clipping. Deviation from EWC:
    the clipped norm is that of the task's gradient alone, and the logged loss is the task's alone. Who
    wants the term in the loss itself calls `loss` and does not attach. Memory, in the parameters' dtype:
    λ·I and θ* (2 values per protected weight), and temporarily θ − θ* for at most 64 M weights at a time.
    """

    def __init__(
        self,
        prior: ImportancePrior,
        *,
        strength: float | None = None,
        pull: float | None = None,
        reference: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.prior = prior
        self.options = validate(PenaltyOptions, {"strength": strength, "pull": pull}, "Penalty")
        self.reference = reference

    @cached_property
    def spectrum(self) -> Spectrum:
        """The prior, in the frame in which it is a number for each coordinate."""
        return Spectrum.of(self.prior)

    def _scaled(self, name: str, strength: float) -> Tensor:
        # λ·I before the cast: Fisher alone (1e-9) would underflow float16
        return self.spectrum.values[name].clamp(min=0) * strength

    @cached_property
    def _mean(self) -> float:
        return mean_of(self.spectrum.values.values())

    def _strength(self, rates: float | None) -> float:
        """λ where the task's learning rates add up to `rates`.

        Raises
        ------
        ConfigError
            `pull` was given, and the sum is not known.
        """
        if self.options.pull is None:
            return _STRENGTH if self.options.strength is None else self.options.strength
        if rates is None:
            raise ConfigError(
                f"penalty: pull={self.options.pull:g} is of a whole task, but the sum of its learning rates "
                "is not known. Call holdfast.hold.tell_total_rate(optimizer, scheduler, steps) before it is "
                "attached, or give `strength` (λ itself)."
            )
        whole = self._mean * rates
        return self.options.pull / whole if whole else 0.0

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Handle:
        """Add the penalty's gradient at every step of this optimizer until the handle is removed.

        Raises
        ------
        PriorMismatchError
            The prior or the reference doesn't fit the model, or the optimizer holds none of the weights.
        ConfigError
            `pull` was given, and the sum of the task's learning rates is not known.
        """
        inner, chunks = self.spectrum.bind(model, optimizer, begun=self.reference is not None)
        operators: list[Operator] = []
        references: list[list[Tensor]] = []

        def take(more: list[Chunk]) -> None:
            for chunk in more:
                strength = self._strength(total_rate_of(inner.param_groups[chunk.group], inner))
                operators.append(self._operator(chunk, model, strength))
            references.extend(reference_weights(chunk, self.reference, "penalty") for chunk in more)

        take(chunks)
        mean = mean_of(self.spectrum.values[name] for chunk in chunks for name in chunk.names)
        strongest = max(
            self._strength(total_rate_of(inner.param_groups[chunk.group], inner)) for chunk in chunks
        )
        warn_if_pull_is_faint("penalty", strongest, mean, inner, chunks)
        watch = Unheld("penalty", self.prior, model, inner, chunks, take)

        def add() -> None:
            for chunk, operator, reference in zip(chunks, operators, references, strict=True):
                away = torch._foreach_sub(chunk.parameters, reference)
                operator.times_(away)
                moving = [(p, d) for p, d in zip(chunk.moving(), away, strict=True) if p is not None]
                add_to_gradients(inner, [p for p, _ in moving], [d for _, d in moving])

        other = "use the mechanism 'anchor' (of a prior by inputs with coordinates='weights')"
        handle = hook(inner, add, needs_gradients="penalty", instead=other, first=watch.attach, chunks=chunks)
        handle.meter = self.spectrum.meter(chunks, operators, references)
        kept = Kept("penalty", inner, self.prior.tensors)
        handle.removers += [kept.end, watch_reference(kept, chunks, references)]
        return handle

    def _operator(self, chunk: Chunk, model: nn.Module, strength: float) -> Operator:
        values = {name: self._scaled(name, strength) for name in chunk.names}
        return self.spectrum.operator(chunk, model, values)

    def loss(self, model: nn.Module) -> Tensor:
        """λ/2 Σ I (θ − θ*)² as a differentiable scalar (), for a training loop that adds it to its loss.

        Raises
        ------
        HoldfastError
            No `reference` was given: without it there is nothing to measure the distance from.
        ConfigError
            `pull` was given: here no learning rates are known.
        PriorMismatchError
            The prior or the reference doesn't fit the model.
        """
        if self.reference is None:
            raise HoldfastError(
                "penalty.loss: give `reference=` (canonical name to weight at the end of the last task)."
            )
        self.prior.check_fits(model)
        parameters = parameters_by_name(model)
        total = torch.zeros((), dtype=torch.float32)
        for name in self.prior.tensors:
            parameter = parameters[name]
            if name not in self.reference:
                raise PriorMismatchError(f"penalty.loss: the reference lacks '{name}'.")
            away = parameter - place(self.reference[name], parameter)
            operator = self._operator(Chunk(0, [name], [parameter]), model, self._strength(None))
            total = total.to(parameter.device) + 0.5 * operator.energy([away])
        return total

    def summary(self) -> dict[str, Any]:
        """Distribution of λ·I in 20 logarithmic bins below its maximum; nothing is ever fully held.

        With `pull` it is that of λ·I·Σ η, the pull over the task.
        """
        what = "penalty weight" if self.options.pull is None else "pull over the task"
        strength = self._strength(1.0)
        return logarithmic_summary(
            lambda: (self._scaled(name, strength) for name in self.prior.tensors), what
        )
