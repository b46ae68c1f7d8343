"""Everything that is wrong with the data, collected so that a user sees it at once."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable

from holdfast.errors import DataError

SHOWN = 10


class RowFault(Exception):
    """What is wrong with a row; caught where the row's place is known."""


class NoColumn(RowFault):
    """A row lacks a column that it is asked for."""


class Problems:
    """A growing list of what is wrong and where, such as ``train.jsonl:17: empty completion``.

    Parameters
    ----------
    skip_rows : bool
        Whether bad rows are no problems.
    other_columns : str
        How to name the columns; said once, where rows lack one.
    leave_out : str
        How bad rows can be left out; said once, where there are some.
    """

    def __init__(self, *, skip_rows: bool = False, other_columns: str = "", leave_out: str = "") -> None:
        self.found: list[str] = []
        self.skipped: list[str] = []
        self._other_columns, self._lacking = other_columns, False
        self._leave_out, self._bad_rows = leave_out, False
        self._rows = self.skipped if skip_rows else self.found
        self._known: dict[str, str] = {}  # with its place, and without; a file of two splits is read twice

    def __len__(self) -> int:
        return len(self.found)

    def add(self, where: object, what: str) -> None:
        """Note one problem; `where` is a file with its line, or the name of a setting."""
        self._note(self.found, where, what)

    def add_row(self, where: object, what: object) -> None:
        """Note a bad row: a problem, or merely skipped if that was asked for."""
        lacking = isinstance(what, NoColumn)  # then all rows do: to leave them out would leave none
        self._lacking |= lacking
        self._bad_rows |= not lacking
        self._note(self._rows, where, what)

    def _note(self, problems: list[str], where: object, what: object) -> None:
        text = f"{where}: {what}"
        if text not in self._known:
            self._known[text] = str(what)
            problems.append(text)

    @property
    def told(self) -> list[str]:
        """Each problem at its first place, with how many more places have it."""
        first: dict[str, str] = {}
        for text in self.found:
            first.setdefault(self._known[text], text)
        places = Counter(self._known[text] for text in self.found)
        return [
            text if places[what] == 1 else f"{text} (and {places[what] - 1} more like it)"
            for what, text in first.items()
        ]

    @property
    def advice(self) -> list[str]:
        """What helps with some of the problems, whichever they are of."""
        said = ((self._lacking, self._other_columns), (self._bad_rows, self._leave_out))
        return [text for there, text in said if there and text]

    @property
    def left_out(self) -> list[str]:
        """That rows were skipped: how many, and one of them."""
        many = "1 bad row is" if len(self.skipped) == 1 else f"{len(self.skipped)} bad rows are"
        return [f"{many} left out, such as {self.skipped[0]}"] if self.skipped else []

    def raise_if_any(self) -> None:
        """Raise one error that counts all problems and shows the first of each kind.

        Raises
        ------
        DataError
            At least one problem was noted.
        """
        if not self.found:
            return
        told = self.told
        if len(told) == 1:
            raise DataError("\n".join([*told, *self.advice]))
        lines = [f"{len(self.found)} problems in the data:", *(f"  {line}" for line in told[:SHOWN])]
        if len(told) > SHOWN:
            lines.append(f"  ... and {len(told) - SHOWN} other kinds")
        raise DataError("\n".join([*lines, *self.advice]))


def did_you_mean(name: str | Iterable[str], allowed: Iterable[str]) -> str:
    """A sentence with the closest allowed value of each name, if there are any, and then all of them."""
    names = list(allowed)
    lower = {own.lower(): own for own in reversed(names)}
    given = [name] if isinstance(name, str) else name
    close = [near for each in given for near in difflib.get_close_matches(each.lower(), lower, n=1)]
    nearest = " and ".join(f"'{lower[near]}'" for near in dict.fromkeys(close))
    hint = f" Did you mean {nearest}?" if nearest else ""
    return f"{hint} Allowed: {', '.join(names) if names else '(none)'}."


def kind_of(value: object) -> str:
    """A value in words, with its beginning."""
    names = {bool: "a boolean", float: "a fraction", list: "a list", dict: "an object"}
    if value is None:
        return "nothing (null)"
    if isinstance(value, list | tuple) and not value:
        return "an empty list"
    return f"{names.get(type(value), type(value).__name__)} ({value!r:.40})"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
