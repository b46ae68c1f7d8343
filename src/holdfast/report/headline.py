"""The one sentence on top of the report, computed from the metrics."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from holdfast.quantities import number, percent, short
from holdfast.records import Faithfulness
from holdfast.report.read import AttributionRecord
from holdfast.report.summary import Group, apart


def headline(groups: Sequence[Group], attributions: Sequence[AttributionRecord] = ()) -> str:
    """The one sentence that says what came out, computed from the metrics."""
    done = [g for g in groups if g.finished and g.mean("bwt") is not None and not g.joint]
    plain = next((g for g in done if g.strategy == "sequential"), None)
    others = [g for g in done if g.strategy != "sequential"]
    if plain and others:
        return _compare(max(others, key=_ap), plain)
    if plain or others:
        return _describe(max(done, key=_ap), len(done))
    if groups:
        furthest = max(groups, key=lambda group: group.runs[0].seen)
        waiting = (
            "No run has finished yet: " if len(groups) > 1 and not any(g.finished for g in groups) else ""
        )
        return waiting + _so_far(furthest)
    curves = [a.faithfulness for a in attributions if a.faithfulness]
    if curves:
        return faithfulness_sentence(curves[0])
    return "Where the model keeps what it knows: " + ", ".join(a.name for a in attributions) + "."


def _ap(group: Group) -> float:
    ap = group.mean("ap")
    return -1.0 if ap is None else ap


def _compare(best: Group, plain: Group) -> str:
    ours, theirs = best.mean("bwt") or 0.0, plain.mean("bwt") or 0.0
    if theirs > -1:
        claim = f"{plain.label} forgets almost nothing here, so there is little for {best.label} to keep"
    elif ours <= theirs:
        claim = (
            f"{best.label} forgets as much as {plain.label}"
            if ours == theirs
            else (f"{best.label} forgets more than {plain.label}")
        )
    elif ours >= 0:
        claim = f"{best.label} keeps all of what {plain.label} forgets"
    else:
        claim = f"{best.label} keeps {percent(100 * (1 - ours / theirs))} of what {plain.label} forgets"
    gap = apart(best, plain, "bwt")
    if theirs <= -1 and gap is not None and gap.holds_zero:
        claim = (
            f"What {best.label} keeps is not told apart from what {plain.label} does: the 95\u00a0% interval "
            f"of the difference, {number(gap.low, 0)} to {number(gap.high, 0)}, holds 0"
        )
    numbers = f"(BWT\u00a0{number(ours, 0)} vs\u00a0{number(theirs, 0)})"
    learned = (best.mean("learning_accuracy"), plain.mean("learning_accuracy"))
    if None not in learned:
        numbers += f", learning accuracy {number(learned[0], 0)} vs\u00a0{number(learned[1], 0)}"
    return f"{claim} {numbers}{_seeds(best, plain)}."


def _seeds(*groups: Group) -> str:
    counts = sorted({len(g.runs) for g in groups})
    return "" if counts == [1] else f"; means of {' and '.join(map(str, counts))} runs"


def _describe(group: Group, among: int) -> str:
    bwt = group.mean("bwt") or 0.0
    lost = "forgets nothing" if bwt >= 0 else f"forgets {number(-bwt, 0)} points of it"
    start = (
        f"{group.label} learns"
        if among == 1
        else f"Of {among} methods, {group.label} ends highest: it learns"
    )
    return (
        f"{start} its tasks to {percent(group.mean('learning_accuracy'))}, {lost}, and ends at "
        f"{percent(group.mean('ap'))} on average{_seeds(group)}."
    )


def _so_far(group: Group) -> str:
    run = group.runs[0]
    tasks = len(run.metrics.tasks)
    if group.joint and group.finished:
        return f"{group.label} learns all {tasks} tasks at once and reaches {percent(run.metrics.ap)}."
    if run.metrics.finished:
        return f"{group.label} ends at {percent(run.metrics.ap)} on average over {tasks} tasks."
    if run.seen == 0:
        return f"{group.label} has not learned any of its {tasks} tasks yet."
    known = [a for a in run.metrics.matrix[run.seen][: run.seen] if a is not None]
    mean = f", at {percent(statistics.fmean(known))} on average on those" if known else ""
    return f"{group.label} has learned {run.seen} of {tasks} tasks so far{mean}."


def faithfulness_sentence(curves: Faithfulness) -> str:
    """What the zeroing test found, at the percentage where importance and chance differ most."""
    ours, chance = curves.curves.get("importance", []), curves.curves.get("random", [])
    gaps = [
        (r - i, p, i, r)
        for p, i, r in zip(curves.percent, ours, chance, strict=False)
        if i is not None and r is not None and p > 0
    ]
    where = f" on {curves.task}" if curves.task else ""
    if not gaps:
        return f"Accuracy{where} after zeroing the weights called important."
    _, zeroed, important, random = max(gaps)
    return (
        f"Zeroing the {short(zeroed)}\u00a0% of weights called most important leaves {percent(important)} "
        f"accuracy{where}; as many random weights leave {percent(random)}."
    )
