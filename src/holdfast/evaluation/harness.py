"""EleutherAI's evaluation harness (PyPI ``lm-eval``) on a model in memory: its tasks and its scores."""

from __future__ import annotations

import copy
import importlib.util
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from holdfast.config import Options
from holdfast.errors import ConfigError

Results = Mapping[str, Mapping[str, float | None]]  # task to metric to value, under lm-eval's own names


class HarnessOptions(Options):
    """Which tasks of the harness, and how much of them."""

    tasks: tuple[str, ...] = Field(min_length=1, description="names of lm-eval's tasks, such as arc_easy")
    include_path: str | None = Field(None, description="folder with task files (YAML) of your own")
    limit: int | None = Field(None, ge=1, description="at most that many questions a task")
    batch_size: int = Field(16, ge=1)
    chat: bool = Field(False, description="ask through the tokenizer's chat template (apply_chat_template)")


def named_tasks(value: Any) -> Any:
    """Let a list of names stand for the section."""
    return {"tasks": value} if isinstance(value, list | tuple) else value


def check_harness(options: HarnessOptions, tokenizer: Any = None) -> None:
    """See that lm-eval is there and knows the tasks, and that the tokenizer can frame them.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase, optional

    Raises
    ------
    ConfigError
        It isn't, or doesn't; the message says how to install it, or which tasks it does not know. Or
        ``chat`` is asked for, and the tokenizer has no chat template.
    """
    if options.chat and tokenizer is not None and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "evaluation.harness.chat: got true, and the tokenizer has no chat template to ask through. Leave "
            "`chat` (--chat) out, or give the tokenizer a chat template."
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "evaluation.harness: lm-eval isn't installed. Install it with pip install 'holdfast[harness]', "
            "or leave evaluation.harness out."
        )
    _tasks(options)


def _tasks(options: HarnessOptions) -> Any:
    """lm-eval's index of tasks: of the user's own folder alone where all are in it, which is quick."""
    own = options.include_path
    if own is not None and not Path(own).is_dir():
        raise ConfigError(f"evaluation.harness.include_path: {own} is no folder.")
    unknown: list[str] = []
    for defaults in (False, True) if own is not None else (True,):
        index = _index(own, defaults)
        unknown = [name for name in options.tasks if name not in index.all_tasks]
        if not unknown:
            return index
    where = f"or in {own}" if own else "(include_path: a folder of your own)"
    raise ConfigError(
        f"evaluation.harness: no task {', '.join(map(repr, unknown))} among those of lm-eval {where}. "
        "`lm-eval ls tasks` lists what there is."
    )


@lru_cache(maxsize=4)  # reading some ten thousand task files takes seconds
def _index(own: str | None, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=own, include_defaults=defaults)


def run_harness(model: Any, tokenizer: Any, options: HarnessOptions) -> Results:
    """Ask a model the tasks; neither the model nor any generator of random numbers is changed.

    Returns
    -------
    dict
        Task to metric to value, as far as it is a finite number; metrics under lm-eval's names,
        such as ``acc,none`` and ``acc_stderr,none``.

    Raises
    ------
    ConfigError
        As `check_harness`.
    """
    check_harness(options, tokenizer)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    training = model.training
    with _generators_kept():
        asked = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=options.batch_size,
        )
        found = simple_evaluate(
            model=asked,
            tasks=list(options.tasks),
            task_manager=_tasks(options),
            limit=options.limit,
            apply_chat_template=options.chat,
            bootstrap_iters=0,
            log_samples=False,
        )
    model.train(training)
    assert found is not None
    return {
        task: {metric: float(v) for metric, v in scores.items() if "," in metric and _is_score(v)}
        for task, scores in found["results"].items()
    }


def _is_score(value: Any) -> bool:
    """JSON knows no other numbers than finite ones; a standard error may be text."""
    return isinstance(value, int | float) and math.isfinite(value)


@contextmanager
def _generators_kept() -> Iterator[None]:
    """lm-eval seeds the generators of Python, numpy and torch; a training that goes on must not notice."""
    import numpy as np

    python, numpy = random.getstate(), np.random.get_state()
    cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def courses(results: Sequence[Results | None]) -> dict[str, list[float | None]]:
    """The scores of several moments, metric by metric: ``"arc_easy acc"`` to a value each.

    Standard errors are left out, and so is lm-eval's name of a filter that does nothing.
    """
    names: dict[tuple[str, str], None] = {}
    for scores in results:
        for task, metrics in (scores or {}).items():
            names.update({(task, metric): None for metric in metrics if "_stderr" not in metric})
    return {
        f"{task} {metric.removesuffix(',none')}": [_value(scores, task, metric) for scores in results]
        for task, metric in names
    }


def _value(results: Results | None, task: str, metric: str) -> float | None:
    return None if results is None else results.get(task, {}).get(metric)
