"""`evaluation.scope`: what is asked after each stage, and what the page makes of the gaps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from holdfast.config import validate
from holdfast.report import write_report
from holdfast.runner import RunConfig, run
from kills import Killed, kill_when
from tiny_runs import tiny_run

ASKED = {
    "all": ["...", "xxx", "xxx", "xxx"],
    "seen": ["...", "x..", "xx.", "xxx"],
    "needed": ["...", "xx.", ".xx", "xxx"],
    "last": ["...", "...", "...", "xxx"],
}


def config_of(output: Path, scope: str) -> RunConfig:
    values: dict[str, Any] = tiny_run(output, evaluation={"scope": scope, "zero_shot": False})
    values["tasks"] = {**values["tasks"], "order": ["copy", "flip", "head"], "train_rows": 4, "test_rows": 2}
    values["training"] = {"max_steps": 1, "batch_size": 4}
    return validate(RunConfig, values, source="test")


@pytest.mark.parametrize("scope", ASKED)
def test_a_scope_asks_these_tasks_and_no_others(scope: str, tmp_path: Path) -> None:
    metrics = run(config_of(tmp_path, scope))
    got = ["".join("." if a is None else "x" for a in row) for row in metrics["matrix"]]
    assert got == ASKED[scope]
    known = {key for key in ("ap", "fwt", "bwt", "learning_accuracy") if metrics[key] is not None}
    assert (
        known
        == {
            "all": {"ap", "fwt", "bwt", "learning_accuracy"},
            "seen": {"ap", "bwt", "learning_accuracy"},
            "needed": {"ap", "fwt", "bwt", "learning_accuracy"},
            "last": {"ap"},
        }[scope]
    )


def test_a_run_asked_at_its_end_alone_has_a_page_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_when(patch, "holdfast.training.bridge.completion_loss", 2)
        with pytest.raises(Killed):
            run(config_of(tmp_path / "run", "last"))
    assert "run" in write_report([tmp_path / "run"], tmp_path / "before.html").read_text()
    run(config_of(tmp_path / "run", "last"))
    assert "run" in write_report([tmp_path / "run"], tmp_path / "after.html").read_text()
