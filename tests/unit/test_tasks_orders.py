"""Named orders, and how a name in an order finds its task."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.tasks.orders import list_orders, match_task

SHARED = Path(__file__).parents[3] / "shared" / "benchmarks"


def test_orders_of_one_benchmark_are_permutations_of_each_other():
    orders = list_orders()
    assert set(orders) == {"L1", "L2", "L3", "S1", "S2"}
    for group in (("L1", "L2", "L3"), ("S1", "S2")):
        assert len({frozenset(orders[name]) for name in group}) == 1
        assert all(len(orders[name]) == len(set(orders[name])) == 15 for name in group)
        assert len({orders[name] for name in group}) == len(group)
    assert orders["L1"][:3] == ("mnli", "cb", "wic")
    assert orders["S2"][-2:] == ("1290", "875")


@pytest.mark.parametrize(
    ("name", "available", "expected"),
    [
        ("mnli", ["mnli", "MNLI"], "mnli"),
        ("mnli", ["MNLI", "cb"], "MNLI"),
        ("sst-2", ["SST2"], "SST2"),
        ("boolqa", ["boolq"], "boolq"),
        ("002", ["task002", "task1290"], "task002"),
        ("1290", ["task002", "task1290_xsum"], "task1290_xsum"),
        ("task73", ["task073"], "task073"),
        ("2", ["task1290", "task181"], None),
        ("wic", ["mnli"], None),
        ("sst2", ["sst-2", "SST-2"], None),
        ("2024_02", ["2024_01"], None),
        ("2024_03_support", ["2024_01_billing"], None),
        ("task002_a", ["task002_b"], None),
        ("A", ["a", "b", "a"], "a"),
    ],
)
def test_a_name_finds_its_task(name, available, expected):
    assert match_task(name, available) == expected


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/benchmarks")
@pytest.mark.parametrize(("order", "folder"), [("L2", "long_sequence"), ("S1", "superni")])
def test_every_name_of_an_order_finds_a_folder_of_its_benchmark(order, folder):
    folders = [path.name for path in (SHARED / folder).iterdir()]
    found = [match_task(name, folders) for name in list_orders()[order]]
    assert sorted(map(str, found)) == sorted(folders)
