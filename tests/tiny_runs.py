"""Configurations of runs that take seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tiny_run(output: Path, **sections: Any) -> dict[str, Any]:
    """A run of seconds: a two-block toy Llama on three toy tasks."""
    return {
        "output": str(output),
        "seed": 0,
        "threads": 1,
        "model": {"toy": True, "hidden": 32, "layers": 2},
        "tasks": {"source": "toy", "order": ["copy", "flip", "head"], "train_rows": 32, "test_rows": 8},
        "training": {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "log_steps": 2},
        "strategy": {"name": "sequential"},
        **sections,
    }
