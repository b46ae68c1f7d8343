"""The importances by name: each registers its options and its computation with one decorator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from holdfast.attribution.engine import AttributionReport
from holdfast.config import Options
from holdfast.importance.prior import Kind, trained_parameters
from holdfast.models import block_parameters
from holdfast.resume import Partial
from holdfast.tasks.encode import Encoded

Progress = Callable[[int, int], None]
OptionsT = TypeVar("OptionsT", bound=Options)


@dataclass(frozen=True)
class Inputs:
    """What an importance is computed from.

    Attributes
    ----------
    rows : sequence of Encoded
        Encoded examples of the task; those that look at weights only ignore them.
    parameters : mapping of str to Parameter
        The weights to rate, by canonical name.
    pad_id : int
        Token id that fills up the batches.
    seed : int
        Chooses the samples, and the values of `random`.
    progress : callable, optional
        Called with (samples done, samples in all).
    partial : Partial, optional
        Where a computation over many samples may keep its state, to go on from after a kill.
    """

    model: nn.Module
    rows: Sequence[Encoded]
    parameters: Mapping[str, nn.Parameter]
    pad_id: int
    seed: int = 0
    progress: Progress | None = None
    partial: Partial | None = None


@dataclass(frozen=True)
class Computed:
    """An importance for each weight, and what `prior.json` should say about it."""

    tensors: dict[str, Tensor]
    record: dict[str, Any] = field(default_factory=lambda: {"samples_seen": 0, "samples_used": 0})


def sample_counts(report: AttributionReport) -> dict[str, Any]:
    """The part of a prior's record that every importance with data has."""
    return {
        "samples_seen": report.samples_seen,
        "samples_used": report.samples_used,
        "unreached": list(report.unreached),
        **({"one_at_a_time": report.one_at_a_time} if report.one_at_a_time else {}),
    }


@dataclass(frozen=True)
class Importance:
    """A registered importance."""

    options: type[Options]
    compute: Callable[[Inputs, Any], Computed]
    needs_data: bool
    kind: Kind
    every_weight: bool

    def rated(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Canonical name to parameter, of what it rates by default: all that is trained, as far as it can."""
        maps = block_parameters(model)
        return {**maps, **trained_parameters(model)} if self.every_weight else maps


REGISTRY: dict[str, Importance] = {}


def register(
    options: type[OptionsT], *, needs_data: bool, kind: Kind = "weights", every_weight: bool = True
) -> Callable[[Callable[[Inputs, OptionsT], Computed]], Callable[[Inputs, OptionsT], Computed]]:
    """Register a computation under the `name` of its options model.

    Parameters
    ----------
    every_weight : bool
        Whether it rates any weight at all (embeddings, norms), not those of linear maps alone.
    """

    def decorator(
        compute: Callable[[Inputs, OptionsT], Computed],
    ) -> Callable[[Inputs, OptionsT], Computed]:
        REGISTRY[options.model_fields["name"].default] = Importance(
            options, compute, needs_data, kind, every_weight
        )
        return compute

    return decorator
