"""Checkpoints inside a task: a checkpoint counts only once its seal (sizes and digests) is on disk."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from holdfast import world
from holdfast.manifest import problem_of, write_manifest
from holdfast.storage import give_usual_mode
from holdfast.training.parts import misfit

SEAL = "seal.json"
_OURS = "holdfast"  # a folder in a checkpoint: vLLM takes every *.safetensors beside the model's for weights


def ours(checkpoint: Path, name: str) -> Path:
    """Where a file of ours is in a checkpoint, or goes; in those of earlier versions beside the model's."""
    before = checkpoint / name
    return before if before.is_file() else checkpoint / _OURS / name


def own_checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint of this step in a trainer's own folder."""
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def saved_checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint of this step: a search for hyperparameters saves each trial in a folder of its own.

    What the trial's folder is called only the trainer knows, so it is the one whose state was written last.
    """
    own = own_checkpoint(args, state)
    if not state.is_hyper_param_search:
        return own
    states = own.parent.glob(f"*/{own.name}/{TRAINER_STATE_NAME}")
    return max(states, key=lambda path: path.stat().st_mtime_ns, default=own / TRAINER_STATE_NAME).parent


def seal_checkpoint(folder: Path) -> None:
    """Write the digests of a checkpoint's files, the last thing written into it."""
    give_usual_mode(folder)
    write_manifest(folder, SEAL)


def is_sound(folder: Path) -> bool:
    """Whether every file that the seal names is there and unchanged; a seal of nothing is none."""
    return problem_of(folder, SEAL) is None


def latest_checkpoint(folder: Path, say: Callable[[str], None] = lambda _: None) -> Path | None:
    """The newest sound checkpoint in a folder that this launch can go on from; others are deleted.

    Parameters
    ----------
    say : callable, optional
        Is told of sound ones that an engine wrote which isn't here.
    """
    return world.first(lambda: _latest(folder, say))


def _latest(folder: Path, say: Callable[[str], None]) -> Path | None:
    found = []
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match:
            found.append((int(match.group(1)), path))
    for _, path in sorted(found, reverse=True):
        if is_sound(path):
            if (other := misfit(path)) is None:
                return path
            say(f"{path}: only {other} can go on from it; this training begins again.")
        shutil.rmtree(path, ignore_errors=True)
    return None
