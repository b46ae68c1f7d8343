"""Sweeps: resumable, choosing on validation rows only, and not stopped by a cell that fails."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from holdfast.cli import app
from holdfast.errors import ConfigError, RunDirectoryError
from holdfast.folder import lock
from holdfast.models import tiny_llama
from holdfast.progress import Progress
from holdfast.records import Comparison, RunMetrics
from holdfast.sweep.cells import Outcome
from holdfast.sweep.choice import choose, count, in_order
from holdfast.sweep.grid import Cell, load_grid
from holdfast.sweep.loop import compare
from holdfast.sweep.results import collect, markdown
from holdfast.tasks import toy_tokenizer
from kills import Killed, dying
from tiny_runs import tiny_run

PLAIN = {"name": "plain", "set": {"strategy": "sequential"}}
# a learning rate so small that nothing is learned, and one that teaches `head`
RATES = {"name": "rate", "grid": {"training.learning_rate": [1e-9, 1e-2]}}
BROKEN = {"name": "broken", "set": {"training.learning_rate": 1e30}}


def grid_file(folder: Path, rows: list[Any], **sections: Any) -> Path:
    base = tiny_run(folder)
    base["tasks"] = {"source": "toy", "order": ["head"], "size": 3, "train_rows": 48, "test_rows": 6}
    base["training"] = {"epochs": 6, "batch_size": 8, "learning_rate": 3e-3}
    base["evaluation"] = {"zero_shot": False}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump({"output": str(folder / "out"), "base": base, "rows": rows, **sections}))
    return file


def sweep(file: Path, *overrides: str) -> Comparison:
    with Progress(quiet=True) as progress:
        return compare(load_grid(file, overrides), progress)


def holdfast_cli(*arguments: object) -> Result:
    environment = {"COLUMNS": "240", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner(env=environment).invoke(app, [str(a) for a in arguments])


def found(results: Comparison) -> str:
    """Results without what differs between two folders and two days."""
    text = json.dumps(results.model_dump(mode="json", exclude={"grid"}), sort_keys=True)
    return re.sub(r'"(command|seconds)": ("[^"]*"|[\d.e-]+|null)', r'"\1": 0', text)


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    """A finished sweep that chose its learning rate."""
    file = grid_file(tmp_path_factory.mktemp("sweep"), [PLAIN, RATES], choose={"by": "learning_accuracy"})
    return file, sweep(file)


def test_a_point_is_chosen_on_validation_rows_and_only_that_sees_test_rows(chosen):
    file, results = chosen
    (row,) = results.choice.rows
    values = {c.label: c.value for c in row.candidates}
    assert row.chosen == "rate · learning_rate=0.01" == max(values, key=values.__getitem__)
    assert len(set(values.values())) == 2
    assert [r.label for r in results.rows] == ["plain", "rate · learning_rate=0.01"]
    asked: dict[str, set[str]] = {"runs": set(), "validation": set()}
    rates: dict[str, set[float]] = {"runs": set(), "validation": set()}
    for config in (file.parent / "out").rglob("config.yaml"):
        phase = config.relative_to(file.parent / "out").parts[0]
        recorded = yaml.safe_load(config.read_text())
        assert recorded["tasks"]["test_split"] == {"runs": "test"}.get(phase, phase)
        rates[phase].add(recorded["training"]["learning_rate"])
        for predictions in config.parent.rglob("predictions/*.jsonl"):
            asked[phase] |= {json.loads(line)["prompt"] for line in predictions.read_text().splitlines()}
    assert rates == {"runs": {3e-3, 1e-2}, "validation": {1e-9, 1e-2}}
    assert len(asked["runs"]) == len(asked["validation"]) == 6
    assert not asked["runs"] & asked["validation"]
    (curve,) = results.curves
    assert (curve.split, [p.value for p in curve.points]) == ("validation", [1e-9, 1e-2])


@pytest.mark.parametrize("call", [2, 4])  # while choosing, and in the last cell
def test_a_sweep_killed_in_the_middle_ends_as_one_that_never_was(chosen, call, tmp_path, monkeypatch):
    module: Any = importlib.import_module("holdfast.learner.testing")
    calls = [0]
    file = grid_file(tmp_path / "broken", [PLAIN, RATES], choose={"by": "learning_accuracy"})
    monkeypatch.setattr(module, "evaluate_encoded", dying(module.evaluate_encoded, call, calls))
    with pytest.raises(Killed):
        sweep(file)
    assert not json.loads((tmp_path / "broken" / "out" / "compare.json").read_text())["finished"]
    results = sweep(file)
    assert calls[0] == 5  # four cells, one of them asked twice: no finished one was run again
    assert results.finished
    assert found(results) == found(chosen[1])
    assert calls[0] == 5
    sweep(file)
    assert calls[0] == 5


def edited(out: Path) -> Path:
    file = next(out.glob("runs/plain/**/metrics.json"))
    metrics = json.loads(file.read_text())
    metrics.update(ap=99.0, matrix=[[None], [99.0]], learning_accuracy=99.0)
    file.write_text(json.dumps(metrics))
    return file


def copied(out: Path) -> Path:
    other = next(out.glob("runs/rate/*0.01/**/seed-0/metrics.json"))
    target = next(out.glob("runs/plain/**/seed-0/metrics.json"))
    shutil.copy(other, target)
    return target


def of_another_shape(out: Path) -> Path:
    file = next(out.glob("runs/plain/**/seed-0/metrics.json"))
    file.write_text("[]")
    return file


def renamed_tasks(out: Path) -> Path:
    file = next(out.glob("runs/plain/**/seed-0/metrics.json"))
    file.write_text(file.read_text().replace('"head"', '"tail"'))
    return file


@pytest.mark.parametrize("change", [edited, copied, of_another_shape, renamed_tasks])
def test_a_cells_metrics_are_made_again_from_its_stages(change, chosen, tmp_path, monkeypatch):
    file, results = chosen
    out = tmp_path / "out"
    shutil.copytree(file.parent / "out", out)
    changed = change(out)
    wrong = changed.read_text()
    module: Any = importlib.import_module("holdfast.learner.learning")
    monkeypatch.setattr(module, "train", dying(module.train, 1, [0]))  # nothing is trained for it
    again = sweep(file, f"output={out}")
    assert found(again).replace(str(out), str(file.parent / "out")) == found(results)
    assert changed.read_text() != wrong
    assert json.loads(changed.read_text())["label"] == "plain"
    assert not re.search(r"99\.0", (out / "compare.md").read_text())


def test_a_cell_with_a_changed_stage_is_not_finished(chosen, tmp_path):
    file, results = chosen
    out = tmp_path / "out"
    shutil.copytree(file.parent / "out", out)
    (cell,) = (c for c in load_grid(file, [f"output={out}"]).cells if c.line.row == "plain")
    assert Outcome.of(cell).status == "finished"
    stage = cell.folder / "tasks" / "01-head" / "metrics.json"
    record = json.loads(stage.read_text())
    stage.write_text(json.dumps({**record, "scores": {"head": 99.0}}))
    file_of_run = cell.folder / "metrics.json"
    forged = {**json.loads(file_of_run.read_text()), "ap": 99.0, "matrix": [[None], [99.0]]}
    file_of_run.write_text(json.dumps({**forged, "learning_accuracy": 99.0}))
    assert Outcome.of(cell).status == "waiting"
    again = sweep(file, f"output={out}")  # the stage is trained again
    assert again.rows[0].scores == results.rows[0].scores


def test_rows_are_finished_one_after_another_and_no_job_waits_for_a_choice(tmp_path):
    rows = [{**RATES, "name": name} for name in ("a", "b")]
    plan = load_grid(grid_file(tmp_path, [*rows, PLAIN], choose={"by": "ap"}, reference="plain"))
    outcomes = {cell.folder: Outcome("waiting") for cell in (*plan.candidates, *plan.cells)}

    def start() -> Cell:
        cells = in_order(plan, choose(plan, outcomes))
        cell = next(cell for cell in cells if outcomes[cell.folder].status == "waiting")
        outcomes[cell.folder] = Outcome("running")
        return cell

    def end(cell: Cell, ap: float) -> None:
        outcomes[cell.folder] = Outcome("finished", RunMetrics.model_construct(ap=ap))

    low, high = start(), start()
    end(low, 10.0)
    third = start()  # `high` is still running, so nothing of row a is known to be next
    assert [c.name for c in (low, high, third)] == [
        "a · learning_rate=1e-09, seed 0, validation",
        "a · learning_rate=0.01, seed 0, validation",
        "b · learning_rate=1e-09, seed 0, validation",
    ]
    assert count(plan, choose(plan, outcomes)) == 7
    end(high, 20.0)
    assert start().name == "a · learning_rate=0.01, seed 0"
    assert start().name == "b · learning_rate=0.01, seed 0, validation"
    assert start().name == "plain, seed 0"
    assert count(plan, choose(plan, outcomes)) == 7


def test_a_cell_that_fails_is_shown_and_the_rest_goes_on(tmp_path):
    file = grid_file(tmp_path, [PLAIN, BROKEN, {**PLAIN, "name": "last"}])
    result = holdfast_cli("compare", file, "base.training.max_steps=2")
    assert result.exit_code == 1, result.output
    assert "failed: broken, seed 0: " in result.output
    results = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [row["runs"][0]["status"] for row in results["rows"]] == ["finished", "failed", "finished"]
    (failed,) = results["failed"]
    assert failed["cell"] == "broken, seed 0"
    assert failed["reason"] in result.output
    text = (tmp_path / "out" / "compare.md").read_text()
    assert f"* broken, seed 0: {failed['reason']}" in text
    assert "**The sweep is not complete**" in text
    assert "Traceback" in (tmp_path / "out" / "logs" / "broken%2C seed 0.log").read_text()
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_sweep_does_not_go_into_the_folder_of_a_run(chosen, tmp_path):
    file, _ = chosen
    run = shutil.copytree(next((file.parent / "out/runs").glob("plain/seed-*")), tmp_path / "run")
    before = sorted(run.rglob("*"))
    result = holdfast_cli("compare", file, f"output={run}")
    assert result.exit_code == 2, result.output
    assert "is the folder of a run, or of skills (it has a config.yaml)" in result.output
    assert sorted(run.rglob("*")) == before


def test_the_command_line_shows_the_table_and_writes_all_three_forms(chosen):
    file, results = chosen
    result = holdfast_cli("compare", file)  # finished: everything is read from disk
    assert result.exit_code == 0, result.output
    assert "rate · learning_rate=0.01" in result.output
    out = file.parent / "out"
    text = (out / "compare.md").read_text()
    assert f"`{results.rows[1].command}`" in text
    assert "| rate · learning_rate=0.01 |" in text
    page = (out / "report.html").read_text()
    assert 'id="comparison"' in page
    assert "tradeoff-0-validation" in page


@pytest.mark.parametrize("values", [[1, 2], ["1", 2], ["1", "2"]])
def test_a_strength_in_quotes_has_its_curve_too(values, tmp_path):
    row = {"name": "ewc", "set": {"strategy": "ewc"}, "grid": {"strategy.strength": values}}
    plan = load_grid(grid_file(tmp_path, [PLAIN, row]), ["reference=plain"])
    metrics = RunMetrics(label="", strategy="ewc", tasks=["head"], matrix=[[None], [50.0]], ap=50.0)
    metrics = metrics.model_copy(update={"learning_accuracy": 50.0, "seconds": {"total": 1.0}})
    (curve,) = collect(plan, {c.folder: Outcome("finished", metrics) for c in plan.cells}, {}).curves
    assert (curve.key, [point.value for point in curve.points]) == ("strategy.strength", [1.0, 2.0])


def test_problems_of_all_cells_are_found_before_anything_is_trained(tmp_path):
    rows = [
        PLAIN,
        {"name": "a", "set": {"strategy": "kif-lora"}},
        {"name": "b", "set": {"tasks.order": ["coppy"]}},
    ]
    file = grid_file(tmp_path, rows)
    with pytest.raises(ConfigError) as caught:
        sweep(file)
    message = str(caught.value)
    assert "2 problems; nothing was run" in message
    assert re.search(r"\n  a, seed 0: .*lora", message)
    assert re.search(r"\n  b, seed 0: tasks.order: no task 'coppy'", message)
    assert not (tmp_path / "out" / "runs").exists()


def test_what_later_rows_alone_have_is_looked_at_before_anything_is_trained(tmp_path):
    missing = str(tmp_path / "missing.txt")
    rows = [
        PLAIN,
        {"name": "text", "set": {"replay": {"memory": "none", "general": {"file": missing}}}},
        {"name": "base", "set": {"strategy": "ewc", "protect_base": {"general": missing}}},
        {"name": "harness", "set": {"evaluation.harness": {"tasks": ["mine"], "include_path": missing}}},
    ]
    with pytest.raises(ConfigError) as told:
        sweep(grid_file(tmp_path, rows))
    assert not list((tmp_path / "out").rglob("tasks"))
    for name in ("text", "base", "harness"):
        assert re.search(rf"^  {name}, seed 0: .*", str(told.value), re.MULTILINE), told.value


@pytest.mark.parametrize("by", ["bwt", "learning_accuracy"])
def test_a_metric_that_no_run_will_have_is_refused_as_what_to_choose_by(by, tmp_path):
    joint = {"strategy": "multitask", "tasks.order": ["head", "tail"]}
    rows = [PLAIN, {**RATES, "set": {} if by == "bwt" else joint}]
    file = grid_file(tmp_path, rows, choose={"by": by})
    with pytest.raises(
        ConfigError, match=rf"rate · learning_rate=1e-09, .* there is no {by} where .*; take ap"
    ):
        sweep(file)
    assert not (tmp_path / "out" / "runs").exists()


def test_a_changed_grid_in_the_same_folder_is_refused(chosen):
    file, _ = chosen
    with pytest.raises(
        ConfigError, match=r"1 problem; .*\n  .* and 1 more: .*training.epochs \(6.0 there, 1.0"
    ):
        sweep(file, "base.training.epochs=1")


def test_a_sweep_whose_model_has_moved_trains_nothing_again_and_another_model_is_refused(
    tmp_path, monkeypatch
):
    for seed, name in enumerate(("base", "other")):
        toy_tokenizer().save_pretrained(tmp_path / name)
        tiny_llama(toy_tokenizer(), seed, hidden=16, layers=1).save_pretrained(tmp_path / name)
    file = grid_file(tmp_path, [PLAIN])

    def at(name: str) -> Comparison:
        return sweep(file, f"base.model={{path: {tmp_path / name}}}", "base.training.max_steps=2")

    before = at("base")
    (tmp_path / "base").rename(tmp_path / "moved")
    module: Any = importlib.import_module("holdfast.learner.learning")
    monkeypatch.setattr(module, "train", dying(module.train, 1, [0]))
    assert found(at("moved")) == found(before)
    assert f"path: {tmp_path / 'moved'}" in next((tmp_path / "out").rglob("config.yaml")).read_text()
    with pytest.raises(ConfigError, match=r"model\.path \(.* the weights are others\)"):
        at("other")


def test_rows_that_changed_since_a_cell_was_run_are_told_before_another_stands_beside_it(tmp_path):
    rows = [{"prompt": f"what is {i}", "completion": str(i)} for i in range(12)]
    data = tmp_path / "data" / "counts"
    data.mkdir(parents=True)

    def change(answer: str) -> None:
        for split in ("train", "test"):
            lines = [json.dumps({**row, "completion": answer} if row is rows[3] else row) for row in rows]
            (data / f"{split}.jsonl").write_text("\n".join(lines))

    def of(*rows: Any) -> Comparison:
        file = grid_file(tmp_path, list(rows))
        grid = yaml.safe_load(file.read_text())
        grid["base"]["tasks"] = {"source": "jsonl", "path": str(tmp_path / "data"), "order": ["counts"]}
        grid["base"]["training"]["max_steps"] = 2
        file.write_text(yaml.safe_dump(grid))
        return sweep(file)

    change("3")
    before = of(PLAIN)
    change("three")
    assert found(of(PLAIN)) == found(before)  # nothing is to be run beside it
    with pytest.raises(ConfigError, match=r"01-counts: was learned from other rows of counts .* output=DIR"):
        of(PLAIN, {**PLAIN, "name": "again"})
    assert len([*tmp_path.rglob("out/runs/*")]) == 1
    change("3")
    assert of(PLAIN, {**PLAIN, "name": "again"}).finished


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_cell_whose_order_has_a_task_twice_is_finished_when_it_is(jobs, tmp_path, monkeypatch):
    file = grid_file(tmp_path, [PLAIN], jobs=jobs)
    order = "base.tasks.order=[head, copy, head]"
    results = sweep(file, order, "base.training.max_steps=2")
    assert results.finished
    module: Any = importlib.import_module("holdfast.sweep.loop")
    monkeypatch.setattr(module, "run_cells", None)  # who runs one, fails
    assert found(sweep(file, order, "base.training.max_steps=2")) == found(results)


def test_a_sweep_goes_on_to_tasks_behind_those_of_its_order(tmp_path):
    def of(order: list[str], output: str) -> Comparison:
        tasks = f"base.tasks.order=[{', '.join(order)}]"
        return sweep(file, tasks, f"output={tmp_path / output}", "base.training.max_steps=2")

    file = grid_file(tmp_path, [PLAIN])
    of(["head"], "grown")
    grown, whole = (of(["head", "tail"], output) for output in ("grown", "whole"))
    assert grown.finished
    assert found(grown) == found(whole)
    runs = [next((tmp_path / output).rglob("runs/**/metrics.json")) for output in ("grown", "whole")]
    assert len({str(RunMetrics.read(run).matrix) for run in runs}) == 1


def test_names_of_rows_are_shown_as_they_stand(tmp_path):
    file = grid_file(tmp_path, [{**PLAIN, "name": "[/b] [red]x[/red] :one:"}])
    result = holdfast_cli("compare", file, "base.training.max_steps=1")
    assert result.exit_code == 0, result.output
    for place in ("[1/1] {}, seed 0: AP", "│ {} │", "Δ from {}, paired"):
        assert place.format("[/b] [red]x[/red] :one:") in result.output, result.output


def test_names_of_rows_and_their_commands_are_no_markup_in_markdown(tmp_path):
    file = grid_file(tmp_path, [{**PLAIN, "name": "*a* _b_ c_d <i> `e` | f"}])
    plan = load_grid(file)
    text = markdown(collect(plan, {cell.folder: Outcome("waiting") for cell in plan.cells}, {}))
    assert r"| \*a\* \_b\_ c_d \<i\> \`e\` \| f | – |" in text
    assert re.search(r"\| `` holdfast run .*label=.*<i> `e` \\\| f.* `` \|$", text, re.MULTILINE), text


def test_a_second_sweep_in_one_folder_is_refused(chosen):
    file, _ = chosen
    with (
        lock(file.parent / "out" / "compare.lock", "sweep"),
        pytest.raises(RunDirectoryError, match="another sweep is working here"),
    ):
        sweep(file)


@pytest.mark.slow
def test_processes_side_by_side_find_what_one_after_another_find(tmp_path):
    rows, how = [RATES, BROKEN, PLAIN], {"choose": {"by": "learning_accuracy"}, "reference": "plain"}
    alone = sweep(grid_file(tmp_path / "1", rows, **how))
    together = sweep(grid_file(tmp_path / "2", rows, **how), "jobs=2")
    assert [row.label for row in alone.rows] == ["rate · learning_rate=0.01", "broken", "plain"]
    assert found(together).replace(str(tmp_path / "2"), str(tmp_path / "1")) == found(alone)
    assert len(together.failed) == 1


@pytest.mark.slow
def test_a_process_ends_with_the_sweep_that_started_it_and_otherwise_on_its_own():
    start = "from holdfast.sweep.cells import stop_with_parent; stop_with_parent(); import time; "
    command = [sys.executable, "-c", start + "time.sleep(600)"]
    gone = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert "KeyboardInterrupt" in gone.stderr
    with subprocess.Popen([sys.executable, "-c", start + "time.sleep(0.5)"], stdin=subprocess.PIPE) as there:
        assert there.wait() == 0
