"""The three examples run, offline, as they are; each fits on a screen."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
SAID = re.compile(r"head: (\d+) when learned, (\d+) after copy was learned \((\d+)\)")


def run_example(file: Path, folder: Path, steps: int) -> tuple[int, int, int]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, str(file), str(steps)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = SAID.search(done.stdout)
    assert found is not None, done.stdout[-2000:]
    learned, kept, new = (int(number) for number in found.groups())
    return learned, kept, new


def test_there_are_three() -> None:
    assert [file.stem for file in EXAMPLES] == ["bare_loop", "trainer_callback", "trl_sft"]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_example_has_at_most_60_lines_and_teaches_its_call(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 60
    call = ".Gate(prior" if file.stem == "bare_loop" else "holdfast.ProtectCallback("
    assert call in text
    assert "holdfast.attribute(" in text
    assert "from_pretrained" in text, "it must say what to change for a real model"


@pytest.mark.slow
@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_example_runs_and_keeps_something(file: Path, tmp_path: Path) -> None:
    if file.stem == "trl_sft":
        pytest.importorskip("trl")
    # few steps: the old task is half learned, and what there is of it must not be lost
    learned, kept, _ = run_example(file, tmp_path, steps=60)
    assert learned >= 30
    assert kept >= learned / 2


@pytest.mark.slow
@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_example_as_it_is_learns_both_tasks_and_keeps_the_first(file: Path, tmp_path: Path) -> None:
    learned, kept, new = run_example(file, tmp_path, steps=200)
    assert learned >= 95
    assert kept >= 80
    assert new >= 80
