"""Plain sequential fine-tuning: the lower bound that every method must beat."""

from __future__ import annotations

from typing import Literal

from holdfast.config import Options
from holdfast.strategies.protocol import Strategy, register


class SequentialOptions(Options):
    """Nothing to choose."""

    name: Literal["sequential"] = "sequential"


@register
class Sequential(Strategy):
    """Each task is learned from where the last one ended, nothing protected (SeqLoRA of K, table I)."""

    name = "sequential"
    paper = "the usual lower bound"
    summary = "one task after another, nothing protected"
    Options = SequentialOptions
    sharded = True
