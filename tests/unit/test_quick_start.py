"""What trains nothing starts without what trains: importing it takes longer than such a command's work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tiny_runs import tiny_run

TRAINS = {"transformers.trainer", "peft", "trl", "datasets"}
ASK = f"""
import sys
from holdfast.cli import app
try:
    app(sys.argv[1:])
finally:
    print("LOADED", *sorted({TRAINS} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["skills", "none"], 2),
        (["check", "run.yaml"], 0),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_that_trains_nothing_loads_no_trainer(
    command: list[str], code: int, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_run(tmp_path / "run")))
    done = subprocess.run(
        [sys.executable, "-c", ASK, *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED"
