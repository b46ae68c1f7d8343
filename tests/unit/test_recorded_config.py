"""The configuration that a run directory records, with every default written out, can be run again."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from holdfast.config import read_yaml, validate
from holdfast.runner import RunConfig, load_config

CONFIGS = sorted(
    path
    for path in Path(__file__).parents[2].joinpath("configs").rglob("*.yaml")
    if path.parent.name not in ("compare", "accelerate")  # grids, and configurations of a launcher
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_written_out_in_full_reads_back_the_same(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    recorded = tmp_path / "config.yaml"
    recorded.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(recorded) == config


@pytest.mark.parametrize("columns", [{"messages": "turns"}, {"prompt": "q"}, {"references": "all"}, {}])
def test_column_names_written_out_in_full_read_back_the_same(columns: dict[str, str], tmp_path: Path) -> None:
    values = {
        "output": "run",
        "model": {"path": "some/model"},
        "tasks": {"source": "jsonl", "path": str(tmp_path), "columns": columns},
        "strategy": "sequential",
    }
    config = validate(RunConfig, values, source="test")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert validate(RunConfig, read_yaml(file), source="test") == config
