"""What lm-eval said of a learner's folder: along the way, and where ``holdfast harness`` asked afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.evaluation.harness import courses
from holdfast.records import HarnessAnswers, StageMetrics

HARNESS = "harness.json"

Courses = Mapping[str, Sequence[float | None]]
# how much of a task is asked, and whether through a chat template: scores compare in one way alone
Way = tuple[int | None, bool]


def way_of(options: Mapping[str, Any]) -> Way:
    """What in the options of a harness changes a task's score."""
    return options.get("limit"), bool(options.get("chat"))


def behind(before: HarnessAnswers, now: HarnessAnswers) -> HarnessAnswers:
    """What was said now, behind what was said before: of that, the same tasks in the same way make room."""

    def again(known: HarnessAnswers) -> bool:
        same = known.learned == now.learned and way_of(known.options) == way_of(now.options)
        return same and set(now.options["tasks"]) >= set(known.options.get("tasks", known.now))

    return now.model_copy(update={"earlier": tuple(a for a in before.every if not again(a))})


def forget_others(folder: Path, learned: Sequence[str]) -> None:
    """Take out of ``harness.json`` what was asked when other tasks had been learned than these, in order."""
    file = folder / HARNESS
    if not file.is_file():
        return
    every = HarnessAnswers.read(file).every
    kept = [answers for answers in every if answers.learned == list(learned)[: len(answers.learned)]]
    if not kept:
        file.unlink()
    elif len(kept) < len(every):
        kept[-1].model_copy(update={"earlier": tuple(kept[:-1])}).write(file)


def along_the_way(stages: Sequence[StageMetrics]) -> dict[str, list[float | None]]:
    """The scores before the first stage and after each.

    Where stages were asked in several ways, each has its courses; one that begins later says so.
    """
    ways = [way_of(stage.harness_options) if stage.harness_options else None for stage in stages]
    known = list(dict.fromkeys(way for way in ways if way is not None)) or [(None, False)]
    found: dict[str, list[float | None]] = {}
    for way in known:
        moments: list[dict[str, Mapping[str, float | None]]] = [{} for _ in range(len(stages) + 1)]
        for i, (stage, its) in enumerate(zip(stages, ways, strict=True)):
            if its == way or (its is None and way == known[0]):  # of an earlier version
                moments[i] |= stage.harness_before or {}
                moments[i + 1] |= stage.harness or {}
        for name, scores in courses(moments).items():
            begin = next((i for i, score in enumerate(scores) if score is not None), 0)
            since = f"first asked before {stages[begin].stage}" if 0 < begin < len(stages) else ""
            found[_noted(name, since, *(_told(way) if len(known) > 1 else ()))] = scores
    return found


def ends(scores: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Of a course the first score, which is from before something was learned, and the last moment's."""
    return next((score for score in scores[:-1] if score is not None), None), scores[-1]


def with_asked(along: Courses, folder: Path, learned: Sequence[str] | int) -> dict[str, list[float | None]]:
    """The scores that were taken along the way, and those of ``harness.json``, which say when and of what.

    Parameters
    ----------
    along : mapping
        ``arc_easy acc`` to the scores before the first task and after each.
    folder : Path
    learned : sequence of str or int
        The tasks learned so far, or how many where their names aren't known.

    Raises
    ------
    DataError
        The file is torn.
    """
    found = {name: list(scores) for name, scores in along.items()}
    file = folder / HARNESS
    for answers in HarnessAnswers.read(file).every if file.is_file() else ():
        then = answers.learned
        same = len(then) == learned if isinstance(learned, int) else then == list(learned)
        when = f"asked after {then[-1]}" if then and not same else "asked afterwards" if along else ""
        for name, scores in courses([answers.base, answers.now]).items():
            found[_noted(name, when, *_told(way_of(answers.options)))] = scores
    return found


def _told(way: Way) -> tuple[str, str]:
    limit, chat = way
    return f"limit {limit}" if limit else "", "chat" if chat else ""


def _noted(name: str, *notes: str) -> str:
    note = ", ".join(filter(None, notes))
    return f"{name} ({note})" if note else name
