"""What a model has said so far, call by call: a killed piece of work goes on behind it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from holdfast import world
from holdfast.storage import whole_lines

T = TypeVar("T")  # what JSON gives back as it was


class Transcript:
    """The results of calls in their order, a line of JSON each, appended as they come.

    Work that asks the same things in the same order, and has the same file, gets what was recorded without
    asking the model again, and then goes on. Of several processes rank 0 keeps the file, and all get what is
    in it.

    Parameters
    ----------
    file : Path or None
        Its name must say all that the results depend on. None keeps nothing.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        known = [] if file is None else world.first(lambda: whole_lines(file))
        self._known: Iterator[str] = iter(known)

    def __call__(self, ask: Callable[[], T]) -> T:
        """The next result: the recorded one, or what `ask` gives now."""
        line = next(self._known, None)
        if line is not None:
            known: T = json.loads(line)
            return known
        result = ask()
        if self._file is not None and world.leads():
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(result) + "\n")
        return result
