"""A run that dies in the middle: what stands for a kill, and where it comes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest


class Killed(BaseException):
    """Stands for a kill: nothing in the code under test may catch it."""


def dying(original: Callable[..., Any], call: int, calls: list[int] | None = None) -> Callable[..., Any]:
    """A function whose n-th call dies before it does anything; `calls` [0] counts all of them."""
    counted = [0] if calls is None else calls

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        counted[0] += 1
        if counted[0] == call:
            raise Killed
        return original(*args, **kwargs)

    return wrapped


def kill_when(monkeypatch: pytest.MonkeyPatch, target: str, call: int) -> None:
    """Make the n-th call of a module's function die before it does anything."""
    module, name = target.rsplit(".", 1)
    owner = importlib.import_module(module)
    monkeypatch.setattr(owner, name, dying(getattr(owner, name), call))
