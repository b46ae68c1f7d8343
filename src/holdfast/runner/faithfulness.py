"""The faithfulness of a prior, measured beside it: continues after a kill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast.evaluation.evaluate import EvaluationOptions
from holdfast.evaluation.faithfulness import Curves, measure_faithfulness
from holdfast.importance import ImportancePrior
from holdfast.models import block_parameters
from holdfast.storage import sha256, write_json
from holdfast.tasks import Encoder
from holdfast.tasks.task import Task


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
    progress: Callable[[int, int], None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure the faithfulness of the prior saved in `out`, and write ``faithfulness.json`` there.

    Each point is kept in ``partial/faithfulness.json`` once it is measured, for a later call to go on from;
    the caller removes that folder. Points of another prior, model, template or test are not used, and `say`
    is told so.

    Returns
    -------
    dict
        As `measure_faithfulness`.
    """
    file = out / "partial" / "faithfulness.json"
    identity = {
        "prior": sha256(out / "prior.safetensors"),
        "model": prior.meta["model_digest"],
        "template": encoder.template.model_dump(mode="json"),
        "evaluation": options.model_dump(mode="json"),
        "seed": seed,
        "test": hashlib.sha256(repr((task.metric, task.options, task.test)).encode()).hexdigest(),
    }
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
        known=_known(file, identity, say),
        keep=lambda curves: write_json(file, {"identity": identity, "curves": curves}),
    )
    write_json(out / "faithfulness.json", result)
    return result


def _known(file: Path, identity: dict[str, Any], say: Callable[[str], None]) -> Curves | None:
    if not file.is_file():
        return None
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        say(f"{file}: can't be read ({error}); starting over.")
        return None
    if changed := [key for key, value in identity.items() if kept["identity"].get(key) != value]:
        say(f"{file}: begun with another {', '.join(changed)}; starting over.")
        return None
    say(f"{file}: continuing after {sum(map(len, kept['curves'].values()))} points.")
    return kept["curves"]
