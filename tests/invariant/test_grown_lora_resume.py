"""A run whose adapter grows, killed and started again, ends as one that never was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from holdfast.config import validate
from holdfast.runner import RunConfig, run
from kills import Killed, kill_when
from tiny_runs import tiny_run

INC, O = {"name": "inc-lora"}, {"name": "o-lora", "norm": 0.1}


def config_of(output: Path, strategy: Any) -> RunConfig:
    values = tiny_run(output, strategy=strategy)
    values["model"] = {"toy": True, "hidden": 16, "layers": 1, "lora": {"r": 2, "alpha": 0.1, "dropout": 0.1}}
    values["tasks"] = {**values["tasks"], "train_rows": 16, "test_rows": 2}
    values["training"] = {
        "max_steps": 6,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "checkpoint_steps": 3,
        "weight_decay": 0.1,
    }
    return validate(RunConfig, values, source="test")


def written(folder: Path) -> dict[str, Any]:
    """Every stage's weights, configuration of the adapter, record of the growth, and answers."""
    found: dict[str, Any] = {}
    for stage in sorted((folder / "tasks").iterdir()):
        found |= {
            f"{stage.name} {k}": t for k, t in load_file(stage / "model/adapter_model.safetensors").items()
        }
        for file in (
            "model/adapter_config.json",
            "adapters.json",
            "predictions/copy.jsonl",
            "predictions/head.jsonl",
        ):
            found[f"{stage.name} {file}"] = (stage / file).read_text()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What the run that is never killed writes; made once for each strategy."""
    made: dict[str, dict[str, Any]] = {}

    def make(strategy: dict[str, Any]) -> dict[str, Any]:
        if strategy["name"] not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            run(config_of(folder, strategy))
            made[strategy["name"]] = written(folder)
        return made[strategy["name"]]

    return make


@pytest.mark.parametrize(
    ("strategy", "function", "call"),
    [
        (INC, "holdfast.training.bridge.completion_loss", 12),  # in task 2, after its checkpoint
        (INC, "holdfast.learner.testing.evaluate_encoded", 9),  # task 2 trained, not committed
        (O, "holdfast.training.bridge.completion_loss", 14),  # in task 3, before its checkpoint
        (O, "holdfast.training.bridge.completion_loss", 17),  # in task 3, after it
    ],
    ids=["inc-lora, training", "inc-lora, evaluation", "o-lora, task begun", "o-lora, training"],
)
def test_growing_run_killed_at_any_point_ends_bit_identical(
    strategy: Any, function: str, call: int, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_when(patch, function, call)
        with pytest.raises(Killed):
            run(config_of(tmp_path / "broken", strategy))
    assert not (tmp_path / "broken" / "tasks" / "03-head").exists()
    run(config_of(tmp_path / "broken", strategy))
    expected, broken = whole(strategy), written(tmp_path / "broken")
    assert expected.keys() == broken.keys()
    for key, value in expected.items():
        same = torch.equal(value, broken[key]) if isinstance(value, torch.Tensor) else value == broken[key]
        assert same, key
