"""A manifest: the digests of a folder's files, written last; what it vouches for is whole and unchanged."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from holdfast.storage import sha256, write_json


def write_manifest(folder: Path, name: str) -> None:
    """Write the digest of every file in a folder, subfolders included, as its file `name`.

    Raises
    ------
    StorageError
        The disk is full, or the folder can't be written.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / name)
    write_json(folder / name, {str(p.relative_to(folder)): sha256(p) for p in files})


def problem_of(folder: Path, name: str, only: Collection[str] | None = None) -> str | None:
    """Compare a folder with its manifest.

    Parameters
    ----------
    only : collection of str, optional
        Look at these files alone, which the manifest must name.

    Returns
    -------
    str or None
        What is wrong, to follow the folder in a sentence; None if all is as it was written.
        A manifest that names no file vouches for nothing.
    """
    try:
        digests = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return f"{name} is missing or torn"
    if not isinstance(digests, dict) or not digests or not all(isinstance(d, str) for d in digests.values()):
        return f"{name} is not a list of files with their digests"
    if only is not None:
        if missing := [file for file in only if file not in digests]:
            return f"{name} doesn't name {missing[0]}"
        digests = {file: digests[file] for file in only}
    for file, digest in digests.items():
        try:
            if not (folder / file).is_file():
                return f"{file} is missing"
            if sha256(folder / file) != digest:
                return f"{file} is torn or was changed (its digest differs)"
        except (OSError, ValueError) as error:  # unreadable, or a name that no file can have
            return f"{file!r} can't be read ({error})"
    return None
