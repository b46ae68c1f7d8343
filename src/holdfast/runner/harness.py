"""``holdfast harness``: lm-eval on the base and on the model as it stands, of a run or a folder of skills."""

from __future__ import annotations

from pathlib import Path

from holdfast.errors import ConfigError
from holdfast.evaluation.harness import HarnessOptions, Results, check_harness, run_harness
from holdfast.learner import Learner
from holdfast.learner.askable import check_askable
from holdfast.learner.config import LearnerEvaluationOptions
from holdfast.models import onto_gpu
from holdfast.progress import Progress
from holdfast.records import HarnessAnswers

HARNESS = "harness.json"


def harness_folder(folder: Path, options: HarnessOptions, progress: Progress) -> HarnessAnswers:
    """Ask lm-eval's tasks before anything was learned and now, and keep the results in ``harness.json``.

    Returns
    -------
    HarnessAnswers
        Without ``base`` where the base can't be had.

    Raises
    ------
    HoldfastError
        lm-eval is missing, a task is unknown, or there is no learner in the folder.
    """
    check_harness(options)  # before the model is loaded
    with Learner.load(folder, progress=progress) as learner:
        onto_gpu(learner.model)
        check_askable(
            learner.config.model_copy(update={"evaluation": LearnerEvaluationOptions(harness=options)})
        )
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
        found.write(folder / HARNESS)
    return found
