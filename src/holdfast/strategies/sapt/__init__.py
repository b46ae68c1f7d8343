"""SAPT: the adapters of all tasks under one attention, with LoRA or with soft prompts."""

from holdfast.strategies.sapt.lora import SaptLora
from holdfast.strategies.sapt.prompt import SaptPrompt

__all__ = ["SaptLora", "SaptPrompt"]
