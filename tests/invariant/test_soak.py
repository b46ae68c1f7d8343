"""The short form of benchmarks/soak: random kills, and the files of a run damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from soak import KINDS, damaged, months, soaked


@pytest.mark.slow
def test_a_run_killed_at_random_ends_as_one_that_never_was(tmp_path: Path) -> None:
    assert soaked(tmp_path, kills=6, seed=1).total() >= 6


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_damaged_file_is_named_or_what_is_lost_is_redone(kind: str, tmp_path: Path) -> None:
    assert damaged(tmp_path, kind)


@pytest.mark.slow
def test_months_of_learn_with_kills_lose_nothing_and_take_no_more_memory_and_disk(tmp_path: Path) -> None:
    killed, memory, disk = months(tmp_path, count=6, kills=12, seed=1)
    assert killed.total() >= 6  # a call that lives through its moment has learned the month
    assert len(set(disk[1:])) == 1
    assert memory[-1] < memory[1] + 8e6
