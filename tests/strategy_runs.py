"""Options under which each strategy is quick and acts at once on the tiny runs."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
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
    "kfac": {"fisher": {"samples": 8}},
    "inf-lora": {"samples": 8},
    "fisher-mask": {"fisher": {"samples": 8}},
    "replay": {"memory": {"count": 4}},
    "lamol": {"writing": {"tries": 1}},
    "lfpt5": {"tokens": 4, "writing": {"tries": 1}},
    "kpig": {"memory": {"count": 4}},
    "ssr": {"demonstrations": 4, "candidates": 8, "count": 8, "writing": {"tries": 1}},
    "sapt-lora": {"memory": {"count": 4}},
    "sapt-prompt": {"memory": {"count": 4}},
    "kif-m": {"memory": {"count": 4}},
    "kif-lora-m": {"memory": {"count": 4}},
    "ogd": {"samples": 4},
}
_A_LORA_A_TASK = {"importance": {"name": "inputs", "samples": 8}}
# a strategy under options with which it declares something else: name, options, and what differs
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "attribution, a LoRA a task": (
        "attribution",
        _A_LORA_A_TASK,
        {"state": "per task", "inference": "per task"},
    ),
    "attribution, LoRA into the weights": (
        "attribution",
        {**_A_LORA_A_TASK, "merge_lora": "weights"},
        {"state": "constant"},
    ),
}
# by name, what every strategy declares, and these variants
METHODS = dict(STRATEGIES) | {key: replace(STRATEGIES[n], **d) for key, (n, _, d) in VARIANTS.items()}


def options_of(name: str) -> dict[str, Any]:
    """The ``strategy:`` section."""
    if name in VARIANTS:
        return {"name": VARIANTS[name][0], **VARIANTS[name][1]}
    return {"name": name, **QUICK.get(name, {})}


@cache
def needs_lora(name: str) -> bool:
    """Whether the method refuses full fine-tuning, or is a variant for LoRA."""
    if name in VARIANTS:
        return True
    model, _ = load_model(ModelOptions(toy=True, hidden=32, layers=2), 0, toy_tokenizer)
    try:
        build_strategy(validate(STRATEGIES[name].Options, options_of(name), source="test")).check(model)
    except ConfigError as error:
        return "model.lora" in str(error)
    return False
