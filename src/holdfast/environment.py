"""What a run must record to be reproduced: versions, machine, git revision."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from holdfast.records import Environment
from holdfast.storage import as_utf8

PACKAGES = ("holdfast", "torch", "transformers", "accelerate", "peft", "trl", "datasets", "safetensors")


def describe_environment(seed: int) -> dict[str, Any]:
    """Versions, threads, seed, command and, inside a git checkout, its revision."""
    import torch

    return Environment(
        packages={name: _version(name) for name in PACKAGES},
        python=platform.python_version(),
        machine=platform.machine(),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        threads=torch.get_num_threads(),
        git={"working_directory": revision_of(Path.cwd()), "holdfast": revision_of(Path(__file__).parent)},
        seed=seed,
        command=[Path(sys.argv[0]).name, *map(as_utf8, sys.argv[1:])],
    ).model_dump(mode="json")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


_FILTERS = r"^filter\..*\.(clean|process|required)$"


def revision_of(folder: Path) -> str | None:
    """The revision of the checkout around a folder, with ``-dirty`` if tracked files were changed, and
    ``-unchecked`` if git can't tell.

    A repository's own configuration can name programs that git runs when it looks at the working tree. None
    of them is run: a user may stand in a folder that came from anywhere. Changes inside submodules don't
    count, as git would look at those under their own configuration.
    """
    revision = _git(folder, {}, "rev-parse", "--verify", "--quiet", "HEAD")
    filters = _git(folder, {}, "config", "--null", "--name-only", "--get-regexp", _FILTERS)
    if revision is None or filters is None:
        return revision
    harmless = {"core.fsmonitor": "false", "core.hooksPath": os.devnull}
    harmless |= {name: "" for name in filters.split("\0") if name}
    changed = _git(
        folder, harmless, "status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all"
    )
    if changed is None:
        return f"{revision}-unchecked"
    return f"{revision}-dirty" if changed else revision


def environment_recorded(file: Path) -> bool:
    """Whether a file tells of an environment; one that is missing or torn is written anew."""
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def _git(folder: Path, settings: Mapping[str, str], *arguments: str) -> str | None:
    """What git says, with `settings` above every configuration file; None if it fails or isn't there."""
    environment = {
        **os.environ,
        "GIT_CONFIG_COUNT": str(len(settings)),
        "GIT_NO_LAZY_FETCH": "1",  # objects that a partial clone lacks come through any program it names
        "GIT_ALLOW_PROTOCOL": "none",
        "GIT_OPTIONAL_LOCKS": "0",  # the index isn't written, so no hook hears of it
    }
    for i, (name, value) in enumerate(settings.items()):
        environment |= {f"GIT_CONFIG_KEY_{i}": name, f"GIT_CONFIG_VALUE_{i}": value}
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=False, env=environment
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    none_found = arguments[0] == "config" and done.returncode == 1
    return done.stdout.strip() if done.returncode == 0 or none_found else None
