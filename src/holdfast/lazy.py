"""Imports put off until something is used, so that a command is as quick as what it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def later(package: str, home: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__`` (PEP 562): what it exports, and its modules, are imported when asked for.

    Parameters
    ----------
    package : str
        Its ``__name__``.
    home : mapping of str to str
        Of each exported name the module that has it.
    """

    def found(name: str) -> Any:
        if name in home:
            return getattr(import_module(home[name]), name)
        if find_spec(f"{package}.{name}") is not None:  # holdfast.hold.tell_total_rate, as messages have it
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module '{package}' has no attribute '{name}'")

    return found
