"""Project: what is important does not move at all, what is not moves freely."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.config import Options, validate
from holdfast.errors import ConfigError
from holdfast.hold.attach import Chunk, Handle, held_summary, hook, reference_weights
from holdfast.hold.directions import Directions
from holdfast.hold.kept import Kept
from holdfast.hold.operator import Operator
from holdfast.hold.reference import watch_reference
from holdfast.hold.spectrum import Spectrum
from holdfast.hold.unheld import Unheld
from holdfast.importance.prior import ImportancePrior


class ProjectOptions(Options):
    """Hold the most important weights, or directions of a map's inputs, fully (GPM, Adam-NSCL)."""

    name: Literal["project"] = "project"
    share: float = Field(
        0.99, gt=0, le=1, description="held are the largest values that have this share of a tensor's sum"
    )
    on: Literal["update", "gradient"] = Field(
        "update", description="update: the weights' change since the task began; gradient: before each step"
    )


class Project:
    """A hold whose H is a projector: θ ← θ* + (1 − H) (θ − θ*) after each step, or g ← (1 − H) g before it.

    Parameters
    ----------
    prior : ImportancePrior or Directions
        By weight: held is a part of the weights. Of the kind ``inputs``: the leading eigenvectors of each
        map's C. Directions (OGD) are projectors as they are.
    share : float, optional
        Of the sum of a tensor's importances (of C's trace), how much the held coordinates have at least;
        default 0.99. Not for directions.
    on : {"update", "gradient"}
        ``update`` projects the weights' change since θ*, which is the same as projecting each step's, and
        corrects rounding errors as well. It holds with every optimizer, weight decay included. ``gradient``:
        once a step, after accumulation and clipping; the step itself is projected with plain SGD only.
    reference : mapping of str to Tensor, optional
        For ``update`` only: θ*, not to be changed while attached; copies of the weights at `attach` when
        omitted.
    """

    def __init__(
        self,
        prior: ImportancePrior | Directions,
        *,
        share: float | None = None,
        on: Literal["update", "gradient"] = "update",
        reference: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.prior = prior
        values = {"on": on} if share is None else {"share": share, "on": on}
        self.options = validate(ProjectOptions, values, "Project")
        if isinstance(prior, Directions) and share is not None:
            raise ConfigError("Project: `share` does nothing with directions, which are held as they are.")
        if reference is not None and on == "gradient":
            raise ConfigError(
                "Project: `reference` does nothing on the gradient, which returns to no weights; leave it "
                "out."
            )
        self.reference = reference

    @cached_property
    def _spectrum(self) -> Spectrum:
        assert isinstance(self.prior, ImportancePrior)
        return Spectrum.of(self.prior)

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Handle:
        """Project every step of this optimizer until the handle is removed.

        Raises
        ------
        PriorMismatchError
            Prior, directions or reference don't fit the model, or the optimizer holds none of the weights.
        """
        inner, chunks, operators = self._bound(model, optimizer)
        if not chunks:
            return Handle()
        update = self.options.on == "update"
        references = [reference_weights(chunk, self.reference, "project") for chunk in chunks if update]

        def take(more: list[Chunk]) -> None:
            held = dict(self.held())
            operators.extend(self._spectrum.operator(chunk, model, held) for chunk in more)
            references.extend(reference_weights(c, self.reference, "project") for c in more if update)

        first = None
        if isinstance(self.prior, ImportancePrior):
            first = Unheld("project", self.prior, model, inner, chunks, take).attach
        if self.options.on == "gradient":

            def project() -> None:
                for chunk, operator in zip(chunks, operators, strict=True):
                    moving = chunk.moving()
                    for p in chunk.parameters:
                        if p.grad is None:  # unused in this batch; the projection gives it a gradient
                            p.grad = torch.zeros_like(p)
                    operator.reduce_([p.grad for p in chunk.parameters])
                    for p, moves in zip(chunk.parameters, moving, strict=True):
                        if moves is None:
                            p.grad = None

            handle = hook(
                inner,
                project,
                needs_gradients="a projection with on='gradient'",
                instead="give on='update'",
                first=first,
                chunks=chunks,
            )
        else:

            def take_back() -> None:
                for chunk, operator, reference in zip(chunks, operators, references, strict=True):
                    operator.blend_(chunk.moving(), reference)

            handle = hook(inner, after=take_back, first=first, chunks=chunks)
            if isinstance(self.prior, ImportancePrior):
                handle.meter = self._spectrum.meter(chunks, operators, references)
            held = self.prior.tensors if isinstance(self.prior, ImportancePrior) else self.prior.directions
            kept = Kept("project", inner, held)
            handle.removers += [kept.end, watch_reference(kept, chunks, references)]
        return handle

    def _bound(self, model: nn.Module, optimizer: Optimizer) -> tuple[Optimizer, list[Chunk], list[Operator]]:
        if isinstance(self.prior, Directions):
            inner, chunks = self.prior.bind(model, optimizer)
            return inner, chunks, [self.prior.operator(chunk) for chunk in chunks]
        inner, chunks = self._spectrum.bind(model, optimizer)
        held = dict(self.held())
        return inner, chunks, [self._spectrum.operator(chunk, model, held) for chunk in chunks]

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical name, and 1 where a coordinate is held, 0 where it is free, of one tensor at a time."""
        for name, tensor in self._spectrum.values.items():
            values_N = tensor.clamp(min=0).flatten().double()
            sorted_N, order_N = values_N.sort(descending=True, stable=True)
            before_N = sorted_N.cumsum(0) - sorted_N  # what is held without this one
            enough_N = before_N < self.options.share * values_N.sum()
            held_N = torch.zeros_like(tensor).view(-1)
            held_N[order_N[enough_N & (sorted_N > 0)]] = 1.0
            yield name, held_N.view(tensor.shape)

    def summary(self) -> dict[str, Any]:
        """How many coordinates are held."""
        if isinstance(self.prior, Directions):
            return {"quantity": "directions", "held": len(self.prior)}
        return held_summary(lambda: (value for _, value in self.held()), "held")
