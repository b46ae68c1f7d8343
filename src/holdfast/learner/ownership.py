"""A learner's folder, claimed: whose it is, and how its model is made again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from holdfast import world
from holdfast.config import differences, read_recorded, validate, write_recorded
from holdfast.environment import describe_environment, environment_recorded
from holdfast.errors import ConfigError, HoldfastError, ModelError, RunDirectoryError
from holdfast.folder import CONFIG, ENVIRONMENT, LOCK, Folder
from holdfast.learner.config import STAGES, LearnerConfig, recorded_config
from holdfast.learner.testing import VLLM_LOG
from holdfast.models import ModelOptions, float_type, load_model, load_saved, quantisation_of
from holdfast.models.base import identity_of
from holdfast.names import canonical_name
from holdfast.storage import write_json
from holdfast.tasks import toy_tokenizer

FIXED = ("strategy", "replay", "protect_base", "template", "seed")  # what can't be another later
TRAINED = "trained.json"  # of a model that was made in a script: which weights are trained
BEGAN = "began.json"  # of a task: what tells the base that it was learned on


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
        made = {
            "trained": names,
            "new_adapter": new_adapter,
            "quantised": quantisation_of(model),
            "dtype": float_type(model),
        }
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
    ours = {LOCK, CONFIG, TRAINED, STAGES, ENVIRONMENT, VLLM_LOG}
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


def lasting(config: LearnerConfig, part: str) -> Any:
    """What of a part of a configuration is not to be another later: where general text lies may be."""
    values = config.model_dump(mode="json", include={part})[part]
    if part == "replay" and values is not None and values["general"] is not None:
        del values["general"]["file"]
    return values


def _differing(before: LearnerConfig, now: LearnerConfig, old: str, new: str) -> Iterator[tuple[str, str]]:
    """Each part that is another, and in what."""
    for part in FIXED:
        then, here = lasting(before, part), lasting(now, part)
        found = [f"{key} ({a!r} {old}, {b!r} {new})" for key, a, b in differences(then, here, part)]
        if found:
            yield part, ", ".join(found)


def write_identity(stage: Path, identity: str | None) -> None:
    """Note with a task on which base it was learned."""
    if identity is not None:
        write_json(stage / BEGAN, {"base": identity})


def is_same_base(stage: Path, identity: str | None) -> bool | None:
    """Whether a base is the one that a task was learned on; None where that isn't known."""
    try:
        then = json.loads((stage / BEGAN).read_text(encoding="utf-8"))["base"]
    except FileNotFoundError:  # of an earlier version, quantised, or made in a script
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(f"{stage / BEGAN}: can't be read ({error}).") from error
    return None if identity is None else bool(then == identity)


def has_base(path: Path, options: ModelOptions, seed: int) -> bool | None:
    """Whether a model is the base of what was learned last in a folder; None where that can't be told.

    Raises
    ------
    HoldfastError
        It can't be loaded.
    """
    parts = Folder(path).parts(STAGES)
    if not parts:
        return None
    return is_same_base(path / parts[-1], identity_of(load_model(options, seed, toy_tokenizer)[0]))


def check_base(stage: Path, identity: str | None, config: LearnerConfig, *, adapted: bool) -> str:
    """See that the base is the one that a task was learned on; what is to be said if it isn't, else "".

    Parameters
    ----------
    adapted : bool
        Whether what answers is an adapter on the base: on another it is nonsense.

    Raises
    ------
    ModelError
        It is another, and what answers is an adapter on it.
    """
    if is_same_base(stage, identity) is not False:
        return ""
    folder = stage.parents[1]
    path = "Learner" if config.model is None else config.model.path
    told = f"{path}: these are not the weights that {stage.name} in {folder} was learned on"
    if not adapted:
        return (
            f"{told}. What was learned is whole in the folder and goes on; what is compared with the base is "
            "compared with these."
        )
    how = (
        f"say where they are (holdfast skills {shlex.quote(str(folder))} --model FOLDER)"
        if config.model is not None
        else "give Learner.load(folder, model, tokenizer) a model on them. Where the adapter's start changed "
        "them at random (init_lora_weights='pissa_niter_4') they can't be had again: begin with one that "
        "doesn't, such as 'pissa'"
    )
    raise ModelError(
        f"{told}, and the adapter there means nothing on others. Put the right ones back, or {how}."
    )


def move_base(path: str | Path, model: str) -> None:
    """Take note that the base of a learner's folder lies elsewhere now; of no base or the same, do nothing.

    Raises
    ------
    ConfigError
        The model there is another, or that can't be told.
    HoldfastError
        It can't be loaded, or another process works in the folder.
    """
    root = Path(path).expanduser()
    config = recorded_config(root, {})
    model = absolute_model(model)
    was = config.model.path if config.model is not None else None
    if model == was:
        return
    folder = Folder(root)
    if config.model is None or was is None or not folder.parts(STAGES):
        raise ConfigError(
            f"{root}: what was learned here has --model {was}, not {model}. Leave --model out, or begin "
            "another folder."
        )
    same = has_base(root, config.model.model_copy(update={"path": model}), config.seed)
    if not same:
        told = (
            "that is another model: its weights differ"
            if same is False
            else "whether that is the same can't be told (the folder is of an earlier version, or the "
            f"weights are quantised). If you know that it is, write it into {root / CONFIG} (model.path)"
        )
        raise ConfigError(
            f"{root}: what was learned here has --model {was}, not {model}, and {told}. Leave --model out if "
            "the old one is still there, or begin another folder."
        )
    folder.lock("learner")
    try:
        recorded = read_recorded(root / CONFIG)
        values = {**recorded, "model": {**recorded["model"], "path": model}}
        world.first(lambda: write_recorded(root / CONFIG, values))  # before any process reads it again
    finally:
        folder.release()


def absolute_model(model: str) -> str:
    """A folder's own path, so that the next call may come from anywhere; a hub id as it is."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model


def begun_with(path: Path, options: ModelOptions, seed: int) -> tuple[Any, Any]:
    """The model of a configuration; where it is gone from a folder that is begun, how to say where it is."""
    try:
        return load_model(options, seed, toy_tokenizer)
    except ModelError as error:
        where = None if options.path is None else Path(options.path)
        if where is None or not where.is_absolute() or where.exists() or not begun(path):
            raise
        raise ModelError(
            f"{error}\nIf it has moved, say once where it is: "
            f"holdfast skills {shlex.quote(str(path))} --model FOLDER"
        ) from error


def rebuilt(path: Path, config: LearnerConfig) -> tuple[Any, Any]:
    """Model and tokenizer as the learner began with them; the weights are put in later."""
    if config.model is not None:
        return begun_with(path, config.model, config.seed)
    parts = Folder(path).parts(STAGES)
    if not parts:
        raise ModelError(
            f"{path}: nothing was learned here yet, and the model was made in a script: give "
            "Learner.load(folder, model, tokenizer)."
        )
    try:
        made = json.loads((path / TRAINED).read_text())
        dtype = made.get("dtype", "float32")
        return load_saved(path / parts[-1] / "model", set(made["trained"]), made.get("quantised"), dtype)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(f"{path / TRAINED}: can't be read ({error}).") from error
    except HoldfastError as error:
        raise type(error)(
            f"{error}\nGive Learner.load(folder, model, tokenizer) the model that the learner began with."
        ) from error
