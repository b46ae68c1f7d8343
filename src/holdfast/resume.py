"""Half-done work on disk, with what it was begun with: a killed one goes on where it was, or starts over."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from holdfast.errors import StorageError
from holdfast.storage import write_tensors

State = tuple[dict[str, Tensor], dict[str, Any]]  # what there is so far: tensors, and JSON-able values


class Partial:
    """Keeps the state of one piece of work in ``<name>.safetensors``, one file, written whole or not at all.

    It is due every `every` seconds, or less often where saving takes more than a tenth of the time.

    Parameters
    ----------
    folder : Path
        Made at the first save; `clear` removes it with all that is in it.
    say : callable
        Told, in one line, what became of a state that was found, or that none can be saved.
    name : str
        Of the file: several pieces of work may share a folder.

    Attributes
    ----------
    identity : dict
        What the result depends on, JSON-able; a state with another one is not continued.
    seconds : float
        Time that went into the state that was continued.
    """

    every = 60.0

    def __init__(self, folder: Path, say: Callable[[str], None], name: str = "state") -> None:
        self.folder, self.file, self.say = folder, folder / f"{name}.safetensors", say
        self.identity: dict[str, Any] = {}
        self.seconds = 0.0
        self._started = time.monotonic()
        self._next = self._started + self.every

    def load(self) -> State | None:
        """The state of killed work of the same identity; None if there is none to go on from."""
        from safetensors import SafetensorError, safe_open

        if not self.file.is_file():
            return None
        try:
            with safe_open(self.file, "pt") as file:
                values = dict(json.loads(file.metadata()["values"]))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            theirs, seconds = dict(values.pop("identity")), float(values.pop("seconds"))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            self.say(f"{self.file}: torn ({error}); starting over.")
            return None
        every = {**self.identity, **theirs}  # a key that either lacks is a difference too
        changed = [key for key in every if theirs.get(key) != self.identity.get(key)]
        if changed:
            self.say(f"{self.file}: begun with another {', '.join(changed)}; starting over.")
            return None
        self.seconds = seconds
        return tensors, values

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() >= self._next

    def save(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Replace what is saved; a full disk is told, and stops no work."""
        now = time.monotonic()
        kept = {**values, "identity": self.identity, "seconds": self.seconds + now - self._started}
        try:
            write_tensors(self.file, tensors, {"values": json.dumps(kept)})
        except StorageError as error:
            self.say(f"Going on without saving, so this would start over after a kill: {error}")
            self._next = math.inf
            return
        took = time.monotonic() - now
        self._next = now + max(self.every, 10 * took)

    def clear(self) -> None:
        """Remove the folder: all is done."""
        shutil.rmtree(self.folder, ignore_errors=True)
