"""Where a model or a data set is meant to be: on this machine, or on the Hugging Face hub."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator


def local_path(text: str | Path) -> Path:
    """The path that a text means, with ``~`` filled in where there is such a home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~nobody
        return Path(text)


def _expanded(text: str) -> str:
    return str(local_path(text))


def _absolute(text: str) -> str:
    path = local_path(text)
    return str(path.resolve()) if path.exists() else text


Output = Annotated[str, AfterValidator(_expanded)]  # a folder that is written, wherever it is read again
Input = Annotated[str, AfterValidator(_absolute)]  # what lies here, so that it is found from anywhere later


def is_local(text: str, suffixes: Collection[str] = ()) -> bool:
    """Whether a text is a path of this machine and not a hub id (``name`` or ``owner/name``).

    What is there is local, and so is what can't be an id: by its form, by one of the `suffixes`, or because
    it stands in a folder that is there.
    """
    path = local_path(text)
    try:
        if path.exists() or ("/" in text and path.parent.is_dir()):
            return True
    except OSError:  # too long, or in a folder that may not be looked into
        return True
    return (
        text.startswith((".", "/", "~"))
        or text.count("/") > 1
        or text.endswith("/")
        or "\\" in text
        or path.suffix.lower() in suffixes
    )


def near(path: Path) -> str:
    """A sentence that names what stands beside a path that is not there, if its name is close; or nothing."""
    try:
        names = [child.name for child in path.parent.iterdir()]
    except OSError:
        return f" There is no folder '{path.parent}' either."
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean '{path.with_name(close[0])}'?" if close and close[0] != path.name else ""
