"""``holdfast learn``: one more task from a data set, into a folder that grows month after month."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from holdfast import world
from holdfast.config import half_character, override, validate
from holdfast.errors import ConfigError, DataError
from holdfast.hold.cost import advised_rank
from holdfast.importance.inputs import InputsOptions
from holdfast.learner import Learner, LearnerConfig
from holdfast.learner.config import ProtectBaseOptions, cannot_hold_base, recorded_config
from holdfast.learner.known import digest_of
from holdfast.learner.ownership import absolute_model, begun, begun_with, lasting, move_base
from holdfast.learner.skills import Skills, read_skills
from holdfast.models import onto_gpu
from holdfast.models.adapters import is_adapted
from holdfast.progress import Progress, stoppable
from holdfast.storage import as_utf8
from holdfast.tasks import load_task
from holdfast.tasks.options import left_out
from holdfast.tasks.problems import Problems
from holdfast.tasks.rows import Columns
from holdfast.tasks.sources import check_options
from holdfast.tasks.task import Example, MetricName, Task

# what kept most without an old row (docs/results.md)
DEFAULT = {"name": "attribution"}
KEPT_SHARE, KEPT_MOST = 0.1, 200  # of each data set, for testing what becomes of it
LONG_ANSWER = 6  # words; from here on answers are compared by ROUGE-L
SMALL = 30_000_000  # parameters; larger models are fine-tuned at a lower rate
CHANGEABLE = ("training", "evaluation", "threads", "keep")  # from task to task


def learn_data(
    data: Path,
    skills: Path,
    *,
    model: str | None = None,
    name: str | None = None,
    test: Path | None = None,
    metric: MetricName | None = None,
    columns: Sequence[str] = (),
    strategy: str | None = None,
    lora: bool = False,
    protect_base: bool | None = None,
    general: Path | None = None,
    assignments: Sequence[str] = (),
    progress: Progress,
) -> Skills:
    """Learn a data set on top of what a folder holds; the first one makes the folder.

    Killed at any moment, the same call continues. Called again for a data set that was learned, it does
    nothing.

    Parameters
    ----------
    data : path
        Whatever ``holdfast attribute --data`` takes.
    skills : path
        The folder.
    model : str, optional
        Folder or hub id; needed for the first task only.
    name : str, optional
        Of the task; by default that of the data.
    test : path, optional
        Rows to test the skill with; by default those of a ``test.jsonl`` beside the data, or a tenth of the
        rows, at most 200, which are then not trained on.
    metric : str, optional
        By default exact match, or ROUGE-L where half of the answers have more than five words; of running
        text perplexity. ``options`` needs a ``labels.json`` beside the data.
    columns : sequence of str
        Such as ``prompt=question``: other names of the columns of `data` and `test`, see `Columns`.
    protect_base : bool, optional
        Hold what the base can do, from rows that it writes itself; by default where its tokenizer has a chat
        template and the strategy can.
    general : path, optional
        Rows of this file instead; only before the first task.
    assignments : sequence of str
        ``key=value`` of the configuration; after the first task of `CHANGEABLE` sections only.

    Raises
    ------
    HoldfastError
        Anything is wrong, before training starts; or training fails.
    """
    world.start()
    skills = skills.expanduser()
    usual_rate = usual_frame = usual_rank = not begun(skills)
    if model is not None and begun(skills):
        move_base(skills, model)
    config = _config(skills, model, strategy, lora, assignments)
    usual_base = usual_frame and protect_base is None and "protect_base" not in config.model_fields_set
    config = _with_base(skills, config, protect_base, general)
    usual_base &= config.protect_base is None
    usual_rate &= "learning_rate" not in config.training.model_fields_set
    usual_frame &= not {"chat", "prompt"} & config.template.model_fields_set
    task = _task(data, name, test, metric, Columns.of(columns), config.seed, progress)
    usual = (usual_rate, usual_frame, usual_base, usual_rank)
    with stoppable(), _learner(skills, config, progress, *usual) as learner:
        if task.name in learner.learned:
            if learner.state.digests.get(task.name) != digest_of(task):
                raise ConfigError(
                    f"{skills}: a task '{task.name}' was learned already, from other rows or with another "
                    "metric. Give this one a name of its own with --name."
                )
            progress.say(f"{skills}: '{task.name}' is learned already; nothing to do.")
            return read_skills(skills)
        learner.config.training.check_machine()
        about = {"data": as_utf8(str(data))}
        with learner.task(
            task.name, task.train, task.test, metric=task.metric, options=task.options, about=about
        ) as learning:
            progress.say(
                f"learning '{task.name}': {len(task.train)} rows, {len(task.test)} kept aside, "
                f"{config.method}, learning rate {learner.config.training.learning_rate:g}"
            )
            learning.train()
    return read_skills(skills)


def _config(
    skills: Path, model: str | None, strategy: str | None, lora: bool, assignments: Sequence[str]
) -> LearnerConfig:
    model = None if model is None else absolute_model(model)
    if not begun(skills):
        values: dict[str, Any] = {"strategy": strategy or DEFAULT}
        if model is not None:
            values["model"] = {"path": model}
        if lora:
            values["model"] = {**values.get("model", {}), "lora": {}}
        values = override(values, assignments)
        if not values.get("model"):
            raise ConfigError(
                f"{skills}: nothing was learned here yet, so there is no model to go on with. Give --model, "
                "the folder or hub id of one."
            )
        return validate(LearnerConfig, values, "holdfast learn")
    recorded = recorded_config(skills, {})
    given = {"--strategy": strategy, "--lora": lora or None}
    there = {
        "--strategy": recorded.strategy.name,
        "--lora": bool(recorded.model and recorded.model.lora) or None,
    }
    for flag, value in given.items():
        if value is not None and value != there[flag]:
            has = f"{flag} {there[flag]}, not {value}" if value is not True else f"no {flag}"
            raise ConfigError(
                f"{skills}: what was learned here has {has}. Leave {flag} out, or begin another folder."
            )
    values = override(recorded.model_dump(mode="json"), assignments)
    config = validate(LearnerConfig, values, "holdfast learn")
    parts = [part for part in LearnerConfig.model_fields if part not in CHANGEABLE]
    fixed = [part for part in parts if lasting(config, part) != lasting(recorded, part)]
    if fixed:
        raise ConfigError(
            f"{skills}: {', '.join(fixed)} can't be changed once the first task has begun; what can: "
            f"{', '.join(CHANGEABLE)}. Leave it out, or begin another folder."
        )
    return config


def _with_base(
    skills: Path, config: LearnerConfig, protect_base: bool | None, general: Path | None
) -> LearnerConfig:
    """With what the two flags of the command say; after the first task they can only say what is there."""
    if protect_base is False and general is not None:
        raise ConfigError("--general FILE is what the base is held by; leave out --no-protect-base.")
    given = dict(config.protect_base.model_dump(exclude_unset=True)) if config.protect_base else {}
    if general is not None:
        given["general"] = str(general)
    wanted: Any = None if protect_base is False else given
    if general is None and protect_base in (None, config.protect_base is not None):
        return config
    if begun(skills):
        there = config.protect_base
        same = there is not None and validate(ProtectBaseOptions, given, "--general") == there
        if protect_base is not False and same:
            return config
        raise ConfigError(
            f"{skills}: whether the base is held was decided before the first task; leave out --protect-base "
            "and --general, or begin another folder."
        )
    values = {**config.model_dump(mode="json", exclude_unset=True), "protect_base": wanted}
    return validate(LearnerConfig, values, "holdfast learn")


def _learner(
    skills: Path,
    config: LearnerConfig,
    progress: Progress,
    usual_rate: bool,
    usual_frame: bool,
    usual_base: bool,
    usual_rank: bool,
) -> Learner:
    if config.model is None:  # begun in a script
        return Learner.load(skills, progress=progress, **config.model_dump(include=set(CHANGEABLE)))
    model, tokenizer = begun_with(skills, config.model, config.seed)
    onto_gpu(model)
    if usual_frame and getattr(tokenizer, "chat_template", None):  # as an instruct model is asked
        template = config.template.model_copy(update={"chat": True})
        config = config.model_copy(update={"template": template})
        progress.say("prompts go into a user turn of the tokenizer's chat template (template.chat)")
    instruct = bool(getattr(tokenizer, "chat_template", None))
    usual_base &= instruct and not cannot_hold_base(config.strategy, config.replay)
    if usual_base and config.memory == "generated":  # 69.5 together, 79.5 and 76.0 alone (docs/results.md)
        progress.say(
            "the base isn't held: a generated memory would train on its rows, which moves it and costs "
            "what is learned (--protect-base holds it all the same)"
        )
    elif usual_base:
        config = config.model_copy(update={"protect_base": ProtectBaseOptions(optional=True)})
        progress.say(
            "what the base can do is held from the start (protect_base; --no-protect-base leaves it)"
        )
    if usual_rate:
        training = config.training.model_copy(update={"learning_rate": _usual_rate(config, model)})
        config = config.model_copy(update={"training": training})
    if usual_rank:
        config = _ranked(config, model, progress)
    return Learner(model, tokenizer, config, folder=skills, progress=progress)


def _unranked(config: LearnerConfig) -> InputsOptions | None:
    """The importance by inputs, of which nobody has said how many directions to keep; None of any other."""
    found = getattr(config.strategy, "importance", None)
    return found if isinstance(found, InputsOptions) and "rank" not in found.model_fields_set else None


def _ranked(config: LearnerConfig, model: Any, progress: Progress) -> LearnerConfig:
    """With as many directions of each map as leave the prior smaller than the model."""
    importance = _unranked(config)
    rank = None if importance is None else advised_rank(model)
    if importance is None or rank is None:
        return config
    progress.say(
        f"{rank} directions of each map are held apart, and the mean of the others: whole matrices would "
        "take more than the model (strategy.importance.rank; null keeps all)"
    )
    importance = importance.model_copy(update={"rank": rank})
    return config.model_copy(
        update={"strategy": config.strategy.model_copy(update={"importance": importance})}
    )


def _usual_rate(config: LearnerConfig, model: Any) -> float:
    """What people train such a model at, where nobody says."""
    if is_adapted(model):
        return 2e-4
    return 1e-3 if sum(p.numel() for p in model.parameters()) < SMALL else 2e-5


def _task(
    data: Path,
    name: str | None,
    test: Path | None,
    metric: MetricName | None,
    columns: Columns,
    seed: int,
    progress: Progress,
) -> Task:
    """The rows to train on and those kept aside, and how answers are scored."""
    loaded = load_task(data, columns)
    if loaded.read_as:
        progress.say(f"{data}: read as {loaded.read_as}.")
    if name is not None and not name.strip():
        raise ConfigError(f"--name: a skill needs a name (got {name!r}); leave it out for '{loaded.name}'.")
    name = name or loaded.name
    if half_character(name):
        raise ConfigError(f"--name: {name!a} is no text in UTF-8, as a skill's name must be; give another.")
    train: Sequence[Example] = loaded.train
    tests: Sequence[Example] = loaded.test if test is None else load_task(test, columns).train
    if not tests:
        count = min(KEPT_MOST, round(KEPT_SHARE * len(loaded.train)))
        if count:
            tests = left_out(loaded.train, len(loaded.train) - count, seed, name, "learn")
            aside = {id(row) for row in tests}
            train = [row for row in loaded.train if id(row) not in aside]
            if len(tests) < count:
                progress.say(
                    f"{data}: {count - len(tests)} of the {count} rows drawn to be kept aside ask what is "
                    "trained on too, or are of a chat that is, so they can't tell what was learned: they are "
                    "trained on. --test FILE gives rows to be asked."
                )
    if not train:
        raise DataError(f"{data}: there are no rows to train on.")
    words = [len(row.completion.split()) for row in train]
    chosen: MetricName = "rouge_l" if median(words) >= LONG_ANSWER else "exact_match"
    if any(row.raw for row in (*train, *tests)):
        chosen = "perplexity"
    task = Task(name, list(train), list(tests), metric or chosen)
    if task.metric != "options":
        return task
    problems = Problems()
    give = "put a labels.json with a list of them into a folder, and the data as train.jsonl beside it"
    check_options(task, loaded.options, give, problems)
    problems.raise_if_any()
    return replace(task, options=loaded.options)
