"""base: the floor of every table makes no step, in any loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from holdfast import Learner
from holdfast.config import validate
from holdfast.models import tiny_llama
from holdfast.runner import RunConfig, run
from holdfast.runner.findings import check
from holdfast.tasks import toy_tokenizer
from kills import Killed, kill_when
from tiny_runs import tiny_run

TOKENIZER = toy_tokenizer()


def config_of(output: Path, strategy: str = "base") -> RunConfig:
    return validate(RunConfig, tiny_run(output, strategy=strategy), "test")


def test_base_leaves_every_weight_and_every_answer_as_it_was(tmp_path: Path) -> None:
    metrics = run(config_of(tmp_path / "run"))
    stages = sorted((tmp_path / "run" / "tasks").iterdir())
    weights = [load_file(stage / "model" / "model.safetensors") for stage in stages]
    start = tiny_llama(TOKENIZER, 0, 32, 2).state_dict()
    for after in weights:
        assert all(torch.equal(after[name], start[name]) for name in after)
    assert all(row == metrics["matrix"][0] for row in metrics["matrix"])
    assert metrics["bwt"] == 0
    for stage in stages:
        record = json.loads((stage / "training.json").read_text())
        assert (record["steps"], record["trained"], record["loss"]) == (0, 0, [])


def test_base_killed_between_stages_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(config_of(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        kill_when(patch, "holdfast.learner.testing.evaluate_encoded", 8)  # in the second stage's tests
        with pytest.raises(Killed):
            run(config_of(tmp_path / "broken"))
    assert run(config_of(tmp_path / "broken"))["matrix"] == whole["matrix"]


def test_check_counts_no_steps_and_no_trained_numbers(tmp_path: Path) -> None:
    estimate = dict(check(config_of(tmp_path / "run")).estimate)
    assert "(0 trained)" in estimate["parameters"]
    assert estimate["optimizer steps"] == "0 (0, 0, 0 by stage)"
    assert dict(check(config_of(tmp_path / "run", "sequential")).estimate)["optimizer steps"].startswith(
        "24 "
    )


def test_a_loop_of_ones_own_finds_nothing_to_train_and_may_be_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": "copy ab", "completion": "ab"}]
    learner: Any = Learner(
        tiny_llama(TOKENIZER, hidden=16, layers=1), TOKENIZER, "base", folder=tmp_path / "s"
    )
    with learner.task("june", rows, rows) as stage:
        assert not [p for p in learner.model.parameters() if p.requires_grad]
        with pytest.raises(ValueError, match="empty parameter list"):
            torch.optim.SGD([p for p in learner.model.parameters() if p.requires_grad], lr=1.0)
        assert stage.record.steps == 0
    assert learner.learned == ["june"]
