"""Runs the cells of a sweep: in this process, or several at a time in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from holdfast.errors import DataError, HoldfastError
from holdfast.evaluation.predictions import file_safe
from holdfast.folder import MANIFEST
from holdfast.learner import Learner
from holdfast.manifest import problem_of
from holdfast.progress import Interrupted, Progress, stop_requested, stoppable
from holdfast.quantities import number
from holdfast.records import RunMetrics, StageMetrics
from holdfast.runner.directory import RunDirectory
from holdfast.runner.loop import ZERO_SHOT, collect_metrics, later_parts, run
from holdfast.storage import write_json, write_text
from holdfast.strategies import build_strategy
from holdfast.sweep.grid import Cell
from holdfast.tasks.task import Task, TaskStream

POLL = 0.2  # seconds between looks at the processes
_PROGRAM = (  # `python -m holdfast`, which stops when the sweep dies
    "from holdfast.sweep.cells import stop_with_parent; stop_with_parent(); "
    "import runpy; runpy.run_module('holdfast', run_name='__main__')"
)


@dataclass(frozen=True)
class Outcome:
    """How far a cell is; `metrics` are those of its run once it is finished."""

    status: Literal["waiting", "running", "finished", "failed"]
    metrics: RunMetrics | None = None
    reason: str = ""

    @classmethod
    def of(cls, cell: Cell) -> Outcome:
        """What its directory says: finished under this very configuration, or waiting.

        A ``metrics.json`` that isn't what the stages give (edited, or another run's) is not believed: the
        cell is run, which makes the file again, and redoes a stage that was changed.
        """
        file = cell.folder / "metrics.json"
        if not file.is_file() or RunDirectory.conflicts(cell.config):
            return cls("waiting")
        try:
            metrics = RunMetrics.read(file)
            if not metrics.finished:
                return cls("waiting")
            if _of_its_stages(metrics, cell):
                return cls("finished", metrics)
        except DataError as error:
            return cls("waiting", reason=str(error))
        return cls("waiting", reason=f"{file}: not what the run's stages give; it is made again")

    @property
    def ended(self) -> bool:
        """Whether nothing more comes of it in this sweep."""
        return self.status in ("finished", "failed")

    @property
    def sentence(self) -> str:
        """One line for the terminal."""
        if self.status != "finished":
            return f"{self.status}: {self.reason}" if self.reason else self.status
        m = self.metrics
        found = (
            [] if m is None else [("AP", m.ap), ("BWT", m.bwt), ("learning accuracy", m.learning_accuracy)]
        )
        known = [f"{name} {number(value)}" for name, value in found if value is not None]
        return ", ".join(known) or "finished"


def _of_its_stages(metrics: RunMetrics, cell: Cell) -> bool:
    """Whether these are the metrics that the stages on disk give, as their manifests vouch for them."""
    # the rows aren't read: they may be gone since. That these are the names is what the folders' names say
    again = metrics.same_as
    stream = TaskStream("", tuple(Task(t, (), (), same_as=again.get(t, "")) for t in metrics.tasks))
    stages = build_strategy(cell.config.strategy).stages(stream)
    names = [Learner.part(stage) for stage in stages]
    before = [ZERO_SHOT] if cell.config.evaluation.zero_shot else []
    for name in (*before, *names, *later_parts(cell.folder)):
        if problem_of(cell.folder / name, MANIFEST, only=("metrics.json",)) is not None:
            return False
        StageMetrics.read(cell.folder / name / "metrics.json")
    told = collect_metrics(cell.config, metrics.tasks, stages, names, cell.folder)
    made = RunMetrics.model_validate(told)
    return metrics.model_dump(include=made.model_fields_set) == made.model_dump(exclude_unset=True)


Next = Callable[[], Cell | None]
Tell = Callable[[Cell, Outcome], None]


def run_cells(take: Next, jobs: int, logs: Path, progress: Progress, tell: Tell) -> None:
    """Run cells to their end; each is told of when it starts and when it ends.

    Parameters
    ----------
    take : callable
        Gives the next cell; None where none may start before one that is running has ended, or none is left.
    jobs : int
        With 1 they run here, one after another. With more, each is a process ``holdfast run``. Results are
        the same wherever `threads` is set: they are reproducible for a number of threads.
    logs : path
        Where a cell that fails leaves its traceback.

    Raises
    ------
    Interrupted
        ctrl-C: cells that were running stop at their next step, and continue when run again.
    """
    if jobs == 1:
        while (cell := take()) is not None:
            tell(cell, Outcome("running"))
            tell(cell, _run_here(cell, logs, progress))
    else:
        _Processes(jobs, logs, tell).run(take)


def _run_here(cell: Cell, logs: Path, progress: Progress) -> Outcome:
    threads = torch.get_num_threads()  # a cell may set its own
    try:
        return Outcome("finished", RunMetrics.model_validate(run(cell.config, progress)))
    except Interrupted:
        raise
    except Exception as error:  # whatever it is, the other cells don't depend on it
        write_text(_log(logs, cell), traceback.format_exc())
        told = str(error) if isinstance(error, HoldfastError) else f"{type(error).__name__}: {error}"
        return Outcome("failed", reason=_one_line(told))
    finally:
        torch.set_num_threads(threads)


class _Processes:
    """A few processes at a time, each with one cell."""

    def __init__(self, jobs: int, logs: Path, tell: Tell) -> None:
        self.jobs, self.logs, self.tell = jobs, logs, tell
        self.running: list[tuple[Cell, subprocess.Popen[bytes]]] = []

    def run(self, take: Next) -> None:
        with stoppable():
            try:
                while True:
                    if stop_requested():
                        self._stop()
                    while len(self.running) < self.jobs and (cell := take()) is not None:
                        self._start(cell)
                    if not self.running:
                        return
                    self._collect()
                    time.sleep(POLL)
            finally:  # on an error here, or a second ctrl-C
                for _, process in self.running:
                    process.kill()
                for _, process in self.running:
                    process.wait()

    def _start(self, cell: Cell) -> None:
        log = _log(self.logs, cell)
        file = log.with_suffix(".json")  # JSON is YAML that reads back as it was
        write_json(file, cell.config.model_dump(mode="json"))
        environment = dict(os.environ)
        if cell.config.threads is None:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.jobs)))
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, "run", str(file)],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.PIPE,  # never written; it closes when this process ends, however it ends
                env=environment,
                start_new_session=True,  # ctrl-C reaches it through us, once
            )
        self.running.append((cell, process))
        self.tell(cell, Outcome("running"))

    def _collect(self) -> None:
        for cell, process in list(self.running):
            if process.poll() is None:
                continue
            self.running.remove((cell, process))
            outcome = Outcome.of(cell)
            if process.returncode != 0 or outcome.status != "finished":
                outcome = Outcome("failed", reason=_reason(_log(self.logs, cell), process.returncode))
            self.tell(cell, outcome)

    def _stop(self) -> None:
        for _, process in self.running:
            process.send_signal(signal.SIGINT)
        for _, process in self.running:
            process.wait()
        self.running.clear()
        raise Interrupted("Stopped on request.")


def stop_with_parent() -> None:
    """Stop this process as ctrl-C does once its standard input ends: the sweep that started it is gone."""

    def watch() -> None:
        os.read(0, 1)  # not sys.stdin: waiting with its lock held makes Python abort when it exits
        os.kill(os.getpid(), signal.SIGINT)

    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job is started so
        signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=watch, daemon=True).start()


def _reason(log: Path, returncode: int) -> str:
    """What a process said last: its error, or the last line of its traceback."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    told = next((i for i, line in enumerate(lines) if line.startswith("error: ")), None)
    if told is not None:
        return _one_line("\n".join(lines[told:]).removeprefix("error: "))
    if returncode < 0:
        return f"killed by signal {-returncode} ({signal.Signals(-returncode).name}); log: {log}"
    return _one_line(lines[-1]) if lines else f"exit status {returncode}; log: {log}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _log(logs: Path, cell: Cell) -> Path:
    logs.mkdir(parents=True, exist_ok=True)
    return logs / f"{file_safe(cell.name)}.log"
