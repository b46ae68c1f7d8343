"""Several processes over gloo find and learn what one does: importances, moments, held trainings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ranks
from processes import launched


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of two sets of tensors."""
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).norm() / one[n].norm().clamp(min=1e-12)) for n in one)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_find_and_learn_what_one_does(tmp_path: Path, processes: int) -> None:
    (tmp_path / "more").mkdir()
    ended = launched(processes, ranks.each_rank, [str(tmp_path / "more"), "float64"], tmp_path)
    one = {**ranks.results(tmp_path / "one", torch.float64), **ranks.sharded(None)}
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
