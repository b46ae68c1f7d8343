"""Gate: important weights move less, or not at all (A, eq. 13)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.config import Options, validate
from holdfast.hold.attach import Chunk, Handle, held_summary, hook
from holdfast.hold.operator import Operator
from holdfast.hold.spectrum import Spectrum
from holdfast.hold.strength import mean_of, warn_if_share_is_faint
from holdfast.hold.unheld import Unheld
from holdfast.importance.prior import ImportancePrior

_QUANTILE_ELEMENTS = 16_000_000  # torch.quantile takes no more


class GateOptions(Options):
    """Scale each weight's movement by one minus the fraction of it that is held."""

    name: Literal["gate"] = "gate"
    on: Literal["update", "gradient"] = Field(
        "update", description="update: the optimizer's whole step; gradient: eq. 13, which cancels under Adam"
    )
    shape: Literal["paper", "soft", "top"] = Field(
        "paper", description="held fraction: R clipped to [0,1] | I/(λ+I) | 1 for the top of each tensor"
    )
    quantile: float | None = Field(
        None, ge=0, le=1, description="soft only: λ is this quantile of all importances (default 0.03)"
    )
    fraction: float | None = Field(
        None, ge=0, le=1, description="top only: share of each tensor that is frozen (default 0.95)"
    )

    @model_validator(mode="after")
    def _only_what_applies(self) -> GateOptions:
        for option, shape in (("quantile", "soft"), ("fraction", "top")):
            if getattr(self, option) is not None and self.shape != shape:
                raise ValueError(f"`{option}` applies to `shape: {shape}` only, not to `{self.shape}`")
        return self


class Gate:
    """Scale the movement of each weight by 1 − R̄, the fraction of it that is not held.

    Parameters
    ----------
    prior : ImportancePrior
        R̄ after clipping to [0, 1] (`shape="paper"`), or what R̄ is made from. Of the kind ``inputs`` the
        movement along each direction of a map's inputs is scaled, with R = c of mean 1.
    on : {"update", "gradient"}
        ``update``: θ ← θ_old + (1 − R̄) ⊙ (θ_new − θ_old) after each optimizer step. It works with every
        optimizer and holds against weight decay: where R̄ = 1 the weight stays the same, bit for bit, where
        R̄ = 0 the step is untouched. ``gradient``: A, eq. 13 to the letter, once per optimizer step, after
        accumulation and clipping. Under Adam a gate that is constant in time cancels (the update is m/√v,
        and both scale with it), and decoupled weight decay moves even a fully gated weight.
    shape : {"paper", "soft", "top"}
        ``paper``: R̄ = [R]₊ clipped to 1 (eqs. 12 and 13). ``soft``: R̄ = I/(λ + I), λ the `quantile` of I
        over all weights. ``top``: R̄ = 1 for the `fraction` of each tensor with the largest I, as far as it
        is positive, else 0.
    quantile : float, optional
        For ``soft``: default 0.03. Priors of more than 16 M weights are sampled for it, with a fixed seed.
    fraction : float, optional
        For ``top``: default 0.95.

    Notes
    -----
    Memory, in the parameters' dtype: ``update`` keeps the gate and the weights before the step (2 values
    per protected weight), ``gradient`` the gate alone. In 16-bit dtypes a held fraction below 1 is never
    rounded up to 1. The sign of a weight that is exactly −0 may change.
    """

    def __init__(
        self,
        prior: ImportancePrior,
        *,
        on: Literal["update", "gradient"] = "update",
        shape: Literal["paper", "soft", "top"] = "paper",
        quantile: float | None = None,
        fraction: float | None = None,
    ) -> None:
        self.prior = prior
        self.options = validate(
            GateOptions, {"on": on, "shape": shape, "quantile": quantile, "fraction": fraction}, "Gate"
        )

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Handle:
        """Gate every step of this optimizer until the handle is removed.

        Raises
        ------
        PriorMismatchError
            The prior doesn't fit the model, or the optimizer holds none of its weights.
        """
        spectrum = self.spectrum
        inner, chunks = spectrum.bind(model, optimizer)
        operators: list[Operator] = []
        before: list[list[Tensor]] = []

        def take(more: list[Chunk]) -> None:
            held = dict(self.held())
            operators.extend(spectrum.operator(chunk, model, held, partial=True) for chunk in more)
            if self.options.on == "update":
                before.extend([torch.empty_like(p) for p in chunk.parameters] for chunk in more)

        take(chunks)
        share = mean_of(value for _, value in self.held())
        warn_if_share_is_faint("gate", share, str(self.prior.meta.get("importance", "the prior")))
        watch = Unheld("gate", self.prior, model, inner, chunks, take)
        if self.options.on == "gradient":
            return _gate_gradients(inner, chunks, operators, watch)

        def snapshot() -> None:
            for chunk, old in zip(chunks, before, strict=True):
                torch._foreach_copy_(old, chunk.parameters)

        def hold() -> None:
            for chunk, old, operator in zip(chunks, before, operators, strict=True):
                operator.blend_(chunk.parameters, old)

        return hook(inner, snapshot, hold, first=watch.attach, chunks=chunks)

    @cached_property
    def spectrum(self) -> Spectrum:
        """The prior, in the frame in which it is gated."""
        return Spectrum.of(self.prior)

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical name and R̄, float32 in [0, 1], of one weight tensor after another.

        Of the kind ``inputs`` it is (I,): of the directions of each map's inputs, with R = c.
        """
        shape = self.options.shape
        scale = self._scale() if shape == "soft" else 0.0
        for name, tensor in self.spectrum.values.items():
            if shape == "paper":
                yield name, tensor.clamp(0, 1)
            elif shape == "soft":
                importance = tensor.clamp(min=0)
                yield name, torch.where(importance > 0, importance / (scale + importance), 0.0)
            else:
                fraction = 0.95 if self.options.fraction is None else self.options.fraction
                held = torch.zeros_like(tensor)
                top = tensor.flatten().topk(round(fraction * tensor.numel()), sorted=False).indices
                held.view(-1)[top] = 1.0
                held *= tensor > 0  # nothing tells one zero from another
                yield name, held

    def _scale(self) -> float:
        """λ of ``soft``: the quantile of all importances."""
        quantile = 0.03 if self.options.quantile is None else self.options.quantile
        every = self.spectrum.values.values()
        share = min(1.0, _QUANTILE_ELEMENTS / max(sum(tensor.numel() for tensor in every), 1))
        generator = torch.Generator().manual_seed(0)
        values = []
        for tensor in every:
            flat = tensor.flatten()
            if share < 1:
                flat = flat[torch.randint(len(flat), (int(len(flat) * share),), generator=generator)]
            values.append(flat.clamp(min=0))
        return float(torch.quantile(torch.cat(values), quantile))

    def summary(self) -> dict[str, Any]:
        """Distribution of the held fractions R̄ over all weights of the prior."""
        return held_summary(lambda: (value for _, value in self.held()), "held fraction")


def _gate_gradients(
    inner: Optimizer, chunks: list[Chunk], operators: list[Operator], watch: Unheld
) -> Handle:
    def scale() -> None:
        for chunk, operator in zip(chunks, operators, strict=True):
            operator.reduce_([p.grad for p in chunk.parameters])

    return hook(
        inner,
        scale,
        needs_gradients="gate with on='gradient'",
        instead="give on='update'",
        first=watch.attach,
        chunks=chunks,
    )
