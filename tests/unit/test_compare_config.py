"""The grid of a sweep: its cells, and what it says when it is wrong."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from holdfast.config import override, read_yaml, validate
from holdfast.errors import ConfigError
from holdfast.runner import RunConfig
from holdfast.sweep.grid import Plan, load_grid
from tiny_runs import tiny_run

EWC = {"name": "ewc", "set": {"strategy": "ewc"}, "grid": {"strategy.strength": [1e3, 1e4]}}
PLAIN = {"name": "plain", "set": {"strategy": "sequential"}}


def base_of() -> dict[str, Any]:
    return {k: v for k, v in tiny_run(Path("x")).items() if k not in ("output", "seed")}


def plan_of(folder: Path, *overrides: str, **sections: Any) -> Plan:
    file = folder / "grid.yaml"
    values = {"output": str(folder / "out"), "base": base_of(), "rows": [PLAIN, EWC], **sections}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return load_grid(file, overrides)


GRIDS = sorted(
    grid
    for folder in ("configs/compare", "benchmarks/evidence")
    for grid in (Path(__file__).parents[2] / folder).glob("*.yaml")
)


@pytest.mark.parametrize("file", GRIDS, ids=lambda file: file.stem)
def test_each_committed_grid_is_right_and_says_its_command(file: Path, tmp_path: Path) -> None:
    plan = load_grid(file, [f"output={tmp_path}"])
    assert plan.cells
    assert f"holdfast compare {file.parent.parent.name}/{file.parent.name}/{file.name}" in file.read_text()


def test_cells_are_rows_by_points_by_orders_by_seeds(tmp_path):
    plan = plan_of(tmp_path, seeds=[3, 4], orders=[["copy", "head"], ["head", "copy"]])
    assert [line.label for line in plan.grid.lines] == [
        "plain",
        "ewc · strength=1000",
        "ewc · strength=10000",
    ]
    assert len(plan.cells) == 3 * 2 * 2
    assert len({cell.folder for cell in plan.cells}) == 12
    cell = plan.cells[7]
    assert (cell.line.label, cell.order, cell.seed) == ("ewc · strength=1000", "order 2", 4)
    assert cell.config.strategy.strength == 1000
    assert cell.config.tasks.order == ("head", "copy")
    assert cell.config.label == "ewc · strength=1000"
    assert plan.candidates == ()


def test_a_grid_of_two_keys_is_their_product(tmp_path):
    row = {"name": "a", "set": {"strategy": "ewc"}}
    row["grid"] = {"strategy.strength": [1, 2], "training.learning_rate": [1e-3, 1e-4], "model.hidden": [32]}
    plan = plan_of(tmp_path, rows=[row], reference="a · strength=1 · learning_rate=0.001 · hidden=32")
    assert [dict(line.point) for line in plan.grid.lines] == [
        {"strategy.strength": s, "training.learning_rate": r, "model.hidden": 32}
        for s in (1, 2) for r in (1e-3, 1e-4)
    ]  # fmt: skip


def test_choosing_runs_several_points_on_validation_rows_of_its_own_seeds(tmp_path):
    plan = plan_of(
        tmp_path,
        seeds=[0, 1],
        choose={"seeds": [7], "set": {"tasks.train_rows": 16}},
        orders=[["head"], ["copy"]],
    )
    assert [(c.line.label, c.seed, c.order) for c in plan.candidates] == [
        ("ewc · strength=1000", 7, "order 1"), ("ewc · strength=10000", 7, "order 1")
    ]  # fmt: skip
    assert {(c.config.tasks.test_split, c.config.tasks.train_rows) for c in plan.candidates} == {
        ("validation", 16)
    }
    assert {(c.config.tasks.test_split, c.config.tasks.train_rows) for c in plan.cells} == {("test", 32)}
    assert not {c.folder for c in plan.candidates} & {c.folder for c in plan.cells}


def test_the_command_of_a_cell_gives_its_configuration(tmp_path):
    row = {
        "name": "odd",
        "set": {"strategy": {"name": "ewc", "strength": 1e-7}, "template.strip": "no: {1e3}"},
    }
    plan = plan_of(tmp_path, rows=[row], seeds=[5], orders=["L1", ["copy", "head"]])
    for cell in plan.cells:
        words = shlex.split(cell.command)
        assert words[:3] == ["holdfast", "run", str(tmp_path / "out" / "base.yaml")]
        # label and folder too: the same command shows what the sweep has, and trains nothing again
        assert validate(RunConfig, override(plan.grid.base, words[3:]), "command") == cell.config
        assert cell.config.output == str(cell.folder)


def test_the_base_is_found_from_the_grid_and_can_be_changed(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tiny_run(tmp_path / "ignored")))
    grid = {"base": "../base.yaml", "rows": [PLAIN], "output": "out"}
    file = tmp_path / "configs" / "grid.yaml"
    file.write_text(yaml.safe_dump(grid))
    monkeypatch.chdir(tmp_path)
    plan = load_grid(file)
    assert plan.grid.base == read_yaml(tmp_path / "base.yaml")
    assert plan.cells[0].command.startswith("holdfast run base.yaml strategy=sequential seed=0 output=")
    changed = load_grid(file, ["base.training.epochs=7", "seeds=[2]", "jobs=2"])
    assert (changed.cells[0].config.training.epochs, changed.cells[0].seed, changed.grid.jobs) == (7, 2, 2)
    assert "out/base.yaml" in changed.cells[0].command
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({**tiny_run(tmp_path), "threads": 2}))
    assert load_grid(file, ["base=other.yaml"]).cells[0].config.threads == 2


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rows": [PLAIN, {**EWC, "grid": {"strategy.strenght": [1, 2]}}]},
         r"1 problem; nothing was run:\n  ewc · strenght=1, ewc · strenght=2: strategy\S*\.strenght: unknown "
         r"key\. Did you mean 'strength'"),
        ({"base": {**base_of(), "trainin": {}}}, r"plain, ewc · strength=1000, ewc · strength=10000: train"),
        ({"rows": [PLAIN, {**PLAIN, "name": "b", "set": {"seed": 3}}]}, "rows.1: 'seed' is set by the sweep"),
        ({"rows": [PLAIN, PLAIN]}, "rows: 'plain' stands in it twice"),
        ({"seeds": [0, 0]}, "seeds: 0 stands in it twice"),
        ({"seeds": []}, "seeds: List should have at least 1 item"),
        ({"reference": "plane"}, r"reference: no row 'plane'\. Allowed: plain, ewc"),
        ({"reference": "ewc"}, r"'ewc' has several grid points; name one: 'ewc · strength=1000', 'ewc"),
        ({"row": []}, r"row: unknown key\. Did you mean 'rows'"),
        ({"rows": [{**EWC, "grid": {"strategy.strength": []}}]}, "strength' has no values to try"),
        ({"rows": [{**EWC, "grid": {"strategy": ["ewc"]}}]}, r"'strategy' stands in `set` and in `grid`"),
        ({"rows": [{**EWC, "grid": {"strategy.strength": [1, 1.0]}}]}, r"'ewc · strength=1' stands in the"),
        ({"choose": {"on": "test"}}, r"choose\.on: Input should be 'validation'"),
        ({"choose": {}, "base": {**base_of(), "tasks": {"source": "toy", "test_split": "validation"}}},
         r"choose: tasks\.test_split: validation would score the chosen points on validation rows"),
        ({"choose": {}, "rows": [PLAIN]}, "choose: no row has several grid points to choose from"),
        ({"choose": {"seeds": [5, 5]}}, r"choose\.seeds: 5 stands in it twice"),
        ({"rows": [PLAIN, {"name": "v", "set": {"tasks.test_split": "validation"}}]},
         r"plain, v: test and validation rows \(tasks\.test_split\) are not to be compared"),
        ({"rows": [{**PLAIN, "name": " "}]}, r"rows\.0\.name: a row's name is one line of text"),
        ({"rows": [{**PLAIN, "name": "a\nb"}]}, r"rows\.0\.name: a row's name is one line of text"),
        ({"base": "nowhere.yaml"}, r"nowhere\.yaml: can't be read"),
        ({"rows": [{"name": "a", "set": {"threads.x": 3}}]}, r"a: 'threads\.x=3': threads is 1, not"),
        ({"jobs": 0}, "jobs: Input should be greater than or equal to 1"),
    ],
)  # fmt: skip
def test_a_wrong_grid_says_what_and_where(tmp_path, sections, message):
    with pytest.raises(ConfigError, match=message):
        plan_of(tmp_path, **sections)
