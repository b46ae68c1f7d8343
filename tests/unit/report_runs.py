"""Synthetic run directories in the layout that the runner writes, for the report's tests."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from holdfast.evaluation.metrics import summarise
from holdfast.evaluation.predictions import file_safe, predictions_file
from holdfast.report.packed import unpack
from holdfast.storage import sha256

TASKS = ("copy", "reverse", "count", "lookup")
Matrix = list[list[float | None]]
MODULES = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


def stream_matrix(learned: float, kept: float, tasks: int = len(TASKS)) -> Matrix:
    """Every task is learned to `learned` and loses its distance from 4 % by the factor `kept` a stage."""
    rows: Matrix = [[4.0] * tasks]
    for stage in range(1, tasks + 1):
        row: list[float | None] = []
        for task in range(tasks):
            age = stage - 1 - task
            row.append(4.0 if age < 0 else round(4 + (learned - 4) * kept**age, 1))
        rows.append(row)
    return rows


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")


def write_prior(folder: Path, layers: int = 4, seed: int = 0, shared: float = 0.0, **meta: Any) -> None:
    """A prior; `shared` is the part of each value that is the same whatever the seed."""
    generator, common = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    tensors = {"model.embed_tokens.weight": torch.ones(3, 3)}
    for layer in range(layers):
        for m, module in enumerate(MODULES):
            scale = 10 ** (-2 + 0.25 * layer - 0.15 * ((m + seed) % 7))
            own, same = (torch.rand(8, 8, generator=g) for g in (generator, common))
            tensors[f"model.layers.{layer}.{module}.weight"] = scale * ((1 - shared) * own + shared * same)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "prior.safetensors")
    meta = {"importance": "lrp", "samples_used": 97, "samples_seen": 128, **meta}
    own = {"dtype": "float32", "elements": sum(t.numel() for t in tensors.values())}
    write_json(folder / "prior.json", {**meta, **own, "sha256": sha256(folder / "prior.safetensors")})


def lora_names(stacks: Sequence[str] = ("model.layers",), layers: int = 3, ranks: int = 2) -> list[str]:
    """Names of LoRA-tailored skill units on q and v."""
    return [
        f"{stack}.{layer}.self_attn.{x}_proj[{rank}]"
        for stack in stacks for layer in range(layers) for x in "qv" for rank in range(ranks)
    ]  # fmt: skip


def write_units(path: Path, names: Sequence[str], kind: str = "lora", seed: int = 0) -> Path:
    """Skill units of random importance in every stage of a run."""
    random_ = random.Random(seed)
    for i, folder in enumerate(sorted((path / "tasks").iterdir())):
        scores = [[1e-6 * random_.random() ** 4 for _ in names] for _ in range(2)]
        units = {"kind": kind, "names": list(names), "scores": scores[0]}
        write_json(folder / "units.json", {**units, "accumulated": scores[1] if i else None})
    return path


def write_run(
    path: Path,
    label: str,
    strategy: str = "sequential",
    *,
    matrix: Matrix | None = None,
    tasks: Sequence[str] = TASKS,
    seed: int = 0,
    finished: bool = True,
    artefacts: bool = True,
    protected: bool = False,
    prior_from: str = "sequential",
    shared: float = 0.0,
    seconds: float = 60.0,
    knows_task: bool = False,
    rehearses: bool = False,
) -> Path:
    """A run directory; without `artefacts` it holds metrics.json alone."""
    matrix = matrix if matrix is not None else stream_matrix(97, 0.5, len(tasks))
    write_json(
        path / "metrics.json",
        {
            "label": label,
            "strategy": strategy,
            "tasks": list(tasks),
            "matrix": matrix,
            **summarise(matrix),
            "seconds": {
                "train": 0.6 * seconds,
                "prior": 0.2 * seconds * protected,
                "evaluate": 0.15 * seconds,
                "total": seconds,
            },
            "parameters": 1_020_000,
            "trainable": 983_000,
            "seed": seed,
            "knows_task": knows_task,
            "rehearses": rehearses,
            "finished": finished,
        },
    )  # fmt: skip
    if not artefacts:
        return path
    options = f"strategy:\n  name: {strategy}\n  prior_from: {prior_from}\n"
    (path / "config.yaml").write_text(f"{options}seed: {seed}\ntraining:\n  lr: 1e-3\n")
    write_json(
        path / "environment.json", {"python": "3.11.9", "packages": {"torch": "2.9.0", "plotly": "6.0"}}
    )
    random_ = random.Random(seed)
    stages = ["joint"] if strategy == "multitask" else list(tasks)
    for i, stage in enumerate(stages, 1):
        if all(a is None for a in matrix[i]) and strategy != "multitask":
            break
        folder = path / "tasks" / f"{i:02d}-{file_safe(stage)}"
        loss = [[s, 3.2 * 0.94**s + 0.05 * random_.random()] for s in range(0, 80, 2)]
        write_json(folder / "training.json", {"loss": loss, "steps": 80, "seconds": 12.0})
        for t, task in enumerate(tasks[:i]):
            _write_predictions(predictions_file(folder, task), task, matrix[i][t])
        if protected:
            write_prior(folder / "prior", seed=i, shared=shared)
            if i > 1:
                _write_protection(folder / "protection.json")
    return path


def write_attribution(path: Path) -> Path:
    """The directory of one attribution with its faithfulness test."""
    write_prior(path)
    curves = {
        "importance": [98, 71, 40, 12, 3, 0],
        "magnitude": [98, 93, 82, 51, 18, 2],
        "random": [98, 98, 96, 90, 71, None],
    }
    write_json(
        path / "faithfulness.json", {"task": "copy", "percent": [0, 1, 2, 5, 10, 20], "curves": curves}
    )
    return path


def _write_predictions(path: Path, task: str, score: float | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    right = round(40 * (score or 0) / 100)
    with path.open("w", encoding="utf-8") as file:
        for i in range(40):
            word = "".join(chr(97 + (i * k) % 26) for k in range(3, 9))
            answer = word if i < right else word[::-1] + " 7"
            row = {
                "prompt": f"{task}: {word}",
                "expected": [word],
                "generated": answer,
                "score": 100.0 * (i < right),
            }
            file.write(json.dumps(row) + "\n")


def _write_protection(path: Path) -> None:
    counts = [int(600_000 * 0.5**k) + 40 for k in range(20)]
    summary = {
        "histogram": {"edges": [k / 20 for k in range(21)], "counts": counts},
        "held": 0.0021,
        "mechanism": {"name": "gate", "on": "update", "shape": "paper"},
        "control": "none",
    }
    write_json(path, summary)


def figures_of(html: str) -> dict[str, Any]:
    """The figures of a page by their keys."""
    found = re.search(r'id="figures" data-bytes="(\d+)">(.*?)</script>', html, re.DOTALL)
    assert found
    return json.loads(unpack(found[2], int(found[1])))
