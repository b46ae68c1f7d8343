"""The faithfulness of a prior, measured beside it: continues after a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast.evaluation.evaluate import EvaluationOptions
from holdfast.evaluation.faithfulness import Curves, measure_faithfulness
from holdfast.importance import ImportancePrior
from holdfast.learner.known import asked_digest_of
from holdfast.models import block_parameters
from holdfast.records import Faithfulness
from holdfast.resume import Partial
from holdfast.storage import sha256
from holdfast.tasks import Encoder
from holdfast.tasks.task import Task

FAITHFULNESS = "faithfulness.json"


def faithfulness_in_folder(
    model: Any,
    tokenizer: Any,
    task: Task,
    encoder: Encoder,
    *,
    prior: ImportancePrior,
    options: EvaluationOptions,
    seed: int,
    out: Path,
    partial: Partial,
    progress: Callable[[int, int], None],
) -> Faithfulness:
    """Measure the faithfulness of the prior saved in `out`, and write ``faithfulness.json`` there.

    The points are kept in `partial` as they are measured, for a later call to go on from; the caller clears
    it. Points of another prior, model, template or test are not used.
    """
    partial.identity = {
        "prior": sha256(out / "prior.safetensors"),
        "model": prior.meta["model_digest"],
        "template": encoder.template.model_dump(mode="json"),
        "evaluation": options.model_dump(mode="json"),
        "seed": seed,
        "test": asked_digest_of(task),
    }
    partial.every = 0.0  # a point takes a pass over the test rows, and is a few bytes
    state = partial.load()
    known: Curves | None = None if state is None else state[1]["curves"]
    if known is not None:
        partial.say(f"{partial.file}: continuing after {sum(map(len, known.values()))} points.")

    def keep(curves: Curves) -> None:
        if partial.due:
            partial.save({}, {"curves": curves})

    result = measure_faithfulness(
        model,
        tokenizer,
        task,
        encoder,
        importance=prior.tensors,
        parameters=block_parameters(model),
        options=options,
        seed=seed,
        progress=progress,
        known=known,
        keep=keep,
    )
    result.write(out / FAITHFULNESS)
    return result
