"""Rows that the model answers right; and all of them, told, where it answers none right."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from holdfast.attribution.engine import AttributionReport
from holdfast.errors import NoCorrectSampleError
from holdfast.importance.registry import Inputs


def of_right_rows(
    inputs: Inputs, attribute: Callable[[bool], AttributionReport], correct_only: bool
) -> tuple[AttributionReport, dict[str, Any]]:
    """Attribute the rows that are answered right; if there are none, all rows.

    A stream must not end because one task is too hard to be learned: what the model answers there is not
    right, but it is what it would answer.

    Parameters
    ----------
    attribute : callable
        ``(correct_only) -> report``. It is called a second time only if nothing was folded in the first.

    Returns
    -------
    report : AttributionReport
    record : dict
        For the prior's record: whether only right rows were rated.
    """

    def begun_with(only: bool) -> AttributionReport:
        if inputs.partial is not None:  # a kill's state is not to be gone on from by the other of the two
            inputs.partial.identity["correct_only"] = only
        return attribute(only)

    try:
        return begun_with(correct_only), {"correct_only": correct_only}
    except NoCorrectSampleError:
        say = getattr(inputs.progress, "say", warnings.warn)
        say(
            "importance: the model answers none of the samples right, so all of them are rated. "
            "What it holds is how it answers, not what is right; train longer, or look at the task's rows."
        )
    return begun_with(False), {"correct_only": False, "none_right": True}
