"""Methods that train LoRA as such: blocks of ranks that grow with each task, and one LoRA for all of them."""

from holdfast.strategies.lora.c_lora import CLora
from holdfast.strategies.lora.ella import Ella
from holdfast.strategies.lora.ewc_lora import EwcLora
from holdfast.strategies.lora.inc_lora import IncLora
from holdfast.strategies.lora.inf_lora import InfLora
from holdfast.strategies.lora.moe import LoraMoe
from holdfast.strategies.lora.o_lora import OLora
from holdfast.strategies.lora.routed import LoraRouted
from holdfast.strategies.lora.slao import Slao

__all__ = ["CLora", "Ella", "EwcLora", "IncLora", "InfLora", "LoraMoe", "LoraRouted", "OLora", "Slao"]
