"""``holdfast harness``: lm-eval on the base and on the model as it stands, of a run or a folder of skills."""

from __future__ import annotations

from pathlib import Path

from holdfast.errors import ConfigError
from holdfast.evaluation.harness import HarnessOptions, Results, check_harness, run_harness
from holdfast.learner import Learner
from holdfast.learner.askable import check_askable
from holdfast.learner.asked import HARNESS, behind
from holdfast.learner.config import LearnerEvaluationOptions
from holdfast.models import onto_gpu
from holdfast.progress import Progress
from holdfast.records import HarnessAnswers


def harness_folder(folder: Path, options: HarnessOptions, progress: Progress) -> HarnessAnswers:
    """Ask lm-eval's tasks before anything was learned and now, and add the results to ``harness.json``.

    Returns
    -------
    HarnessAnswers
        What was said now; without ``base`` where the base can't be had.

    Raises
    ------
    HoldfastError
        lm-eval is missing, a task is unknown, or there is no learner in the folder.
    """
    check_harness(options)  # before the model is loaded
    file = folder / HARNESS
    before = HarnessAnswers.read(file) if file.is_file() else None
    with Learner.load(folder, progress=progress) as learner:
        onto_gpu(learner.model)
        asked = LearnerEvaluationOptions(harness=options)
        check_askable(learner.config.model_copy(update={"evaluation": asked}), tokenizer=learner.tokenizer)
        progress.say(f"{folder}: asking {', '.join(options.tasks)}: the base, then the model as it stands")
        base: Results | None = None
        try:
            with learner.state.base.answering(learner.model) as model:
                base = run_harness(model, learner.tokenizer, options)
        except ConfigError as error:
            progress.say(f"The base isn't asked: {error}")
        learner.state.base.free()
        now = run_harness(learner.route(), learner.tokenizer, options)
        found = HarnessAnswers(
            base=base, now=now, learned=list(learner.learned), options=options.model_dump(mode="json")
        )
        (found if before is None else behind(before, found)).write(file)
    return found
