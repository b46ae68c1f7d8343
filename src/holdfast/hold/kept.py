"""What an attachment keeps in its optimizer's parameter groups, so that checkpoints have it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer

from holdfast.hold.zero import Steps

_KEYS: WeakKeyDictionary[Optimizer, set[str]] = WeakKeyDictionary()  # of those that are attached


class Kept:
    """State of one attachment: values in an optimizer's parameter groups, under a key of its own.

    Several may be on one optimizer, also on weights of the same names: their keys are numbered as they were
    attached, so a training that goes on must attach them in the same order.

    Parameters
    ----------
    whose : str
        Name of the mechanism.
    names : iterable of str
        Canonical names of all that it may hold, whether or not it is trained yet.
    """

    def __init__(self, whose: str, optimizer: Optimizer, names: Iterable[str]) -> None:
        self.whose, self.optimizer = whose, optimizer
        keys = _KEYS.setdefault(optimizer, set())
        stem = f"holdfast_{whose}_{digest(repr(list(names)).encode())[:8]}"
        self.key = next(key for number in count() if (key := f"{stem}_{number}") not in keys)
        keys.add(self.key)
        self._written: list[dict[str, Any]] | None = None

    def get(self, name: str, default: Any, group: int = 0) -> Any:
        """A value of a parameter group, as it was set or loaded."""
        return self.optimizer.param_groups[group].get(f"{self.key}.{name}", default)

    def set(self, name: str, value: Any, group: int = 0) -> None:
        """Values are not to be changed afterwards: an optimizer's state has them, not copies."""
        self._written = self.optimizer.param_groups
        self._written[group][f"{self.key}.{name}"] = value

    def take(self, name: str) -> Any:
        """A value that was loaded, which then goes; None where there is none."""
        return self.optimizer.param_groups[0].pop(f"{self.key}.{name}", None)

    def put_into(self, state: dict[str, Any], name: str, value: Any) -> None:
        """Add a value to a state dict alone."""
        state["param_groups"][0][f"{self.key}.{name}"] = value

    def end(self) -> None:
        """Give the key back. The values go, unless they were loaded since: the next training's are those."""
        _KEYS[self.optimizer].discard(self.key)
        if isinstance(self.optimizer, Steps):
            self.optimizer.drop(f"{self.key}.")
        elif self.optimizer.param_groups is self._written:  # to load replaces them
            for group in self.optimizer.param_groups:
                for key in [key for key in group if key.startswith(f"{self.key}.")]:
                    del group[key]


def digest(values: bytes) -> str:
    """Sixteen characters that tell values apart."""
    return hashlib.sha256(values).hexdigest()[:16]
