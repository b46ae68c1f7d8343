"""KIF (K): skill units, importance along the training, fusion; with LoRA, and with a memory."""

from holdfast.strategies.kif.kif import Kif  # registers the strategy that the presets are of

from holdfast.strategies.kif import presets  # isort: skip

__all__ = ["Kif", "presets"]
