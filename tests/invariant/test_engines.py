"""`holdfast learn` and `run` under FSDP2 and ZeRO end where one process does, and go on after a kill."""

from __future__ import annotations

import shutil
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import engines
import under_deepspeed
from learning_data import SHORT, TOY, apart, data_sets, mostly_slow, near, same, weights_in
from processes import holdfast, launched
from ranks import HOLDS

SGD = ("training.optimizer=sgd", "training.learning_rate=0.1")
LEARN = ("learn", "may.jsonl", "--skills", "s", *TOY, *SHORT, *SGD)
LORA = ("model.lora.r=4", "training.learning_rate=1.0")  # a LoRA a task
OTHERS = [
    ("--strategy", "ewc", "strategy.strength=10"),  # more is unstable at this rate of SGD
    (*LORA, "strategy.merge_lora=weights"),
    (*LORA, "--strategy", "inc-lora"),
]
THEN = ("learn", "june.jsonl", "--skills", "s")
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
BY_DEEPSPEED = [pytest.param(f"ZeRO-{stage}", marks=[pytest.mark.slow, needs_deepspeed]) for stage in (2, 3)]
ENGINES = ["FSDP2", *BY_DEEPSPEED]


def under(engine: str, command: Any, cwd: Path, ranks: int = 2, **more: Any) -> list[Any]:
    return launched(ranks, engines.command, [engine, *command], cwd, **more)()


def all_well(ended: list[Any]) -> None:
    for rank in ended:
        assert rank.code == 0, rank.err


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chosen", [(), LORA, *(pytest.param(c, marks=pytest.mark.slow) for c in OTHERS)])
def test_two_months_end_where_one_process_does(tmp_path: Path, engine: str, chosen: tuple[str, ...]) -> None:
    for name in ("one", "more"):
        (tmp_path / name).mkdir()
        data_sets(tmp_path / name, "may", "june")
    for command in ((*LEARN, *chosen), THEN):
        assert (ended := holdfast(*command, cwd=tmp_path / "one")).code == 0, ended.err
        all_well(under(engine, command, tmp_path / "more"))
    weights = [weights_in(tmp_path / name / "s" / "tasks" / "02-june") for name in ("one", "more")]
    assert apart(*weights) < 1e-5
    may = weights_in(tmp_path / "more" / "s" / "tasks" / "01-may")
    if any(w.shape != may[n].shape for n, w in weights[1].items()):  # may's ranks as they were, june's behind
        moved = {n: w[:, may[n].shape[1] :] for n, w in weights[1].items() if "lora_B" in n}
        kept = {n: w[tuple(map(slice, may[n].shape))] for n, w in weights[1].items()}
        assert same(kept, may)
        assert all(w.any() for w in moved.values())
    else:
        assert apart(may, weights[1]) > 1e-3  # june was learned


STEP = ("holdfast.training.bridge.completion_loss", 4)  # in a step, after a checkpoint
TRAINED = ("holdfast.strategies.context.compute_prior", 1)  # after the last one


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("die", "chosen"),
    [(STEP, ()), *(pytest.param(d, c, marks=pytest.mark.slow) for d, c in ((TRAINED, ()), (STEP, LORA)))],
)
def test_a_killed_process_goes_on_bit_for_bit(
    tmp_path: Path, engine: str, die: tuple[str, int], chosen: tuple[str, ...]
) -> None:
    (tmp_path / "once").mkdir()
    data_sets(tmp_path / "once", "may", "june")
    all_well(under(engine, (*LEARN, *chosen), tmp_path / "once"))
    shutil.copytree(tmp_path / "once", tmp_path / "killed")
    all_well(under(engine, THEN, tmp_path / "once"))
    told, killed = under(engine, THEN, tmp_path / "killed", die={1: die})
    assert killed.code == -signal.SIGKILL, killed.err
    assert list((tmp_path / "killed" / "s").glob("tasks/*june*/**/checkpoint-*")), told.err
    all_well(under(engine, THEN, tmp_path / "killed"))
    weights = [weights_in(tmp_path / name / "s" / "tasks" / "02-june") for name in ("once", "killed")]
    assert same(*weights)


def test_a_checkpoint_of_another_engine_is_begun_again(tmp_path: Path) -> None:
    data_sets(tmp_path, "may")
    die = {1: ("holdfast.training.bridge.completion_loss", 4)}
    under("FSDP2", LEARN, tmp_path, die=die)
    assert list((tmp_path / "s").glob("tasks/*may*/**/checkpoint-2"))
    ended = holdfast(*LEARN, cwd=tmp_path)
    assert ended.code == 0, ended.err
    (tmp_path / "one").mkdir()
    data_sets(tmp_path / "one", "may")
    assert holdfast(*LEARN, cwd=tmp_path / "one").code == 0
    weights = [weights_in(folder / "s" / "tasks" / "01-may") for folder in (tmp_path, tmp_path / "one")]
    assert same(*weights)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("hold", mostly_slow(HOLDS, "anchor, inputs"))
def test_a_script_with_the_callback_ends_where_one_process_does(
    tmp_path: Path, engine: str, hold: str
) -> None:
    one = under_deepspeed.trained(tmp_path / "one", hold, None, per_device_train_batch_size=6)
    for rank in launched(2, engines.script, [engine, str(tmp_path), hold], tmp_path)():
        assert rank.code == 0, rank.err
    assert near(one, torch.load(tmp_path / "found.pt")) < 1e-6
