"""Training where each process steps a part of each weight alone (FSDP2, ZeRO), between whole models.

What an engine does to a model can't be undone. So it is done to a copy, which gives its weights back: rating,
answering and writing see whole models, and files are those of any number of processes.
"""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from holdfast import world
from holdfast.errors import ConfigError
from holdfast.hold.zero import master
from holdfast.models import unwrapped
from holdfast.storage import write_tensors, write_text

ENGINE = "engine.json"  # in a checkpoint: what alone can go on from it
WEIGHTS = "weights.safetensors"  # in a training's last checkpoint: whole weights


@contextmanager
def copied(model: nn.Module) -> Iterator[nn.Module]:
    """A copy to be cut up, while the model itself waits on the CPU; without an engine the model."""
    if world.engine() is None:
        yield model
        return
    device = next(model.parameters()).device
    model.to("cpu")
    try:
        yield copy.deepcopy(model)
    finally:
        _forget_engine()
        model.to(device)


@torch.no_grad()
def give_back(trained: Any, model: nn.Module) -> None:
    """Copy a trained copy's weights into the model."""
    if trained is model:
        return
    for name, weight in _whole(trained):
        unwrapped(model).get_parameter(name).copy_(weight)


def _whole(trained: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and whole value of each trained weight, in the precision in which it was stepped."""
    by_deepspeed = world.by_deepspeed()  # it may read a file
    for name, parameter in unwrapped(trained).named_parameters():
        if parameter.requires_grad:
            yield name, master(parameter) if by_deepspeed else world.whole(parameter).detach()


def _forget_engine() -> None:
    """What DeepSpeed leaves behind: models that are in pieces as soon as they are loaded, another linear."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    nn.functional.linear = torch._C._nn.linear
    gc.collect()  # engine and trainer hold each other, and the copy


def require_engine(trainer: Any) -> None:
    """Make sure that the trainer does what the launcher was asked for.

    Raises
    ------
    ConfigError
        accelerate trains each process's model by itself, as it does without a GPU.
    """
    asked, found = world.engine(), trainer.accelerator
    got = (str(found.distributed_type.value), found.num_processes)
    wanted = {"FSDP2": "FSDP", None: got[0]}.get(asked, "DEEPSPEED")
    if asked is not None and got != (wanted, world.size()):
        raise ConfigError(
            f"training: the launcher chose {asked} on {world.size()} processes, and accelerate made {got[0]} "
            f"on {got[1]} of it. Without GPUs it can't; use configs/accelerate/ddp.yaml."
        )


def mark(checkpoint: Path, trained: Any, last: bool) -> None:
    """Say in a checkpoint which engine alone can go on from it; in the last one also leave whole weights."""
    if world.engine() is None:
        return
    write_text(checkpoint / ENGINE, json.dumps(_here()))
    if last:
        write_tensors(checkpoint / WEIGHTS, {name: weight.cpu() for name, weight in _whole(trained)})


def misfit(checkpoint: Path) -> str | None:
    """Which other launch a checkpoint was written by that alone can go on from it; None if this one can."""
    file, here = checkpoint / ENGINE, world.engine()
    made: Mapping[str, Any] = json.loads(file.read_text()) if file.exists() else {"engine": None}
    if made["engine"] is None:
        return None if here is None else "a training without an engine"
    if here is not None and made == _here():
        return None
    return f"{made['engine']} on {made['processes']} processes"


def _here() -> dict[str, Any]:
    return {"engine": world.engine(), "processes": world.size()}


@torch.no_grad()
def take_finished(checkpoint: Path, model: nn.Module) -> None:
    """The weights that a finished training left in its last checkpoint."""
    for name, weight in load_file(checkpoint / WEIGHTS).items():
        unwrapped(model).get_parameter(name).copy_(weight)
