"""A task as a script gives it: name, metric and allowed answers, settled before anything begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from holdfast.config import half_character
from holdfast.errors import ConfigError
from holdfast.tasks.problems import Problems
from holdfast.tasks.rows import as_examples
from holdfast.tasks.sources import check_options
from holdfast.tasks.task import Example, MetricName, Task


def given_task(
    name: str,
    train: Iterable[Example | Mapping[str, Any]],
    test: Iterable[Example | Mapping[str, Any]],
    metric: MetricName | None,
    options: Sequence[str],
) -> Task:
    """The task; by default it is scored by ``exact_match``, and running text by ``perplexity``.

    Raises
    ------
    ConfigError
        The name is none, there is no such metric, or there are options for a metric without.
    DataError
        A row is malformed, or an answer is none of the options.
    """
    if not isinstance(name, str) or not name.strip() or half_character(name):
        raise ConfigError(f"task: its name is {name!a}; give a text with a letter in it, such as 'june'.")
    if metric is not None and metric not in get_args(MetricName):
        allowed = ", ".join(get_args(MetricName))
        raise ConfigError(f"task '{name}': there is no metric {metric!r}; allowed: {allowed}.")
    rows, asked = as_examples(train), as_examples(test, needed=False)
    metric = metric or ("perplexity" if any(row.raw for row in asked) else "exact_match")
    task = Task(name, rows, asked, metric, tuple(options))
    if metric == "options":
        problems = Problems()
        check_options(task, task.options, "options=[...]", problems)
        problems.raise_if_any()
    elif options:
        raise ConfigError(
            f"task '{name}': `options` do nothing with the metric '{metric}'; leave them out, or give "
            'metric="options".'
        )
    return task
