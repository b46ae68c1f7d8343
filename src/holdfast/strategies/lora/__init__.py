"""A LoRA that grows by a block of ranks with each task, and the methods that train it."""

from holdfast.strategies.lora.inc_lora import IncLora
from holdfast.strategies.lora.o_lora import OLora

__all__ = ["IncLora", "OLora"]
