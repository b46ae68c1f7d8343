"""Options under which each strategy is quick and acts at once on the tiny runs."""

from __future__ import annotations

from typing import Any

from holdfast.config import validate
from holdfast.errors import ConfigError
from holdfast.models import ModelOptions, load_model
from holdfast.strategies import STRATEGIES, build_strategy
from holdfast.tasks import toy_tokenizer

FISHER = {"name": "fisher", "samples": 8}
# a strategy that isn't named here runs on its defaults
QUICK: dict[str, dict[str, Any]] = {
    "attribution": {"importance": FISHER},
    "ewc": {"fisher": {"samples": 8}},
    "ewc-lora": {"fisher": {"samples": 8}},
    "inf-lora": {"samples": 8},
    "fisher-mask": {"fisher": {"samples": 8}},
    "replay": {"memory": {"count": 4}},
    "lamol": {"writing": {"tries": 1}},
    "lfpt5": {"tokens": 4, "writing": {"tries": 1}},
    "kpig": {"memory": {"count": 4}},
    "ssr": {"demonstrations": 4, "candidates": 8, "writing": {"tries": 1}},
    "sapt-lora": {"memory": {"count": 4}},
    "sapt-prompt": {"memory": {"count": 4}},
    "kif-m": {"memory": {"count": 4}},
    "kif-lora-m": {"memory": {"count": 4}},
    "ogd": {"samples": 4},
}


def options_of(name: str) -> dict[str, Any]:
    """The ``strategy:`` section."""
    return {"name": name, **QUICK.get(name, {})}


def needs_lora(name: str) -> bool:
    """Whether the method refuses full fine-tuning."""
    model, _ = load_model(ModelOptions(toy=True, hidden=32, layers=2), 0, toy_tokenizer)
    try:
        build_strategy(validate(STRATEGIES[name].Options, options_of(name), source="test")).check(model)
    except ConfigError as error:
        return "model.lora" in str(error)
    return False
