"""A run that is killed and started again ends as one that never was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from holdfast.config import validate
from holdfast.errors import RunDirectoryError
from holdfast.progress import Progress
from holdfast.runner import RunConfig, run
from holdfast.training.bridge import Bridge
from kills import Killed, dying, kill_when
from tiny_runs import tiny_run

FISHER = {
    "name": "attribution",
    "importance": {"name": "fisher", "samples": 8},
    "mechanism": {"name": "anchor", "strength": 100.0},
}


def config_of(values: dict[str, Any]) -> RunConfig:
    return validate(RunConfig, values, source="test")


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[Any], list[str]]:
    last = sorted((folder / "tasks").glob("03-*"))[0]
    metrics = json.loads((folder / "metrics.json").read_text())
    predictions = [p.read_text() for p in sorted(last.glob("predictions/*.jsonl"))]
    weights = next((last / "model").glob("*.safetensors"))
    return load_file(weights), metrics["matrix"], predictions


def logged(folder: Path) -> list[dict[str, Any]]:
    """What each stage logged of its training: losses, rates and old outputs' movement."""
    found = [json.loads(file.read_text()) for file in sorted((folder / "tasks").glob("*/training.json"))]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in found]


def assert_same_outcome(a: Path, b: Path) -> None:
    weights_a, matrix_a, predictions_a = outcome(a)
    weights_b, matrix_b, predictions_b = outcome(b)
    assert matrix_a == matrix_b
    assert predictions_a == predictions_b
    assert weights_a.keys() == weights_b.keys()
    for name, tensor in weights_a.items():
        assert torch.equal(tensor, weights_b[name]), name
    assert logged(a) == logged(b)


KILLED = {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "log_steps": 2, "checkpoint_steps": 3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run under FISHER that was never killed. To be read, not written."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(config_of(tiny_run(folder, strategy=FISHER, training=KILLED)))
    return folder


@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("holdfast.learner.testing.evaluate_encoded", 2),  # in the zero-shot row
        ("holdfast.training.bridge.completion_loss", 13),  # in task 2, after its first checkpoint
        ("holdfast.strategies.context.compute_prior", 2),  # task 2 trained, its prior not yet made
        ("holdfast.learner.testing.evaluate_encoded", 11),  # in the row of task 3
        ("os.rename", 3),  # everything written, not committed
    ],
)
def test_killed_run_ends_bit_identical(
    where: str, call: int, whole: Path, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = config_of(tiny(tmp_path / "broken", strategy=FISHER, training=KILLED))
    with monkeypatch.context() as patch:
        kill_when(patch, where, call)
        with pytest.raises(Killed):
            run(broken)
    assert not (tmp_path / "broken" / "tasks" / "03-head").exists()
    run(broken)
    assert_same_outcome(whole, tmp_path / "broken")


@pytest.mark.parametrize(("trainer", "step"), [("auto", 3), ("auto", 4), ("auto", 6), ("sft", 5)])
def test_losses_logged_are_the_same_whatever_step_a_run_was_killed_at(
    trainer: str, step: int, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logged at 3 and 6, saved at 2, 4 and 6; a step has two batches."""
    training = {"max_steps": 6, "batch_size": 4, "gradient_accumulation": 2, "trainer": trainer}
    training = {**training, "log_steps": 3, "checkpoint_steps": 2, "learning_rate": 3e-3}
    tasks = {"source": "toy", "order": ["copy"], "train_rows": 32, "test_rows": 2}
    sections = {"training": training, "tasks": tasks, "model": {"toy": True, "hidden": 16, "layers": 1}}
    run(config_of(tiny(tmp_path / "whole", **sections)))
    broken = config_of(tiny(tmp_path / "broken", **sections))
    with monkeypatch.context() as patch:
        patch.setattr(Bridge, "training_step", dying(Bridge.training_step, 2 * step))
        with pytest.raises(Killed):
            run(broken)
    run(broken)
    assert len(logged(tmp_path / "whole")[0]["loss"]) == 2
    assert logged(tmp_path / "whole") == logged(tmp_path / "broken")


@pytest.mark.parametrize("batch", [15, 25])  # of 24: killed in the training, and after it
def test_what_an_attempt_took_up_to_the_checkpoint_that_is_continued_counts(
    batch: int, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"max_steps": 24, "batch_size": 4, "checkpoint_steps": 8, "learning_rate": 3e-3}
    tasks = {"source": "toy", "order": ["copy"], "train_rows": 32, "test_rows": 2}
    sections = {"training": training, "tasks": tasks, "model": {"toy": True, "hidden": 16, "layers": 1}}
    config, step = config_of(tiny(tmp_path / "run", **sections)), Bridge.training_step

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.1)
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Bridge, "training_step", dying(slow, batch))
        if batch > 24:
            kill_when(patch, "holdfast.learner.learner.save_record", 1)
        with pytest.raises(Killed):
            run(config)
    began = time.perf_counter()
    run(config)
    took = time.perf_counter() - began
    (stage,) = (tmp_path / "run/tasks").iterdir()
    trained = json.loads((stage / "training.json").read_text())["seconds"]
    counted = json.loads((tmp_path / "run/metrics.json").read_text())["seconds"]["train"]
    slept = 0.8 if batch < 24 else 2.4
    assert slept < trained < counted
    assert counted - slept < took + 2


@pytest.mark.parametrize("strategy", ["sequential", "osf", "prog-prompt", "ema", "kif"])
def test_run_killed_after_a_training_that_ended_inside_an_epoch_trains_no_further(
    strategy: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps an epoch, six in all, at a rate that doesn't fall to zero."""
    training = {"max_steps": 6, "batch_size": 8, "learning_rate": 3e-3, "scheduler": "constant"}
    whole = config_of(tiny(tmp_path / "whole", strategy=strategy, training=training))
    broken = config_of(tiny(tmp_path / "broken", strategy=strategy, training=training))
    run(whole)
    with monkeypatch.context() as patch:
        kill_when(patch, "holdfast.learner.learner.save_record", 2)
        with pytest.raises(Killed):
            run(broken)
    run(broken)
    assert_same_outcome(tmp_path / "whole", tmp_path / "broken")
    steps = [
        json.loads((f / "tasks" / "02-flip" / "training.json").read_text())["steps"]
        for f in (tmp_path / "whole", tmp_path / "broken")
    ]
    assert steps == [6, 6]


@pytest.mark.parametrize(
    ("strategy", "call"),
    [
        ("kif-lora-m", 18),  # in the replay after task 2
        ({"name": "kif", "fusion": {"name": "online", "every": 2}}, 13),
        pytest.param("ema", 13, marks=pytest.mark.slow),
        ("lwf", 13),
        pytest.param({"name": "ewc", "variant": "separate"}, 13, marks=pytest.mark.slow),
        ({"name": "ewc", "variant": "online"}, 13),
        ({"strategy": "ewc", "replay": {"memory": {"sampling": "reservoir", "count": 9}}}, 13),
    ],
    ids=str,
)
def test_lora_with_dropout_killed_inside_a_task_ends_bit_identical(
    strategy: Any, call: int, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {
        **(strategy if "strategy" in strategy else {"strategy": strategy}),
        "model": {"toy": True, "hidden": 32, "layers": 2, "lora": {"r": 4, "dropout": 0.1}},
        "training": {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "checkpoint_steps": 3},
    }
    run(config_of(tiny(tmp_path / "whole", **sections)))
    broken = config_of(tiny(tmp_path / "broken", **sections))
    with monkeypatch.context() as patch:
        kill_when(patch, "holdfast.training.bridge.completion_loss", call)
        with pytest.raises(Killed):
            run(broken)
    assert list((tmp_path / "broken" / "tasks").glob("02-*.partial/checkpoints/checkpoint-*"))
    run(broken)
    assert_same_outcome(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
def test_kill_9_from_outside_ends_bit_identical(tiny: Any, tmp_path: Path) -> None:
    training = {"epochs": 6, "batch_size": 8, "learning_rate": 3e-3, "checkpoint_steps": 5}
    whole = tiny(tmp_path / "whole", strategy=FISHER, training=training)
    run(config_of(whole))
    file = tmp_path / "broken.yaml"
    file.write_text(yaml.safe_dump({**whole, "output": str(tmp_path / "broken")}))
    command = [sys.executable, "-m", "holdfast", "run", str(file)]
    kills = 0
    for _ in range(12):  # each attempt lives a little longer, so kills fall everywhere
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=9 + 1.5 * kills)
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    else:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert kills >= 1, "the run was too fast to be killed: this test showed nothing"
    assert_same_outcome(tmp_path / "whole", tmp_path / "broken")


def test_torn_file_is_named_and_its_stage_redone(whole: Path, tiny: Any, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "r")
    config = config_of(tiny(tmp_path / "r", strategy=FISHER, training=KILLED))
    before = outcome(tmp_path / "r")
    weights = next((tmp_path / "r" / "tasks" / "02-flip" / "model").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    said: list[str] = []
    progress = Progress(quiet=True)
    progress.say = said.append  # type: ignore[method-assign]
    run(config, progress)
    assert any("02-flip" in line and "torn" in line for line in said)
    after = outcome(tmp_path / "r")
    assert before[1] == after[1]
    assert all(torch.equal(t, after[0][n]) for n, t in before[0].items())


def test_torn_checkpoint_is_not_trusted(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "checkpoint_steps": 3}
    run(config_of(tiny(tmp_path / "whole", training=training)))
    broken = config_of(tiny(tmp_path / "broken", training=training))
    with monkeypatch.context() as patch:
        kill_when(patch, "holdfast.training.bridge.completion_loss", 15)
        with pytest.raises(Killed):
            run(broken)
    checkpoints = sorted((tmp_path / "broken" / "tasks").glob("02-*.partial/checkpoints/checkpoint-*"))
    optimizer = checkpoints[-1] / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-10])
    run(broken)
    assert_same_outcome(tmp_path / "whole", tmp_path / "broken")


def test_second_run_in_the_same_directory_is_refused(tiny: Any, tmp_path: Path) -> None:
    from holdfast.runner.directory import RunDirectory

    config = config_of(tiny(tmp_path / "r"))
    with (
        RunDirectory.open(config, {}),
        pytest.raises(RunDirectoryError, match=rf"another run is working here \(process {os.getpid()}\)"),
    ):
        run(config)


def test_other_configuration_in_the_same_directory_is_refused(tiny: Any, tmp_path: Path) -> None:
    run(config_of(tiny(tmp_path / "r")))
    with pytest.raises(RunDirectoryError, match=r"different: seed \(0 there, 1 here\)"):
        run(config_of(tiny(tmp_path / "r", seed=1)))


def test_foreign_folder_is_refused_and_untouched(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunDirectoryError, match="not empty and not a run directory"):
        run(config_of(tiny(tmp_path)))
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_finished_run_started_again_trains_nothing(tiny: Any, tmp_path: Path) -> None:
    config = config_of(tiny(tmp_path / "r"))
    first = run(config)
    started = time.perf_counter()
    assert run(config) == first
    assert time.perf_counter() - started < 5.0


def test_seeds_reproduce_and_differ(tiny: Any, tmp_path: Path) -> None:
    run(config_of(tiny(tmp_path / "a")))
    run(config_of(tiny(tmp_path / "b")))
    run(config_of(tiny(tmp_path / "c", seed=1)))
    assert_same_outcome(tmp_path / "a", tmp_path / "b")
    a, c = outcome(tmp_path / "a")[0], outcome(tmp_path / "c")[0]
    assert any(not torch.equal(a[name], c[name]) for name in a)
