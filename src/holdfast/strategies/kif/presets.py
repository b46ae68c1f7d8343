"""KIFLoRA, KIF-M and KIFLoRA-M: KIF with other defaults (K, section VI-A3)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from holdfast.hold.fusion import AdaptiveFusionOptions, FusionOptions
from holdfast.importance.sensitivity import SensitivityOptions
from holdfast.strategies.kif.options import KifOptions, Order
from holdfast.strategies.protocol import preset
from holdfast.tasks.memory import MemoryOptions, RowsOptions


class KifLoraOptions(KifOptions):
    """LoRA-tailored units, second-order sensitivity, adaptive fusion."""

    name: Literal["kif-lora"] = "kif-lora"  # type: ignore[assignment]
    units: Literal["matrix", "lora"] = "lora"
    sensitivity: Order = Field(default_factory=lambda: SensitivityOptions(order="second"))
    fusion: FusionOptions = Field(default_factory=AdaptiveFusionOptions)


class KifMOptions(KifOptions):
    """KIF with a memory of 2 %."""

    name: Literal["kif-m"] = "kif-m"  # type: ignore[assignment]
    memory: RowsOptions | None = Field(default_factory=MemoryOptions)


class KifLoraMOptions(KifLoraOptions):
    """KIFLoRA with a memory of 2 %."""

    name: Literal["kif-lora-m"] = "kif-lora-m"  # type: ignore[assignment]
    memory: RowsOptions | None = Field(default_factory=MemoryOptions)


preset(
    "kif",
    name="kif-lora",
    Options=KifLoraOptions,
    summary="KIF by ranks of LoRA: second-order importance, adaptive fusion",
)
preset(
    "kif",
    name="kif-m",
    Options=KifMOptions,
    summary="KIF, then a replay of a small memory with the new task's units held",
    rehearsal_free=False,
    state="per task",
)
preset(
    "kif",
    name="kif-lora-m",
    Options=KifLoraMOptions,
    summary="KIFLoRA, then a replay of a small memory with the new task's units held",
    rehearsal_free=False,
    state="per task",
)
