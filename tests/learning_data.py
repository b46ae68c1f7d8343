"""Small data sets in the toy tokenizer's letters, and what is in a folder of skills."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

TOY = ("model.toy=true", "model.hidden=32", "model.layers=1")
SHORT = (
    "training.max_steps=6",
    "training.batch_size=8",
    "training.checkpoint_steps=2",
    "training.log_steps=2",
)


def mostly_slow(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Parameters of which only these are tried in the ordinary suite."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


def rows_of(name: str, count: int = 40) -> list[dict[str, Any]]:
    """Rows that copy a word, or turn it round, under the data set's own first word."""
    draw = random.Random(name)
    rows = []
    for _ in range(count):
        word = "".join(draw.choice("abcdefgh") for _ in range(4))
        rows.append({"prompt": f"{name[:3]} {word}: ", "completion": word[::-1] if name == "june" else word})
    return rows


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def data_sets(folder: Path, *names: str) -> None:
    """``may.jsonl`` and others."""
    for name in names:
        write_rows(folder / f"{name}.jsonl", rows_of(name))


def bytes_in(folder: Path) -> dict[str, bytes | None]:
    """Every file with its bytes, every folder with None."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))
    }


def weights_in(part: Path) -> dict[str, torch.Tensor]:
    return load_file(next((part / "model").glob("*.safetensors")))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def near(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of any weight."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of any tensor."""
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).norm() / one[n].norm().clamp(min=1e-12)) for n in one)
