"""From a learner's folder back to where it was: the weights, the method's state, the tasks and their rows."""

from __future__ import annotations

import shlex

from holdfast.errors import ConfigError, DataError, ModelError, RunDirectoryError
from holdfast.learner.config import STAGES
from holdfast.learner.keep import thin
from holdfast.learner.known import ABOUT, TEST, read_about, read_task
from holdfast.learner.ownership import check_base, check_learned_under
from holdfast.learner.state import LearnerState
from holdfast.learner.testing import Testing
from holdfast.models import load_weights, unwrapped
from holdfast.models.adapters import is_adapted
from holdfast.records import StageMetrics


def restore(state: LearnerState, testing: Testing, identity: str | None, after: int | None) -> bool:
    """Put what was learned in the folder into the model, the strategy and the memory.

    Parameters
    ----------
    identity : str, optional
        What tells the base that the model was made on (`holdfast.models.base.identity_of`).
    after : int, optional
        As it was after so many tasks; by default after all.

    Returns
    -------
    bool
        Whether the folder holds later tasks.

    Raises
    ------
    HoldfastError
        The folder is damaged, its weights don't fit the model, or what is asked for is not kept.
    """
    folder = state.folder
    every = folder.parts(STAGES)
    if after is not None and not 0 <= after <= len(every):
        raise ConfigError(
            f"Learner: after={after}, but in {folder.path} {len(every)} tasks were learned; "
            f"allowed: 0 to {len(every)}."
        )
    parts, past = every[:after], after is not None and after < len(every)
    if not parts:
        return past
    problem = folder.problem(parts[-1])
    if problem is not None:
        raise RunDirectoryError(
            f"{folder.path / parts[-1]}: {problem}. Bring the folder back from a backup, or take "
            f"this task back (`holdfast skills {shlex.quote(str(folder.path))} --undo`) and learn it again."
        )
    last = folder.path / parts[-1]
    if folder.thinned(parts[-1]):
        raise RunDirectoryError(
            f"{last}: its weights are not kept (`keep: last` keeps those of the last two tasks), so the "
            "learner can't be had as it was then."
        )
    if settings := read_about(last).get("settings"):
        check_learned_under(state.config, folder.path, last, settings)
    adapted = is_adapted(unwrapped(state.model)) and not state.strategy.changes_base
    if remark := check_base(last, identity, state.config, adapted=adapted):
        state.context.progress.say(remark)
    try:
        load_weights(state.model, last / "model")
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelError(
            f"{last / 'model'}: these weights don't fit this model ({error!s:.300}). Give "
            "the model that the learner began with, or leave it to holdfast.Learner.load."
        ) from error
    state.read_strategy(last)
    state.read_memory(last)
    for part in parts:
        _recall(state, testing, part)
    if not past:  # a kill may have come between a task's commit and this
        thin(folder, STAGES, state.config.keep)
    return past


def _recall(state: LearnerState, testing: Testing, name: str) -> None:
    part = state.folder.path / name
    known = [ABOUT, TEST] if any((part / file).exists() for file in (ABOUT, TEST)) else []
    problem = state.folder.problem(name, ["metrics.json", *known])
    if problem is not None:
        raise RunDirectoryError(f"{part}: {problem}. Bring the folder back from a backup.")
    try:
        state.learned.append(StageMetrics.read(part / "metrics.json").stage)
        kept = read_task(part)
    except (OSError, ValueError, KeyError, TypeError, DataError) as error:
        raise RunDirectoryError(
            f"{part}: its files can't be read ({error}). Bring the folder back from a backup."
        ) from error
    if kept is not None:
        about = read_about(part)
        state.tests.append(kept)
        state.digests[kept.name] = str(about.get("digest"))
        testing.recall(kept.name, int(about.get("answer_tokens") or 0))
