"""Why a model gives an answer: looked at like any row, then explained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from holdfast.attribution import AttributionOptions
from holdfast.errors import ConfigError
from holdfast.evaluation.audit import require_sound
from holdfast.evaluation.evaluate import EvaluationOptions
from holdfast.importance.explanation import Explanation, explain_answer
from holdfast.tasks.encode import Encoder
from holdfast.tasks.problems import Problems
from holdfast.tasks.rows import to_example
from holdfast.tasks.task import Task


def explain(
    model: Any,
    encoder: Encoder,
    prompt: str | Sequence[Mapping[str, Any]],
    answer: str,
    options: AttributionOptions,
    *,
    instead_of: str | None = None,
    tell: Callable[[str], None],
) -> Explanation:
    """The relevance of each token and weight for an answer.

    Parameters
    ----------
    instead_of : str, optional
        Another answer to the same prompt: what speaks for the one and not for the other.
    tell : callable
        Gets what is cut, in a line each, and whether two answers are of different lengths.

    Raises
    ------
    HoldfastError
        Prompt or answer can't be encoded or don't fit, or an operation of the model has no rule.
    """
    if instead_of is not None and answer == instead_of:
        raise ConfigError(
            f"explain: {answer!r} is to be explained instead of itself; give two different answers."
        )
    problems, answers = Problems(), [answer] if instead_of is None else [answer, instead_of]
    examples = [to_example({"prompt": prompt, "completion": a}, "explain", problems) for a in answers]
    problems.raise_if_any()
    task = Task("explain", [example for example in examples if example is not None], ())
    encoder = encoder.apart()
    require_sound(task, encoder, model, EvaluationOptions(), tell)
    found = [explain_answer(model, encoder, example, options) for example in task.train]
    if instead_of is None:
        return found[0]
    contrast = found[0].instead_of(found[1])
    if contrast.uneven:
        of, against = contrast.logits
        tell(
            f"explain: {answer!r} has {of} tokens and {instead_of!r} {against}, so part of the difference of "
            "their summed logits is that of the lengths. Give answers of as many tokens, or compare their "
            "first ones: options target=first."
        )
    return contrast
