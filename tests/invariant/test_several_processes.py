"""Several processes over gloo find and learn what one does: importances, moments, held trainings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ranks
from learning_data import SHORT, TOY, apart, data_sets, weights_in
from processes import holdfast, launched


@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_several_processes_find_and_learn_what_one_does(tmp_path: Path, processes: int) -> None:
    (tmp_path / "more").mkdir()
    ended = launched(processes, ranks.each_rank, [str(tmp_path / "more"), "float64"], tmp_path)
    one = ranks.results(tmp_path / "one", torch.float64)
    for rank in ended():
        assert rank.code == 0, rank.err
    found = [torch.load(tmp_path / "more" / f"rank{rank}.pt") for rank in range(processes)]
    for case in one:
        for name, tensor in found[0][case].items():
            for other in found[1:]:
                assert torch.equal(tensor, other[case][name]), (case, name)
    differences = {case: apart(expected, found[0][case]) for case, expected in one.items()}
    limits = {case: 1e-10 if case in ranks.WHOLLY_DOUBLE else 1e-5 for case in one}
    assert not {case: d for case, d in differences.items() if d > limits[case]}, differences


def test_replicas_of_a_script_step_in_one_basis_and_under_one_prior(tmp_path: Path) -> None:
    """Directions of equal weight are arbitrary, and each process may find others."""
    for rank in launched(2, ranks.script, [str(tmp_path)], tmp_path)():
        assert rank.code == 0, rank.err
    found = [torch.load(tmp_path / f"script{rank}.pt") for rank in range(2)]
    for importance in ("inputs", "fisher"):
        pairs = zip(*(weights[importance].values() for weights in found), strict=True)
        assert all(torch.equal(*pair) for pair in pairs), importance
    assert all(weights["world"] == 2 for weights in found)


def test_weights_that_a_loss_alone_trains_are_trained_alike_in_every_process(tmp_path: Path) -> None:
    for rank in launched(2, ranks.each_rank_whose_loss_trains, [str(tmp_path)], tmp_path)():
        assert rank.code == 0, rank.err
    found = [torch.load(tmp_path / f"loss{rank}.pt") for rank in range(2)]
    for name in ranks.LOSS_TRAINS:
        assert found[0][name].keys() == found[1][name].keys()
        assert all(torch.equal(tensor, found[1][name][key]) for key, tensor in found[0][name].items()), name
    assert found[0]["l2p"]["counts"].sum() == 7  # a prompt for each row


EWC = ("--strategy", "ewc", "strategy.fisher.samples=8")
LEARN = ("learn", "may.jsonl", "--skills", "s", *EWC, *TOY, *SHORT)


def test_a_killed_process_is_named_by_the_others_and_the_same_command_continues(tmp_path: Path) -> None:
    data_sets(tmp_path, "may")
    die = {1: ("holdfast.training.bridge.completion_loss", 4)}  # after a checkpoint
    told, killed = launched(2, None, LEARN, tmp_path, die)()
    assert (told.code, killed.code) == (2, -signal.SIGKILL), (told.err, killed.err)
    assert "rank 0: lost rank 1 (process " in told.err
    assert "Traceback" not in told.err
    begun = next(tmp_path.glob("s/tasks/*may*/**/checkpoint-2"))
    for rank in launched(2, None, LEARN, tmp_path)():
        assert rank.code == 0, rank.err
    assert not begun.exists()
    (tmp_path / "one").mkdir()
    data_sets(tmp_path / "one", "may")
    ended = holdfast(*LEARN, cwd=tmp_path / "one")
    assert ended.code == 0, ended.err
    weights = [weights_in(folder / "s" / "tasks" / "01-may") for folder in (tmp_path, tmp_path / "one")]
    assert apart(*weights) < 1e-5


@pytest.mark.slow
def test_the_launcher_of_accelerate_learns_what_one_process_does(tmp_path: Path) -> None:
    config = Path(__file__).parents[2] / "configs" / "accelerate" / "ddp.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    weights = []
    for name, line in (("one", [sys.executable]), ("more", [*launch, "--num_processes", "2"])):
        (tmp_path / name).mkdir()
        data_sets(tmp_path / name, "may", "june")
        for command in (LEARN, ("learn", "june.jsonl", "--skills", "s")):
            ended = subprocess.run(
                [*line, "-m", "holdfast", *command], cwd=tmp_path / name, env=environment, capture_output=True
            )
            assert ended.returncode == 0, ended.stderr.decode()
        weights.append(weights_in(tmp_path / name / "s" / "tasks" / "02-june"))
    assert apart(*weights) < 1e-5
