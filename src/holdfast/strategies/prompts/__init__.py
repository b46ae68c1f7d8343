"""Soft prompts in front of a frozen model, and the methods that train them."""

from holdfast.strategies.prompts.l2p import L2p
from holdfast.strategies.prompts.prog_prompt import ProgPrompt

__all__ = ["L2p", "ProgPrompt"]
