"""Strategies: one paper in one file or one folder, found by importing everything in this folder."""

from __future__ import annotations

import importlib
import pkgutil
from functools import reduce
from operator import or_
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from holdfast.config import named
from holdfast.strategies.protocol import STRATEGIES, Context, Stage, Strategy, preset, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

_union: Any = reduce(or_, [cls.Options for cls in STRATEGIES.values()])
StrategyOptions = Annotated[_union, Field(discriminator="name"), BeforeValidator(named)]


def build_strategy(options: Any) -> Strategy:
    """The strategy that a validated ``strategy:`` section asks for."""
    return STRATEGIES[options.name](options)


__all__ = [
    "STRATEGIES",
    "Context",
    "Stage",
    "Strategy",
    "StrategyOptions",
    "build_strategy",
    "preset",
    "register",
]
