"""Prompts: a run that is killed while they learn ends as one that never was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from holdfast.config import validate
from holdfast.runner import RunConfig, run
from holdfast.strategies.prompts.soft import SUBMODULE
from kills import Killed, kill_when


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "prog-prompt", "bottleneck": 16},
        {"name": "prog-prompt", "reparametrise": False},
        {"name": "l2p", "pool": 6, "chosen": 2},
    ],
    ids=["prog-prompt", "prog-prompt without a network", "l2p"],
)
def test_killed_inside_a_task_ends_bit_identical(
    strategy: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {
        "strategy": strategy,
        "training": {
            "max_steps": 6,
            "batch_size": 4,
            "learning_rate": 0.1,
            "checkpoint_steps": 2,
            "log_steps": 1,
        },
        "tasks": {"source": "toy", "order": ["copy", "flip"], "train_rows": 16, "test_rows": 4},
        "evaluation": {"zero_shot": False},
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(validate(RunConfig, tiny(whole, **sections), source="test"))
    with monkeypatch.context() as patch:
        kill_when(patch, "holdfast.training.bridge.completion_loss", 10)  # in the second task's fourth step
        with pytest.raises(Killed):
            run(validate(RunConfig, tiny(broken, **sections), source="test"))
    (checkpoint,) = (broken / "tasks").glob("02-*.partial/checkpoints/checkpoint-*")
    assert any(name.startswith(SUBMODULE) for name in load_file(checkpoint / "model.safetensors"))
    run(validate(RunConfig, tiny(broken, **sections), source="test"))
    for stage in ("01-copy", "02-flip"):
        a, b = whole / "tasks" / stage, broken / "tasks" / stage
        for file in ("strategy.safetensors", "model/model.safetensors"):
            mine, other = load_file(a / file), load_file(b / file)
            assert mine.keys() == other.keys()
            assert all(torch.equal(mine[name], other[name]) for name in mine)
        for file in ("strategy.json", "predictions/copy.jsonl", "predictions/flip.jsonl"):
            assert (a / file).read_text() == (b / file).read_text()
        losses = [json.loads((part / "training.json").read_text())["loss"] for part in (a, b)]
        assert losses[0] == losses[1]
        assert len(losses[0]) == 6
