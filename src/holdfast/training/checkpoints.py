"""Checkpoints inside a task: a checkpoint counts only once its seal (sizes and digests) is on disk."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from holdfast.storage import sha256, write_json

SEAL = "seal.json"


def seal_checkpoint(folder: Path) -> None:
    """Write the digests of a checkpoint's files, the last thing written into it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL)
    write_json(folder / SEAL, {str(p.relative_to(folder)): sha256(p) for p in files})


def is_sound(folder: Path) -> bool:
    """Whether every file that the seal names is there and unchanged."""
    try:
        digests = json.loads((folder / SEAL).read_text())
    except (OSError, ValueError):
        return False
    return all(
        (folder / name).is_file() and sha256(folder / name) == digest for name, digest in digests.items()
    )


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest sound checkpoint in a folder; torn ones are deleted."""
    found = []
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match:
            found.append((int(match.group(1)), path))
    for _, path in sorted(found, reverse=True):
        if is_sound(path):
            return path
        shutil.rmtree(path, ignore_errors=True)
    return None
