"""From the ``tasks:`` section of a configuration to a task stream, whatever the source."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, TypeVar, Union

from pydantic import Field

from holdfast.config import half_character
from holdfast.tasks.options import SourceOptions, left_out, subsample
from holdfast.tasks.orders import list_orders, match_task
from holdfast.tasks.problems import Problems, did_you_mean
from holdfast.tasks.task import Example, MetricName, Task, TaskStream

for _module in pkgutil.iter_modules(importlib.import_module("holdfast.tasks").__path__):
    if _module.name != "sources":  # each file defines its own source: there is no list to keep
        importlib.import_module(f"holdfast.tasks.{_module.name}")

T = TypeVar("T")
TasksOptions: Any = Annotated[
    Union[tuple(sorted(SourceOptions.__subclasses__(), key=lambda c: c.__name__))],  # noqa: UP007 - from the files
    Field(discriminator="source"),
]


def build_stream(
    config: SourceOptions, seed: int = 0, tell: Callable[[str], None] | None = None
) -> TaskStream:
    """Read the tasks of a source, in order, subsampled and with their metrics.

    Parameters
    ----------
    config : TasksOptions
        Options of any source.
    seed : int
        Draws the rows, unless `config.seed` does.
    tell : callable, optional
        Gets what was left out, and which form was recognised, in a line each.

    Raises
    ------
    DataError
        Anything is wrong with any task; one error names every problem.
    """
    stream, problems = inspect_stream(config, seed)
    problems.raise_if_any()
    if tell is not None:
        for remark in [*problems.left_out, *(line for task in stream for line in read_otherwise(task))]:
            tell(remark)
    return stream


def read_otherwise(task: Task) -> list[str]:
    """In which form a task was read, where that was told by its columns."""
    return [f"{task.name}: read as {task.read_as}."] if task.read_as else []


def inspect_stream(config: SourceOptions, seed: int = 0) -> tuple[TaskStream, Problems]:
    """Like `build_stream`, but hands back the problems with whatever could be read.

    ``problems.found`` are those that `build_stream` would raise, ``problems.skipped`` the rows that were left
    out under ``bad_rows: skip``.
    """
    skip = config.bad_rows == "skip"
    leave_out = "" if skip else "Mend such rows, or leave them out with tasks.bad_rows=skip."
    named = "columns" in type(config).model_fields
    columns = "Say which column is which, such as tasks.columns.prompt=question." if named else ""
    problems = Problems(skip_rows=skip, other_columns=columns, leave_out=leave_out)
    seed = seed if config.seed is None else config.seed
    names = _available(config, problems)
    order = _resolve_order(config, names, problems) if names else []
    metrics = _of_tasks(
        "metric", config.metric if isinstance(config.metric, dict) else {}, order or names, problems
    )
    allowed = _of_tasks("options", config.options, order or names, problems)
    read: dict[str, Task] = {}
    tasks = []
    for name, called in zip(order, _told_apart(order), strict=True):
        if name not in read:
            try:
                task = config.read(name, problems, seed)
            except OSError as error:
                problems.add(f"task '{name}'", _unreadable(error))
                continue
            if task is None:
                continue
            read[name] = _finish(task, config, metrics, allowed, problems, seed)
        tasks.append(replace(read[name], name=called, same_as=name if called != name else ""))
    title = config.order if isinstance(config.order, str) else config.title()
    return TaskStream(title, tuple(tasks)), problems


def ordered_names(config: SourceOptions, problems: Problems) -> list[str]:
    """The names of a stream's tasks in their order, without reading a row.

    Names are those of `TaskStream.names`: as the source writes them, and ``A (2)`` for a task that comes the
    second time. So a longer order extends a shorter one if its list begins with the other's.
    """
    names = _available(config, problems)
    return _told_apart(_resolve_order(config, names, problems)) if names else []


def _available(config: SourceOptions, problems: Problems) -> list[str]:
    try:
        return config.available(problems)
    except OSError as error:
        problems.add("tasks", _unreadable(error))
        return []


def _unreadable(error: OSError) -> str:
    return f"'{error.filename}' can't be read: {error.strerror or error}"


def _resolve_order(config: SourceOptions, names: list[str], problems: Problems) -> list[str]:
    """The source's names in the order that is asked for; one that comes again stands in it again."""
    for name in names:
        if not name.strip() or half_character(name):
            problems.add("tasks", f"the task {name!r} needs a name that can be written")
    if config.order is None:
        return names
    wanted = config.order
    if isinstance(wanted, str):
        orders = list_orders()
        if wanted not in orders:
            problems.add(
                "tasks.order",
                f"no order '{wanted}'.{did_you_mean(wanted, orders)} Or give a list of task names.",
            )
            return []
        wanted = orders[wanted]
    matches = {name: match_task(name, names) for name in wanted}
    found = [match for name in wanted if (match := matches[name]) is not None]
    missing = [name for name, match in matches.items() if match is None]
    if missing:
        what = f"no task{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))}"
        if not found and isinstance(config.order, str):
            what = f"'{config.order}' is an order of other tasks: {what}"
        problems.add("tasks.order", f"{what}.{did_you_mean(missing, names)}")
    if not wanted:
        problems.add("tasks.order", f"it is empty. Allowed: {', '.join(names)}.")
    again = {own for name, own in zip(found, _told_apart(found), strict=True) if own != name}
    for own in sorted(again & {*names}):
        problems.add(
            "tasks.order",
            f"a task that comes again would be called '{own}', and the source has a task of this name: "
            "rename that one",
        )
    return found


def _told_apart(order: Sequence[str]) -> list[str]:
    """Names of which none stands twice: ``A``, ``A (2)``, ``A (3)``."""
    seen: Counter[str] = Counter()
    names = []
    for name in order:
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names


def _of_tasks(
    setting: str, given: Mapping[str, T], names: Sequence[str], problems: Problems
) -> dict[str, tuple[str, T]]:
    """Of each task that a setting is given for, by its own name: the key that means it, and the value."""
    found: dict[str, tuple[str, T]] = {}
    for key, value in given.items() if names else ():
        name = match_task(key, names)
        if name is None:
            problems.add(f"tasks.{setting}", f"no task '{key}' in the stream.{did_you_mean(key, names)}")
        elif name in found:
            problems.add(
                f"tasks.{setting}",
                f"'{found[name][0]}' and '{key}' are both the task '{name}'; leave one out",
            )
        else:
            found[name] = key, value
    return found


def _finish(
    task: Task,
    config: SourceOptions,
    metrics: Mapping[str, tuple[str, MetricName]],
    allowed: Mapping[str, tuple[str, tuple[str, ...]]],
    problems: Problems,
    seed: int,
) -> Task:
    """Choose the rows and settle the metric."""
    key, options = allowed.get(task.name, (None, task.options))
    usual = "perplexity" if any(row.raw for row in task.train) else task.metric
    of_all = config.metric if isinstance(config.metric, str) else None
    _, metric = metrics.get(task.name, ("", of_all or usual))
    if metric == "options":
        where = f"give tasks.options.{task.name} or a labels.json"
        check_options(task, options, where, problems)
    elif key is not None:
        # below a metric of all tasks there is no key to set
        set_it = f"tasks.metric.{key}=options" if of_all is None else f"tasks.metric='{{{key}: options}}'"
        problems.add(
            f"tasks.options.{key}", f"does nothing with the metric '{metric}'; leave it out, or set {set_it}"
        )
    drawn = config.test_split == "validation" and not config.makes_validation
    tested = _validation_rows(task, config, problems, seed) if drawn else task.test
    return replace(
        task,
        train=subsample(task.train, config.train_rows, seed, task.name, "train"),
        test=subsample(tested, config.test_rows, seed, task.name, config.test_split),
        metric=metric,
        options=options,
    )


def _validation_rows(task: Task, config: SourceOptions, problems: Problems, seed: int) -> Sequence[Example]:
    """The training data that `train_rows` leaves out; too few of them are a problem."""
    left = left_out(task.train, config.train_rows, seed, task.name, "train")
    wanted = config.test_rows or 1
    if task.train and len(left) < wanted:
        trained = min(config.train_rows or len(task.train), len(task.train))
        most = len(task.train) - wanted
        advice = f"set tasks.train_rows to {most} or less" if most > 0 else "it is too small to be split"
        problems.add(
            f"task '{task.name}'",
            f"test_split: validation needs {wanted} rows{' (test_rows)' if config.test_rows else ''} that "
            f"training leaves out, but of {len(task.train)} training rows {trained} are trained on, and "
            f"{len(left)} with other prompts are left; {advice}",
        )
    return left


def check_options(task: Task, options: tuple[str, ...], give: str, problems: Problems) -> None:
    """See that there are allowed answers (or say how to `give` them), and every answer is one of them."""
    where = f"task '{task.name}'"
    if not options:
        problems.add(where, f"the metric 'options' needs the allowed answers: {give}")
        return
    answers = {answer for row in (*task.train, *task.test) for answer in row.answers}
    for answer in sorted(answers - set(options)):
        problems.add(where, f"the answer '{answer}' is none of its options ({', '.join(options)})")
