"""What a run must record to be reproduced: versions, machine, git revision."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("holdfast", "torch", "transformers", "accelerate", "peft", "trl", "datasets", "safetensors")


def describe_environment(seed: int) -> dict[str, Any]:
    """Versions, threads, seed, command and, inside a git checkout, its revision."""
    import torch

    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "git": {"working_directory": _git(Path.cwd()), "holdfast": _git(Path(__file__).parent)},
        "seed": seed,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(folder: Path) -> str | None:
    """The revision of the checkout around a folder, with ``-dirty`` if tracked files were changed."""
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
