"""Hold: how what matters is held while the next task is learned.

Every hold is one line, θ ← θ* + (1 − H) Δ. Operators say what H is (`elementwise`, `inputs`, `mask`,
`directions`), mechanisms what Δ is and when the line is written (`anchor`, `gate`, `penalty`, `project`,
`fusion`), controls give the same amount of hold to something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Union

from pydantic import BeforeValidator, Field
from torch import Tensor

from holdfast.config import Options, named, validate
from holdfast.errors import ConfigError
from holdfast.hold.anchor import Anchor, AnchorOptions
from holdfast.hold.attach import Handle, Protection
from holdfast.hold.control import Control, apply_control
from holdfast.hold.directions import Directions
from holdfast.hold.elementwise import Elementwise
from holdfast.hold.gate import Gate, GateOptions
from holdfast.hold.inputs import Inputs
from holdfast.hold.mask import Mask
from holdfast.hold.penalty import Penalty, PenaltyOptions
from holdfast.hold.project import Project, ProjectOptions
from holdfast.hold.schedule import tell_total_rate
from holdfast.importance.prior import ImportancePrior

MECHANISMS: dict[str, tuple[type[Options], type]] = {
    "gate": (GateOptions, Gate),
    "anchor": (AnchorOptions, Anchor),
    "penalty": (PenaltyOptions, Penalty),
    "project": (ProjectOptions, Project),
}


OPERATORS: dict[str, type] = {
    "elementwise": Elementwise,
    "inputs": Inputs,
    "mask": Mask,
    "directions": Directions,
}

MechanismOptions: Any = Annotated[
    Union[tuple(options for options, _ in MECHANISMS.values())],  # noqa: UP007 - built from the table
    Field(discriminator="name"),
    BeforeValidator(named),
]


def mechanism_options(mechanism: Any, source: str = "mechanism", **values: Any) -> Any:
    """The options model of a mechanism, from its name and keyword arguments, or a mapping with both.

    Raises
    ------
    ConfigError
        No such mechanism, or an option that it doesn't have; the message lists what is allowed.
    """
    if isinstance(mechanism, Options) and not values:
        return mechanism
    if isinstance(mechanism, Mapping):
        values = {**mechanism, **values}
        mechanism = values.pop("name", None)
    if mechanism not in MECHANISMS:
        raise ConfigError(f"{source}: no mechanism {mechanism!r}. Allowed: {', '.join(MECHANISMS)}.")
    return validate(MECHANISMS[mechanism][0], {"name": mechanism, **values}, source)


def returns(options: GateOptions | AnchorOptions | PenaltyOptions | ProjectOptions) -> bool:
    """Whether a mechanism goes back to weights: not a gate, nor where gradients are projected."""
    return not isinstance(options, GateOptions) and getattr(options, "on", "update") == "update"


def build_mechanism(
    options: GateOptions | AnchorOptions | PenaltyOptions | ProjectOptions,
    prior: ImportancePrior,
    reference: Mapping[str, Tensor] | None = None,
) -> Protection:
    """Make the mechanism that the options describe.

    Parameters
    ----------
    prior : ImportancePrior
        One that `apply_control` has been through, if a control is wanted.
    reference : mapping of str to Tensor, optional
        Weights to pull towards, by canonical name; a mechanism that `returns` to none takes no notice.
    """
    values = options.model_dump(exclude={"name"})
    if isinstance(options, GateOptions):
        return Gate(prior, **values)
    reference = reference if returns(options) else None
    return MECHANISMS[options.name][1](prior, reference=reference, **values)


__all__ = [
    "MECHANISMS",
    "OPERATORS",
    "Anchor",
    "AnchorOptions",
    "Control",
    "Directions",
    "Gate",
    "GateOptions",
    "Handle",
    "MechanismOptions",
    "Penalty",
    "PenaltyOptions",
    "Project",
    "ProjectOptions",
    "Protection",
    "apply_control",
    "build_mechanism",
    "mechanism_options",
    "tell_total_rate",
]
