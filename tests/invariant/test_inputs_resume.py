"""A run that holds by inputs, killed and started again, ends as one that never was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from holdfast.config import validate
from holdfast.errors import ConfigError
from holdfast.runner import RunConfig, run
from kills import Killed, kill_when
from tiny_runs import tiny_run


def config_of(output: Path, directions: int | None = None, **mechanism: Any) -> RunConfig:
    importance = {"name": "inputs", "rank": directions}
    strategy = {"name": "attribution", "importance": importance, "mechanism": {"name": "anchor", **mechanism}}
    values = tiny_run(output, strategy=strategy)
    values["tasks"] = {**values["tasks"], "train_rows": 16, "test_rows": 2}
    values["training"] = {
        "max_steps": 6,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "checkpoint_steps": 3,
        "log_steps": 2,
    }
    return validate(RunConfig, values, source="test")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{stage.name} {name}": tensor
        for stage in sorted((folder / "tasks").iterdir())
        for name, tensor in load_file(stage / "model/model.safetensors").items()
    }


def moved(folder: Path) -> list[list[tuple[int, float]]]:
    return [json.loads(p.read_text())["moved"] for p in sorted(folder.glob("tasks/*/training.json"))]


KILLED = [11, 14, 17]  # in task 2 after its checkpoint; task 3 before and after it
VARIANTS = {"every 2": {"every": 2, "coordinates": "weights"}, "rank 3": {"directions": 3}}


@pytest.mark.parametrize(
    ("mechanism", "call"),
    [
        *(pytest.param({}, call, id=f"defaults-{call}") for call in KILLED),
        *(
            pytest.param(how, call, id=f"{name}-{call}", marks=() if call == 14 else pytest.mark.slow)
            for name, how in VARIANTS.items()
            for call in KILLED
        ),
    ],
)
def test_run_killed_in_training_ends_bit_identical(
    mechanism: Any, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config_of(tmp_path / "whole", **mechanism))
    with monkeypatch.context() as patch:
        kill_when(patch, "holdfast.training.bridge.completion_loss", call)
        with pytest.raises(Killed):
            run(config_of(tmp_path / "killed", **mechanism))
    run(config_of(tmp_path / "killed", **mechanism))
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert moved(tmp_path / "whole") == moved(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert all(torch.equal(tensor, killed[name]) for name, tensor in whole.items())


def test_a_folder_of_the_version_that_had_the_rank_in_the_mechanism_goes_on(tmp_path: Path) -> None:
    run(config_of(tmp_path))
    file = tmp_path / "config.yaml"
    assert file.read_text().count("    every: 1\n") == 1
    file.write_text(file.read_text().replace("    every: 1\n", "    every: 1\n    rank: null\n"))
    assert run(config_of(tmp_path))["finished"]
    with pytest.raises(ConfigError, match=r"`rank` is an option of the importance now.*importance\.rank=48"):
        validate(
            RunConfig,
            {**tiny_run(tmp_path), "strategy": {"name": "attribution", "mechanism": {"rank": 48}}},
            "x",
        )


def test_run_writes_its_defaults_how_much_it_held_and_how_far_old_outputs_moved(tmp_path: Path) -> None:
    run(config_of(tmp_path / "run"))
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "pull: 5.0" in config
    assert "coordinates: inputs" in config
    assert "merge: sum" in config
    found = [json.loads(p.read_text()) for p in sorted((tmp_path / "run").glob("tasks/*/protection.json"))]
    assert len(found) == 2
    first, *curves = moved(tmp_path / "run")
    assert first == []  # nothing is held in the first task
    for curve, held in zip(curves, found, strict=True):
        assert [step for step, _ in curve] == [2, 4, 6]
        assert curve[-1][1] == pytest.approx(100 * held["drift"]["total"] ** 0.5)
        assert held["quantity"] == "pull per step"
        assert held["not_held"] == []
        assert 0 < held["drift"]["total"] < 1
        assert all(value >= 0 for value in held["drift"]["maps"].values())


def test_maximum_of_matrices_is_refused_in_the_configuration(tmp_path: Path) -> None:
    values = tiny_run(tmp_path, strategy={"name": "attribution", "importance": "inputs", "merge": "max"})
    with pytest.raises(ConfigError, match=r"`merge: max` is for priors by weight"):
        validate(RunConfig, values, source="test")
    by_weight = {"name": "attribution", "importance": "lrp", "mechanism": {"coordinates": "inputs"}}
    with pytest.raises(ConfigError, match=r"coordinates 'inputs' need a prior of the kind 'inputs'"):
        validate(RunConfig, tiny_run(tmp_path, strategy=by_weight), source="test")
