"""What one prior leaves out, rated by another: experts, embeddings, norms and biases beside inputs."""

from __future__ import annotations

from torch import nn

from holdfast.config import Options
from holdfast.importance.prior import BESIDE, ImportancePrior
from holdfast.importance.registry import REGISTRY


def left_to_rate(model: nn.Module, options: Options, maps: ImportancePrior) -> dict[str, nn.Parameter]:
    """Canonical name to parameter, of what is trained and an importance by weight rates, unlike `maps`."""
    rated = REGISTRY[options.name].rated(model)  # type: ignore[attr-defined]
    return {name: p for name, p in rated.items() if not maps.covers(name)}


def as_beside(prior: ImportancePrior) -> ImportancePrior:
    """A prior by weight that needs to say nothing of linear maps."""
    return ImportancePrior(prior.tensors, {**prior.meta, BESIDE: True})
