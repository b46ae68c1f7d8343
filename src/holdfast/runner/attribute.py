"""``holdfast attribute``: an importance prior of a model for a data set, and the test of its faithfulness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from holdfast.config import MAX_SEED, Options, override, validate
from holdfast.errors import ConfigError, DataError, RunDirectoryError
from holdfast.evaluation.audit import require_sound
from holdfast.evaluation.evaluate import EvaluationOptions
from holdfast.importance import ImportanceOptions, ImportancePrior, compute_prior
from holdfast.importance.prior import META, TENSORS
from holdfast.importance.registry import REGISTRY
from holdfast.importance.stored import Width
from holdfast.learner.config import recorded_config, require_learner
from holdfast.models import ModelOptions, is_encoder_decoder, load_model
from holdfast.models.adapters import is_adapter
from holdfast.progress import Progress
from holdfast.quantities import count, number, short
from holdfast.records import PriorMeta
from holdfast.resume import Partial
from holdfast.runner.config import load_config
from holdfast.runner.faithfulness import FAITHFULNESS, faithfulness_in_folder
from holdfast.storage import sha256
from holdfast.tasks import Encoder, Template, load_task, toy_tokenizer
from holdfast.tasks.rows import Columns


class AttributeConfig(Options):
    """What ``holdfast attribute`` can be told."""

    importance: ImportanceOptions
    template: Template = Field(default_factory=Template)
    evaluation: EvaluationOptions = Field(default_factory=EvaluationOptions)
    model: ModelOptions
    store: Width = Field("float32", description="the prior's numbers on disk")
    seed: int = Field(0, ge=0, le=MAX_SEED)


SECTIONS = ("template", "evaluation", "importance")


def attribute_to_folder(
    *,
    model: str,
    data: Path,
    out: Path,
    importance: str,
    assignments: Sequence[str],
    faithfulness: bool,
    dtype: str,
    seed: int,
    progress: Progress,
    like: Path | None = None,
    store: str = "float32",
    columns: Sequence[str] = (),
) -> ImportancePrior:
    """Compute a prior and write it to a folder; with `faithfulness` also ``faithfulness.json``.

    `like` is the folder of a run or of a learner, or a run's configuration, whose ``template`` and
    ``evaluation`` hold unless the assignments say otherwise. `store` is the prior's width on disk, see
    `ImportancePrior.save`. `columns` are other names of the data's columns (``prompt=question``).

    While both are computed, what there is stands in ``partial`` in that folder. Called again after a kill
    with the same arguments, it goes on from there; the result is that of an uninterrupted one, bit for bit.

    Raises
    ------
    HoldfastError
        The options, the configuration, the model or the data are wrong, or attribution of this model can't
        be trusted.
    """
    qualified = [a if a.split(".")[0] in SECTIONS else f"importance.{a}" for a in assignments]
    values: dict[str, Any] = {
        **({} if like is None else _sections_of(like)),
        "importance": {"name": importance},
        "model": {"path": model, "dtype": dtype, "trainable": None if is_adapter(model) else "all"},
        "store": store,
        "seed": seed,
    }
    config = validate(AttributeConfig, override(values, qualified), source="holdfast attribute")
    if faithfulness and REGISTRY[config.importance.name].kind != "weights":
        raise ConfigError(
            f"--test-faithfulness zeroes the weights that a prior calls important, and '{importance}' rates "
            "directions of inputs. Leave it out, or choose an importance by weight such as lrp."
        )
    idle = [a for a in assignments if a.split("=")[0].split(".")[0] == "evaluation" and not faithfulness]
    if idle:
        raise ConfigError(
            f"--set {idle[0]} does nothing without --test-faithfulness: nothing is asked. Leave it out."
        )
    _require_replaceable(out, config)
    task = load_task(data, Columns.of(columns))
    if task.read_as:
        progress.say(f"{data}: read as {task.read_as}.")
    if faithfulness and not task.test:
        raise DataError(
            f"{data}: --test-faithfulness needs test rows: put a test file beside the training file."
        )
    loaded, tokenizer = load_model(config.model, seed, toy_tokenizer)
    encoder = Encoder(tokenizer, config.template, encoder_decoder=is_encoder_decoder(loaded))
    looked_at = task if faithfulness else replace(task, test=())
    require_sound(looked_at, encoder, loaded, config.evaluation, progress.say)
    rows = encoder.many(task.train)
    partial = Partial(out / "partial", progress.say)
    with progress.bar(f"importance of {task.name}", total=len(rows)) as bar:
        prior = compute_prior(
            loaded,
            rows,
            config.importance,
            pad_id=tokenizer.pad_token_id,
            seed=seed,
            task=task.name,
            progress=bar,
            partial=partial,
        )
    before = _digest_of(out)
    prior.save(out, config.store)
    if _digest_of(out) != before:
        if before is not None:
            progress.say(
                f"{out}: the prior that was there was of another model, data or template, or stored "
                "otherwise; replaced."
            )
        (out / FAITHFULNESS).unlink(missing_ok=True)  # of another prior
    what = (
        f"{count(prior.elements)} weights" if prior.kind == "weights" else "one matrix a linear map's inputs"
    )
    progress.say(f"Prior: {out} ({len(prior)} tensors, {what})")
    if faithfulness:
        with progress.bar("faithfulness", total=1) as bar:
            result = faithfulness_in_folder(
                loaded,
                tokenizer,
                task,
                encoder,
                prior=prior,
                options=config.evaluation,
                seed=seed,
                out=out,
                partial=Partial(out / "partial", progress.say, "faithfulness"),
                progress=bar,
            )
        for choice, curve in result.curves.items():
            progress.say(
                f"  {choice:>10}: "
                + "  ".join(f"{short(p)} %: {number(a)}" for p, a in zip(result.percent, curve, strict=True))
            )
    partial.clear()
    return prior


def _require_replaceable(out: Path, config: AttributeConfig) -> None:
    """See that a finished prior in a folder is one of the same importance, options and seed."""
    try:
        there = PriorMeta.read(out / META) if (out / TENSORS).is_file() else None
    except DataError:  # torn: it is computed again
        there = None
    if there is None:
        return
    options = config.importance.model_dump(mode="json")
    asked = {"importance": options.pop("name"), "options": options, "seed": config.seed}
    kept = {key: getattr(there, key) for key in asked}
    if kept != asked:
        got = ", ".join(
            f"{key} {kept[key]} there, {asked[key]} asked for" for key in asked if kept[key] != asked[key]
        )
        raise ConfigError(
            f"--out {out}: holds a finished prior that was made otherwise ({got}). Give a new folder, or "
            "remove that one."
        )


def _digest_of(folder: Path) -> str | None:
    """Of the prior in a folder, if there is one."""
    file = folder / TENSORS
    return sha256(file) if file.is_file() else None


def _sections_of(path: Path) -> dict[str, Any]:
    """How a run or a learner shapes its prompts and tests its answers."""
    try:
        if path.is_dir():
            require_learner(path)
        config = recorded_config(path, {}) if path.is_dir() else load_config(path)
    except (ConfigError, RunDirectoryError) as error:
        raise ConfigError(
            f"--config takes the folder of a run or of skills, or a file for `holdfast run`.\n{error}"
        ) from error
    asked = config.evaluation.model_dump(include=set(EvaluationOptions.model_fields))
    return {"template": config.template.model_dump(), "evaluation": asked}
