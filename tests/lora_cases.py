"""Small models with LoRA in double precision, and tasks learned by chance, for strategies that train LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from contexts import context_of, stage_of
from holdfast.config import validate
from holdfast.models import LoraOptions, add_lora, tiny_llama
from holdfast.models.adapters import lora_factors
from holdfast.strategies import STRATEGIES, Strategy, build_strategy
from holdfast.tasks import toy_suite, toy_tokenizer

TOKENIZER = toy_tokenizer()
STREAM = toy_suite(["copy", "flip", "head"], 12, 2)
R = 4


def strategy_of(name: str, **values: Any) -> Strategy:
    return build_strategy(validate(STRATEGIES[name].Options, {"name": name, **values}, "test"))


def lora_model(dtype: torch.dtype = torch.float64, r: int = R, alpha: float = 8.0, hidden: int = 16) -> Any:
    """alpha / r is not 1, so that a formula without it is wrong."""
    base = tiny_llama(TOKENIZER, hidden=hidden, layers=2, heads=2).to(dtype)
    return add_lora(base, LoraOptions(r=r, alpha=alpha)).eval()


def train_by_chance(model: Any, seed: int, size: float = 0.1) -> None:
    """Move all factors that are trained, as a training would."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factors in lora_factors(model):
            for p in factors:
                if p.requires_grad:
                    p.add_(size * torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p))


def learn(strategy: Strategy, model: Any, number: int, folder: Path, size: float = 0.1) -> None:
    """Begin a task of the stream, move all that is trained (earlier ranks too), and end it."""
    context, stage = context_of(model, folder), stage_of(STREAM, number)
    strategy.begin(context, stage)
    train_by_chance(model, number, size)
    strategy.end(context, stage)
