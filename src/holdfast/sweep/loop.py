"""``holdfast compare``: runs the cells of a grid, resumable at any point."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from holdfast.errors import HoldfastError, RunDirectoryError
from holdfast.folder import CONFIG, lock
from holdfast.models import load_model
from holdfast.progress import Progress
from holdfast.records import Comparison
from holdfast.runner.directory import RunDirectory
from holdfast.runner.findings import check
from holdfast.runner.rows import digests, of_other_rows
from holdfast.storage import why_no_folder, write_text
from holdfast.strategies import build_strategy
from holdfast.sweep.cells import Outcome, run_cells
from holdfast.sweep.choice import choose, count, in_order
from holdfast.sweep.grid import Cell, Choose, Plan, raise_for_cells
from holdfast.sweep.results import collect, markdown
from holdfast.sweep.table import live_table
from holdfast.tasks import build_stream, inspect_stream, ordered_names, toy_tokenizer
from holdfast.tasks.problems import Problems
from holdfast.tasks.task import Task, TaskStream


def compare(plan: Plan, progress: Progress) -> Comparison:
    """Run every cell of a grid and return what ``compare.json`` holds.

    Each cell is an ordinary run directory below ``<output>/runs`` (candidates of `choose`: ``validation``).
    Finished ones are not run again; a killed one continues. A cell that fails doesn't stop the rest: it
    stands in the results with its reason, and its log in ``<output>/logs``.

    Raises
    ------
    ConfigError
        What can be known before training is wrong with any cell; every problem is named.
    RunDirectoryError
        Another sweep runs in this folder, or it is a run's or a learner's.
    Interrupted
        ctrl-C; what was finished is on disk.
    """
    output = Path(plan.grid.output)
    if (output / CONFIG).exists():
        raise RunDirectoryError(
            f"output: '{output}' is the folder of a run, or of skills (it has a {CONFIG}). Give the sweep "
            "one of its own."
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        held = lock(output / "compare.lock", "sweep")
    except OSError as error:
        why = why_no_folder(output, error)
        raise HoldfastError(f"output: '{output}' can't be used as a folder ({why}).") from error
    with held:
        return _Sweep(plan, output, progress).to_the_end()


Note = Callable[[Cell, Sequence[str]], None]


class _Sweep:
    def __init__(self, plan: Plan, output: Path, progress: Progress) -> None:
        self.plan, self.output, self.progress = plan, output, progress
        self.outcomes: dict[Path, Outcome] = {
            cell.folder: Outcome.of(cell) for cell in (*plan.candidates, *plan.cells)
        }

    def to_the_end(self) -> Comparison:
        self._refuse_problems()
        for outcome in self.outcomes.values():
            if outcome.status == "waiting" and outcome.reason:
                self.progress.say(outcome.reason)
        write_text(self.output / "base.yaml", yaml.safe_dump(self.plan.grid.base, sort_keys=False))
        self._record()
        self.progress.show_above(lambda: live_table(self.results))
        if self._next() is not None:
            self._run()
        self.progress.show_above(None)
        return self.results

    def _run(self) -> None:
        done, total = self._counts()
        if done:
            self.progress.say(f"{self.output}: continuing; {done} of {total} cells are finished.")
        with self.progress.bar("cells", total=total) as bar:
            bar.show(done)

            def tell(cell: Cell, outcome: Outcome) -> None:
                self.outcomes[cell.folder] = outcome
                self._record()
                done, total = self._counts()
                bar.show(done, total)
                if outcome.ended:
                    self.progress.say(f"[{done}/{total}] {cell.name}: {outcome.sentence}")

            run_cells(self._next, self.plan.grid.jobs, self.output / "logs", self.progress, tell)

    def _next(self) -> Cell | None:
        cells = in_order(self.plan, self.choices)
        return next((cell for cell in cells if self.outcomes[cell.folder].status == "waiting"), None)

    def _counts(self) -> tuple[int, int]:
        cells = in_order(self.plan, self.choices)
        return sum(self.outcomes[cell.folder].ended for cell in cells), count(self.plan, self.choices)

    def _record(self) -> None:
        self.choices = choose(self.plan, self.outcomes)
        self.results = collect(self.plan, self.outcomes, self.choices)
        self.results.write(self.output / "compare.json")
        write_text(self.output / "compare.md", markdown(self.results))

    def _refuse_problems(self) -> None:
        """Look at directories, data, lengths and models of the cells that are to be run."""
        cells = [c for c in (*self.plan.candidates, *self.plan.cells) if not self._finished(c)]
        found: dict[str, list[str]] = {}

        def note(cell: Cell, problems: Sequence[str]) -> None:
            for problem in problems:
                where = found.setdefault(problem, [])
                if cell.name not in where:
                    where.append(cell.name)

        seen: set[str] = set()
        with self.progress.bar("checking cells", total=len(cells)) as bar:
            for done, cell in enumerate(cells, start=1):
                if different := RunDirectory.hindrances(cell.config):
                    problem = f"there is a run with another configuration; different: {', '.join(different)}"
                    note(cell, [f"{problem}. Give the sweep another folder with output=DIR."])
                _check_new(cell, seen, note)
                note(cell, _unmeasurable(cell, self.plan.grid.choose))
                bar(done)
        if cells:
            self._refuse_other_rows(note)
        raise_for_cells(self.plan.source, found)

    def _refuse_other_rows(self, note: Note) -> None:
        """Cells that were run, or begun, stand beside new ones only where all learn from the same rows."""
        known: dict[str, dict[str, dict[str, str]]] = {}  # the digests of each stream
        for cell in (*self.plan.candidates, *self.plan.cells):
            if not cell.folder.exists():
                continue
            config = cell.config
            key = f"{config.seed} {config.tasks.model_dump_json()}"
            if key not in known:
                try:
                    tasks = build_stream(config.tasks, config.seed, lambda _: None).tasks
                except HoldfastError:  # the rows are gone; a cell that needs them tells of it
                    tasks = ()
                known[key] = digests(tasks, tasks)
            mend = "Bring these back, or give the sweep another folder with output=DIR."
            note(cell, [f"{problem} {mend}" for problem in of_other_rows(cell.folder, known[key])])

    def _finished(self, cell: Cell) -> bool:
        return self.outcomes[cell.folder].status == "finished"


def _check_new(cell: Cell, seen: set[str], note: Note) -> None:
    """Look at what no earlier cell had: all but numbers as a whole, a strategy, the rows of a seed."""

    def is_new(*parts: Any) -> bool:
        key = json.dumps([p.model_dump(mode="json") if hasattr(p, "model_dump") else p for p in parts])
        known = key in seen
        seen.add(key)
        return not known

    config = cell.config
    new_rows = is_new("rows", config.tasks, config.seed)
    new_strategy = is_new("strategy", config.model, config.strategy)
    whole = config.model_dump(mode="json", exclude={"seed", "output", "label"})
    kinds = {part: _without_numbers(whole[part]) for part in ("strategy", "training")}  # strengths, rates
    if is_new("whole", {**whole, **kinds}):
        note(cell, check(config, directory=False).problems)
        return
    if new_rows:
        note(cell, inspect_stream(config.tasks, config.seed)[1].found)
    if new_strategy:
        try:
            build_strategy(config.strategy).check(load_model(config.model, config.seed, toy_tokenizer)[0])
        except HoldfastError as error:
            note(cell, [str(error)])


def _without_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_numbers(inner) for key, inner in value.items()}
    return None if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _unmeasurable(cell: Cell, choose: Choose | None) -> list[str]:
    """What a row can't be chosen by, whatever its runs give: AP alone is there in every stream."""
    if choose is None or choose.by == "ap" or cell.config.tasks.test_split != "validation":
        return []
    names = ordered_names(cell.config.tasks, problems := Problems())
    if problems.found:  # which is told already
        return []
    tasks = tuple(Task(name, (), ()) for name in names)  # how many is all that counts: no row is read
    stages = build_strategy(cell.config.strategy).stages(TaskStream("", tasks))
    if choose.by == "bwt" and len(stages) == 1:
        return ["choose.by: there is no bwt where nothing is learned after the first stage; take ap"]
    if choose.by == "learning_accuracy" and any(len(stage.tasks) > 1 for stage in stages):
        return ["choose.by: there is no learning_accuracy where several tasks are learned at once; take ap"]
    return []
