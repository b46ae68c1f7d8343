"""A run that gets more tasks behind those of its order ends as one that had them from the start."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.config import validate
from holdfast.errors import RunDirectoryError
from holdfast.learner import Learner
from holdfast.learner.skills import read_skills, undo
from holdfast.progress import Progress
from holdfast.records import HarnessAnswers, RunMetrics
from holdfast.report import write_report
from holdfast.runner import RunConfig, run
from holdfast.runner.learn import learn_data
from holdfast.runner.table import metrics_table
from holdfast.tasks import Example
from kills import Killed, kill_when
from learning_data import bytes_in, same, weights_in
from strategy_runs import options_of
from tiny_runs import tiny_run

LONG = ["copy", "flip", "head"]
Make = Callable[..., RunConfig]


def config_of(output: Path, order: list[str], strategy: Any = "sequential", **evaluation: Any) -> RunConfig:
    values = tiny_run(output, strategy=strategy, evaluation=evaluation)
    values["model"]["layers"] = 1
    values["training"] = {"max_steps": 4, "batch_size": 8, "learning_rate": 3e-3}
    values["tasks"] = {"source": "toy", "order": order, "train_rows": 24, "test_rows": 4}
    return validate(RunConfig, values, source="test")


def metrics_in(folder: Path) -> dict[str, Any]:
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["seconds"]
    return metrics


def values_in(part: Path) -> dict[str, Any]:
    values = json.loads((part / "strategy.json").read_text())
    values.pop("seconds", None)
    return values


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, what the strategy keeps, the matrix and the metrics; each asked answer, wherever it stands."""
    assert metrics_in(a) == metrics_in(b)
    parts = sorted(p.name for p in (a / "tasks").iterdir())
    assert parts == sorted(p.name for p in (b / "tasks").iterdir())
    for name in parts:
        ours, whole = a / "tasks" / name, b / "tasks" / name
        assert same(weights_in(ours), weights_in(whole)), name
        assert values_in(ours) == values_in(whole)
        states = [f / "strategy.safetensors" for f in (ours, whole)]
        assert states[0].exists() == states[1].exists()
        assert not states[0].exists() or states[0].read_bytes() == states[1].read_bytes()


@pytest.mark.parametrize(
    ("strategy", "scope"),
    [
        ("ewc", "needed"),
        ("l2p", "all"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (
                ("ewc", "all"),
                ("l2p", "needed"),
                ("kif-m", "all"),
                ("kif-m", "needed"),
                ("sequential", "all"),
                ("sequential", "needed"),
            )
        ),
    ],
)
def test_run_extended_task_by_task_equals_one_that_had_them_from_the_start(
    strategy: str, scope: str, tmp_path: Path
) -> None:
    options = options_of(strategy)
    whole = run(config_of(tmp_path / "whole", LONG, options, scope=scope))
    for tasks in (1, 2, 3):
        last = run(config_of(tmp_path / "grown", LONG[:tasks], options, scope=scope))
        assert last["finished"]
        assert last["tasks"] == LONG[:tasks]
    assert last["matrix"] == whole["matrix"]
    assert_same_run(tmp_path / "grown", tmp_path / "whole")


def test_run_that_never_asked_before_training_is_extended_too(tmp_path: Path) -> None:
    for name, steps in (("whole", [LONG]), ("grown", [LONG[:1], LONG])):
        for order in steps:
            run(config_of(tmp_path / name, order, zero_shot=False))
    assert metrics_in(tmp_path / "grown")["matrix"][0] == [None] * 3
    assert_same_run(tmp_path / "grown", tmp_path / "whole")


@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("holdfast.learner.testing.evaluate_encoded", 2),  # asking earlier models about the new task
        pytest.param("holdfast.training.bridge.completion_loss", 3, marks=pytest.mark.slow),  # learning it
        pytest.param("os.rename", 2, marks=pytest.mark.slow),
    ],
)
def test_extension_that_is_killed_ends_the_same(
    where: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config_of(tmp_path / "whole", LONG, options_of("ewc")))
    run(config_of(tmp_path / "grown", LONG[:2], options_of("ewc")))
    longer = config_of(tmp_path / "grown", LONG, options_of("ewc"))
    with monkeypatch.context() as patch:
        kill_when(patch, where, call)
        with pytest.raises(Killed):
            run(longer)
    run(longer)
    assert_same_run(tmp_path / "grown", tmp_path / "whole")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two tasks. To be copied."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    run(config_of(folder, LONG[:2]))
    return folder


@pytest.mark.parametrize(
    "order", [["flip", "copy", "head"], ["copy", "head", "flip"], ["head", "copy", "flip"], ["copy"]]
)
def test_order_that_does_not_begin_with_the_one_there_is_refused_and_nothing_written(
    order: list[str], begun: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(begun, tmp_path / "run")
    before = bytes_in(folder)
    with pytest.raises(RunDirectoryError, match=r"tasks\.order.*A longer tasks\.order that begins with"):
        run(config_of(folder, order))
    assert bytes_in(folder) == before


def test_longer_order_with_another_difference_is_refused_for_that(begun: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(begun, tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=r"different: strategy\."):
        run(config_of(folder, LONG, "freeze"))


@pytest.mark.parametrize("strategy", ["multitask", {"name": "osf", "schedule": "growing"}], ids=str)
def test_strategy_that_must_know_the_number_of_tasks_is_not_extended(strategy: Any, tmp_path: Path) -> None:
    run(config_of(tmp_path / "run", LONG[:2], strategy))
    before = bytes_in(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=r"different: tasks\.order"):
        run(config_of(tmp_path / "run", LONG, strategy))
    assert bytes_in(tmp_path / "run") == before


def test_task_that_comes_twice_is_learned_again_and_counts_once_wherever_it_is_told(tmp_path: Path) -> None:
    order = ["copy", "flip", "copy"]
    whole = run(config_of(tmp_path / "whole", order, options_of("ewc")))
    final, flip = whole["matrix"][-1], whole["matrix"][2][1]
    assert whole["same_as"] == {"copy (2)": "copy"}
    assert (whole["ap"], whole["bwt"]) == ((final[1] + final[2]) / 2, final[1] - flip)
    told = read_skills(tmp_path / "whole").record()
    assert {key: told[key] for key in ("ap", "bwt")} == {key: whole[key] for key in ("ap", "bwt")}
    assert "counts once" in (
        metrics_table([RunMetrics.read(tmp_path / "whole" / "metrics.json")]).caption or ""
    )
    assert "counts once" in write_report([tmp_path / "whole"], tmp_path / "r.html").read_text(
        encoding="utf-8"
    )
    run(config_of(tmp_path / "grown", order[:2], options_of("ewc")))
    run(config_of(tmp_path / "grown", order, options_of("ewc")))
    assert len(whole["tasks"]) == 3
    assert_same_run(tmp_path / "grown", tmp_path / "whole")


def test_run_where_learn_added_a_task_says_so(tiny: Any, tmp_path: Path) -> None:
    config = validate(RunConfig, tiny(tmp_path / "r", strategy="sequential"), "test")
    run(config)
    with Learner.load(tmp_path / "r") as learner, learner.task("more", train=[Example("a", "b")]) as task:
        task.train()
    with pytest.raises(RunDirectoryError, match=r"more was learned here than .* has \(more\)"):
        run(config)


def folders_of(tmp_path: Path) -> RunConfig:
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for split, count in (("train", 6), ("test", 2)):
            rows = [{"prompt": f"{name}{split}{i}=", "completion": name} for i in range(count)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / "data" / name / f"{split}.jsonl").write_text(text)
    values = tiny_run(tmp_path / "run", strategy="sequential")
    values["model"]["layers"] = 1
    values["training"] = {"max_steps": 2, "batch_size": 4}
    values["tasks"] = {"source": "jsonl", "path": str(tmp_path / "data")}
    return validate(RunConfig, values, source="test")


@pytest.mark.parametrize("lost", ["deleted", "changed"])
def test_lost_zero_shot_answers_are_asked_again_and_no_task_is_trained_again(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = folders_of(tmp_path)
    run(config)
    before = bytes_in(tmp_path / "run")
    if lost == "deleted":
        shutil.rmtree(tmp_path / "run/zero_shot")
    else:
        next((tmp_path / "run/zero_shot/predictions").iterdir()).write_text("{}")
    (tmp_path / "run/metrics.json").unlink()
    module: Any = importlib.import_module("holdfast.learner.learning")
    monkeypatch.setattr(module, "train", None)  # who trains, fails
    run(config)
    after = bytes_in(tmp_path / "run")
    assert after.keys() == before.keys()
    told = {
        "metrics.json",
        "zero_shot/metrics.json",
        "zero_shot/manifest.json",
        "environment.json",
    }  # seconds
    assert {name for name in after if after[name] != before[name]} <= told


def test_test_rows_of_a_later_task_that_changed_are_told_before_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = folders_of(tmp_path)
    with monkeypatch.context() as patch:
        kill_when(patch, "holdfast.learner.learning.train", 2)
        with pytest.raises(Killed):
            run(config)
    file = tmp_path / "data/b/test.jsonl"
    rows = file.read_text()
    file.write_text(rows.replace("btest0", "btest7"))
    with pytest.raises(RunDirectoryError, match=r"was asked other test rows of b than there are now"):
        run(config)
    file.write_text(rows)
    assert run(config)["finished"]


def test_learning_goes_on_in_the_folder_of_a_run_and_its_tasks_are_asked_again(tmp_path: Path) -> None:
    config = folders_of(tmp_path)
    run(config)
    rows = [json.loads(line) for line in (tmp_path / "data/a/test.jsonl").read_text().splitlines()]
    more = [*rows, *({"prompt": f"c{i}=", "completion": "c"} for i in range(12))]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    with Progress(quiet=True) as progress:
        known = learn_data(tmp_path / "c.jsonl", tmp_path / "run", progress=progress)
    assert [skill.name for skill in known.skills] == ["a", "b", "c"]
    assert None not in [*known.matrix[-1], *(skill.now for skill in known.skills)]
    assert all(skill.learned and skill.drift is not None and skill.metric for skill in known.skills)
    counts = {"a": len(rows)}
    assert {s.name: s.met for s in known.skills if s.met} == counts  # its rows are learned with c
    again = read_skills(tmp_path / "run")
    assert again.record() == known.record()
    answers = {"now": {}, "learned": ["a", "b"]}
    HarnessAnswers.model_validate({"now": {}, "learned": ["a", "b", "c"], "earlier": [answers]}).write(
        tmp_path / "run/harness.json"
    )
    assert undo(tmp_path / "run") == "c"
    (left,) = HarnessAnswers.read(tmp_path / "run/harness.json").every  # what was asked of c is gone with it
    assert left.learned == ["a", "b"]
    with pytest.raises(RunDirectoryError, match="the last task is one of a run"):
        undo(tmp_path / "run")
    assert run(config)["finished"]


def test_a_home_in_output_is_where_a_run_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    values = folders_of(tmp_path).model_dump(mode="json")
    assert run(validate(RunConfig, {**values, "output": "~/run"}, source="test"))["finished"]
    assert not list((tmp_path / "here").iterdir())
    assert {p.name for p in (tmp_path / "run/tasks").iterdir()} == {"01-a", "02-b"}


def test_a_task_that_was_renamed_is_told_and_the_run_s_figures_stay(tmp_path: Path) -> None:
    config = folders_of(tmp_path)
    run(config)
    before = (tmp_path / "run/metrics.json").read_bytes()
    (tmp_path / "data/b").rename(tmp_path / "data/c")
    with pytest.raises(RunDirectoryError, match="learned here: a, b; this configuration begins with a, c"):
        run(config)
    assert (tmp_path / "run/metrics.json").read_bytes() == before


def test_rows_that_changed_are_told_and_the_run_s_figures_stay(tmp_path: Path) -> None:
    config = folders_of(tmp_path)
    run(config)
    before = (tmp_path / "run/metrics.json").read_bytes()
    file = tmp_path / "data/b/test.jsonl"
    rows = file.read_text()
    file.write_text(rows.replace("btest0", "btest7"))
    with pytest.raises(RunDirectoryError, match=r"was asked other test rows of b than there are now"):
        run(config)
    assert (tmp_path / "run/metrics.json").read_bytes() == before
    file.write_text(rows)
    run(config)
