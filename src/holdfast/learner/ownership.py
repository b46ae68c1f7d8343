"""A learner's folder, claimed: whose it is, and how its model is made again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from holdfast.config import differences, validate, write_recorded
from holdfast.environment import describe_environment, environment_recorded
from holdfast.errors import HoldfastError, ModelError, RunDirectoryError
from holdfast.folder import CONFIG, ENVIRONMENT, LOCK, Folder
from holdfast.learner.config import STAGES, LearnerConfig, recorded_config
from holdfast.models import load_model, load_saved, quantisation_of
from holdfast.names import canonical_name
from holdfast.storage import write_json
from holdfast.tasks import toy_tokenizer

FIXED = ("strategy", "replay", "protect_base", "template", "seed")  # what can't be another later
TRAINED = "trained.json"  # of a model that was made in a script: which weights are trained


def claim(folder: Folder, config: LearnerConfig, model: Any, new_adapter: bool) -> None:
    """See that a folder belongs to this configuration; where nothing was begun it takes it over.

    Raises
    ------
    RunDirectoryError
        Something else stands in the folder, or what was learned there has another strategy.
    """
    path = folder.path
    if begun(path):
        _check_same(recorded_config(path, {}), config, path)
        if not environment_recorded(path / ENVIRONMENT):
            write_json(path / ENVIRONMENT, describe_environment(config.seed))
        return
    others = _strangers(path)
    if others:
        raise RunDirectoryError(
            f"{path}: not empty and not a learner's folder (found {', '.join(others[:5])}). "
            "Choose a new or empty folder."
        )
    (path / TRAINED).unlink(missing_ok=True)
    if config.model is None:
        names = [canonical_name(n) for n, p in model.named_parameters() if p.requires_grad]
        made = {"trained": names, "new_adapter": new_adapter, "quantised": quantisation_of(model)}
        write_json(path / TRAINED, made)
    write_json(path / ENVIRONMENT, describe_environment(config.seed))
    values = config.model_dump(mode="json", include=set(LearnerConfig.model_fields))
    write_recorded(path / CONFIG, values)


def began_new(path: Path) -> bool:
    """Whether a folder was begun with a new adapter; what is rebuilt from it has been trained since."""
    try:
        return bool(json.loads((path / TRAINED).read_text()).get("new_adapter"))
    except (OSError, ValueError, AttributeError):
        return False


def begun(path: Path) -> bool:
    """Whether anything was begun in a learner's folder; before that another configuration may take it.

    Raises
    ------
    RunDirectoryError
        Something was, and its configuration is gone.
    """
    folder = Folder(path)
    stages = folder.parts(STAGES) or folder.partial(STAGES)
    if stages and not (path / CONFIG).is_file():
        raise RunDirectoryError(
            f"{path / CONFIG}: is missing, and {stages[-1]} was learned under what it said. Put it back "
            "from a copy, or choose another folder."
        )
    return (path / CONFIG).is_file() and bool(stages or _strangers(path))


def _strangers(path: Path) -> list[str]:
    """What lies in a folder beside that which a learner writes before its first task."""
    ours = {LOCK, CONFIG, TRAINED, STAGES, ENVIRONMENT}
    return sorted(p.name for p in path.iterdir() if p.name[0] != "." and p.name not in ours)


def _check_same(recorded: LearnerConfig, config: LearnerConfig, path: Path) -> None:
    """What was begun under one strategy can't go on under another."""
    for part, different in _differing(recorded, config, "there", "here"):
        raise RunDirectoryError(
            f"{path}: what was learned here has another {part}: {different}. Go on with what is there "
            "(holdfast.Learner.load does), or choose another folder."
        )


def check_learned_under(config: LearnerConfig, path: Path, stage: Path, settings: Mapping[str, Any]) -> None:
    """See that a folder's configuration is still the one that its last task was learned under.

    Raises
    ------
    RunDirectoryError
        It was replaced by another.
    """
    for part, different in _differing(validate(LearnerConfig, settings, str(stage)), config, "then", "now"):
        raise RunDirectoryError(
            f"{path / CONFIG}: has another {part} than {stage.name} was learned under: {different}. Put the "
            "right one back from a copy."
        )


def _differing(before: LearnerConfig, now: LearnerConfig, old: str, new: str) -> Iterator[tuple[str, str]]:
    """Each part that is another, and in what: of another strategy its name says enough."""
    for part in FIXED:
        then, here = (config.model_dump(mode="json", include={part})[part] for config in (before, now))
        found = {key: f"{key} ({a!r} {old}, {b!r} {new})" for key, a, b in differences(then, here, part)}
        if found:
            name = found.get(f"{part}.name")
            yield part, ", ".join(found.values()) if name is None else name


def rebuilt(path: Path, config: LearnerConfig) -> tuple[Any, Any]:
    """Model and tokenizer as the learner began with them; the weights are put in later."""
    if config.model is not None:
        return load_model(config.model, config.seed, toy_tokenizer)
    parts = Folder(path).parts(STAGES)
    if not parts:
        raise ModelError(
            f"{path}: nothing was learned here yet, and the model was made in a script: give "
            "Learner.load(folder, model, tokenizer)."
        )
    try:
        made = json.loads((path / TRAINED).read_text())
        return load_saved(path / parts[-1] / "model", set(made["trained"]), made.get("quantised"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(f"{path / TRAINED}: can't be read ({error}).") from error
    except HoldfastError as error:
        raise type(error)(
            f"{error}\nGive Learner.load(folder, model, tokenizer) the model that the learner began with."
        ) from error
