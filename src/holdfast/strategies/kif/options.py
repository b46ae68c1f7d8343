"""What can be chosen in KIF (K)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from holdfast.config import Options
from holdfast.errors import ConfigError
from holdfast.hold.cost import Cost, Estimate, trained_bytes
from holdfast.hold.fusion import FusionOptions, StaticFusionOptions
from holdfast.importance.prior import trained_parameters
from holdfast.importance.sample_squares import require_linear_maps
from holdfast.importance.sensitivity import SensitivityOptions, sensitivity_options
from holdfast.importance.skill_units import SkillUnit, lora_units, matrix_units
from holdfast.names import is_lora
from holdfast.tasks.memory import RowsOptions, sizes_before
from holdfast.tasks.task import TaskStream

Order = Annotated[SensitivityOptions, BeforeValidator(sensitivity_options)]


class KifOptions(Options):
    """Matrix-level units, first-order sensitivity, static fusion."""

    name: Literal["kif"] = "kif"
    units: Literal["matrix", "lora"] = Field("matrix", description="lora: one unit a rank, u = b a (eq. 3)")
    unit_score: Literal["product", "mean"] | None = Field(
        None, description="units: lora only. Mean over the entries of b a (default), or of b and a (eq. 6)"
    )
    sensitivity: Order = Field(default_factory=SensitivityOptions)
    beta: float = Field(0.7, ge=0, le=1, description="of the accumulated scores (eq. 13)")
    important: Annotated[float, Field(gt=0, lt=1)] | Literal["distribution"] | None = Field(
        None, description="which units are: this share of them (default 0.2), or what the distribution tells"
    )
    fusion: FusionOptions = Field(default_factory=StaticFusionOptions)
    averaged: Literal["factors", "product"] | None = Field(
        None, description="units: lora only. Fuse b and a each by themselves (default), or their product"
    )
    orthogonality: float = Field(0.0, ge=0, description="weight of eq. 5; needs LoRA")
    memory: RowsOptions | None = Field(None, description="replay these after each fusion (section V)")
    replay_epochs: float | None = Field(None, gt=0, description="default: those of the training")

    @model_validator(mode="after")
    def _only_what_applies(self) -> KifOptions:
        if self.units != "lora" and (self.unit_score is not None or self.averaged is not None):
            raise ValueError("`unit_score` and `averaged` apply to `units: lora` only")
        if self.memory is None and self.replay_epochs is not None:
            raise ValueError("`replay_epochs` applies with a `memory` only")
        if self.important is not None and self.fusion.name != "static" and self.memory is None:
            raise ValueError("`important` applies to `fusion: static` or with a `memory` only")
        return self


def check(options: KifOptions, model: nn.Module) -> None:
    """See that the model has the units, factors to keep apart, and gradients of single samples.

    Raises
    ------
    ConfigError
        It hasn't.
    """
    parameters = trained_parameters(model)
    if options.orthogonality > 0 and not any(is_lora(name) for name in parameters):
        raise ConfigError(
            "strategy.orthogonality: eq. 5 is about LoRA's factors; set model.lora, or leave it at 0."
        )
    units_of(options, parameters)
    if options.sensitivity.order == "second":
        require_linear_maps(model, parameters)


def estimate(options: KifOptions, model: nn.Module, stream: TaskStream) -> Estimate:
    """Sensitivity, the old weights that the new ones are fused with, and replays of what the memory has."""
    sensitivity = options.sensitivity
    values = 1 + sensitivity.smoothing + (sensitivity.order == "second")
    costs = [
        Cost("sensitivity (float32)", trained_bytes(model, each=4 * values)),
        Cost("the weights before each task", trained_bytes(model)),
    ]
    kept = [] if options.memory is None else sizes_before(options.memory, stream)
    return Estimate(costs, further=[(rows, options.replay_epochs) for rows in kept if rows])


def units_of(options: KifOptions, parameters: Mapping[str, Tensor]) -> list[SkillUnit]:
    """The model's skill units under these options."""
    return (lora_units if options.units == "lora" else matrix_units)(parameters)
