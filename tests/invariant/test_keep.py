"""`keep: last`: the folder doesn't grow by a model a task, and nothing that is needed is gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from holdfast import Learner, write_report
from holdfast.config import validate
from holdfast.errors import RunDirectoryError
from holdfast.folder import THINNED, Folder
from holdfast.learner.skills import read_skills, undo
from holdfast.models import tiny_llama
from holdfast.progress import Progress
from holdfast.runner import RunConfig, run
from holdfast.tasks import toy_tokenizer
from kills import Killed, kill_when
from tiny_runs import tiny_run

ORDER = ["head", "copy", "flip", "tail"]
STRATEGY = {"name": "attribution", "importance": "magnitude"}


def config_of(output: Path, order: list[str] = ORDER, **sections: Any) -> RunConfig:
    values = tiny_run(output, **{"strategy": STRATEGY, **sections})
    values["tasks"] = {**values["tasks"], "order": order}
    return validate(RunConfig, values, source="test")


def parts_of(folder: Path) -> list[Path]:
    return sorted((folder / "tasks").iterdir())


def final(folder: Path) -> dict[str, torch.Tensor]:
    last = parts_of(folder)[-1]
    return {**load_file(last / "model" / "model.safetensors"), **load_file(last / "strategy.safetensors")}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept") / "run"
    run(config_of(folder, keep="last"))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(config_of(folder))
    return folder


def test_only_the_last_two_tasks_have_weights_and_the_scores_are_the_same(kept: Path, whole: Path) -> None:
    heavy = [[p.name for p in part.rglob("*.safetensors")] for part in parts_of(kept)]
    assert heavy[:2] == [[], []]
    assert all("model.safetensors" in names and "strategy.safetensors" in names for names in heavy[2:])
    assert same(final(kept), final(whole))
    matrices = [json.loads((f / "metrics.json").read_text())["matrix"] for f in (kept, whole)]
    assert matrices[0] == matrices[1]
    assert all(Folder(kept).problem(f"tasks/{part.name}") is None for part in parts_of(kept))
    assert (parts_of(kept)[0] / "predictions").is_dir()


def test_report_and_skills_are_made_of_what_is_left(kept: Path, tmp_path: Path) -> None:
    page = write_report([kept], tmp_path / "report.html").read_text()
    assert all(task in page for task in ORDER)
    assert len(read_skills(kept).skills) == 4


def test_a_killed_run_goes_on_from_it_to_the_same_end(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    for where, call in (("holdfast.training.bridge.completion_loss", 14), ("os.unlink", 3)):
        with monkeypatch.context() as patch:
            kill_when(patch, where, call)
            with pytest.raises(Killed):
                run(config_of(folder, keep="last"))
    run(config_of(folder, keep="last"))
    assert same(final(folder), final(whole))
    assert not list(parts_of(folder)[0].rglob("*.safetensors")), "what the kill left has gone too"


def test_what_a_thinned_task_led_to_is_never_deleted(kept: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(kept, tmp_path / "copy")
    (parts_of(folder)[2] / "metrics.json").write_text("{}")
    before = sorted(p for p in folder.rglob("*") if p.is_file())
    with pytest.raises(RunDirectoryError, match=rf"03-flip: metrics.json is torn.*{THINNED}.*backup"):
        run(config_of(folder, keep="last"))
    assert sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "run.lock") == [
        p for p in before if p.name != "run.lock"
    ]


def test_a_learner_as_it_was_long_ago_is_not_to_be_had(kept: Path) -> None:
    with Learner.load(kept) as learner:
        model, tokenizer, config = learner.model, learner.tokenizer, learner.config
    with pytest.raises(RunDirectoryError, match=r"02-copy: its weights are not kept"):
        Learner(model, tokenizer, config, folder=kept, after=2)


def test_a_longer_order_goes_on_and_says_what_it_cannot_ask(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(kept, tmp_path / "copy")
    metrics = run(config_of(folder, [*ORDER, "most"], keep="last"), Progress())
    said = "".join(capsys.readouterr()).replace("\n", " ")
    assert "02-copy: its weights are not kept (keep: last), so it isn't asked most" in said
    assert metrics["matrix"][5][0] is not None
    assert metrics["matrix"][2][4] is None


def test_one_task_can_be_taken_back_and_no_second_one(tmp_path: Path) -> None:
    tokenizer, folder, training = toy_tokenizer(), tmp_path / "skills", {"max_steps": 1}
    options = {"folder": folder, "keep": "last", "training": training}
    with Learner(tiny_llama(tokenizer), tokenizer, "sequential", **options) as learner:
        for name in ("a", "b", "c", "d"):
            rows = [{"prompt": f"{name}{i}=", "completion": "x"} for i in range(4)]
            with learner.task(name, rows) as stage:
                stage.train()
    assert undo(folder) == "d"
    with pytest.raises(RunDirectoryError, match=r"weights before task 'c' are not kept"):
        undo(folder)


def test_what_a_kill_after_the_last_commit_has_left_goes_with_the_next_start(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path / "run", keep="last")
    with monkeypatch.context() as patch:
        kill_when(patch, "holdfast.learner.learner.thin", 4)
        with pytest.raises(Killed):
            run(config)
    assert list((tmp_path / "run/tasks/02-copy").rglob("*.safetensors"))
    run(config)
    files = [sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in (kept, tmp_path / "run")]
    assert files[0] == files[1]
