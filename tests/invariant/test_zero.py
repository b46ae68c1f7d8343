"""Held trainings under the real DeepSpeed ZeRO end where one process does, where DeepSpeed is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import under_deepspeed
from learning_data import near, same
from processes import launched
from ranks import HOLDS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]


STAGES = [1, 2, 3]


def in_processes(
    folder: Path, hold: str, stage: int, number: int = 2, of_zero: Any = None, **more: Any
) -> Any:
    folder.mkdir(exist_ok=True)
    arguments = [str(folder), hold, stage, more, of_zero or {}]
    for rank in launched(number, under_deepspeed.each_rank, arguments, folder)():
        assert rank.code == 0, rank.err
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_several_processes_end_where_one_does(tmp_path: Path, hold: str, processes: int, stage: int) -> None:
    one = under_deepspeed.trained(tmp_path / "one", hold, None)
    more = in_processes(tmp_path / "more", hold, stage, processes)
    assert near(one, more) < 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_adam_by_weight_and_with_the_optimizer_on_the_cpu(tmp_path: Path, stage: int) -> None:
    adam = {"optim": "adamw_torch", "learning_rate": 1e-3}
    one = under_deepspeed.trained(tmp_path / "one", "anchor, elementwise", None, **adam)
    for name, options in (("plain", {}), ("offload", {"offload_optimizer": {"device": "cpu"}})):
        more = in_processes(tmp_path / name, "anchor, elementwise", stage, of_zero=options, **adam)
        assert near(one, more) < 1e-6, name


@pytest.mark.parametrize("stage", STAGES)
def test_sixteen_bit_weights_follow_the_masters_that_are_held(tmp_path: Path, stage: int) -> None:
    one = under_deepspeed.trained(tmp_path / "one", "anchor, inputs", None)
    more = in_processes(tmp_path / "more", "anchor, inputs", stage, bf16=True)
    assert {weight.dtype for name, weight in more.items() if name != "moved"} == {torch.bfloat16}
    name = "model.layers.0.mlp.up_proj.weight"
    assert near({name: one[name]}, {name: more[name].float()}) < 0.02
    assert float(more["moved"][-1]) < 2 * float(one["moved"][-1])


def test_weights_in_turns_over_the_processes_are_held_too(tmp_path: Path) -> None:
    one = under_deepspeed.trained(tmp_path / "one", "anchor, inputs", None)
    more = in_processes(tmp_path / "more", "anchor, inputs", 2, of_zero={"round_robin_gradients": True})
    assert near(one, more) < 1e-6


def test_a_model_that_was_loaded_in_pieces_is_held_as_a_whole_one(tmp_path: Path) -> None:
    one = under_deepspeed.trained(tmp_path / "one", "anchor, inputs", None)
    more = in_processes(tmp_path / "more", "anchor, inputs", 3, loaded_in_pieces=True)
    assert near(one, more) < 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_training_ends_as_an_uninterrupted_one(tmp_path: Path, stage: int) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-3}
    whole = in_processes(tmp_path / "run", "anchor, elementwise", stage, **saving)
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    resumed = in_processes(tmp_path / "run", "anchor, elementwise", stage, resume=checkpoint, **saving)
    assert same(whole, resumed)
