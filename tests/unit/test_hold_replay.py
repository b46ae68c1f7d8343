"""The replay memory: what it keeps, how it is mixed in, and that it never reads an earlier task again."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.config import validate
from holdfast.errors import ConfigError
from holdfast.tasks.memory import Memory, MemoryOptions
from holdfast.tasks.task import Example, Task


def task(name: str, rows: int) -> Task:
    examples = [Example(f"{name} {i}", str(i), (str(i), "x")) for i in range(rows)]
    return Task(name, examples, examples[:1])


@given(st.integers(1, 300), st.floats(0.01, 1.0))
def test_balanced_memory_keeps_the_stated_share_of_every_task(rows: int, fraction: float) -> None:
    memory = Memory(MemoryOptions(fraction=fraction))
    for name in "abc":
        memory.add(task(name, rows), 1)
    kept = Counter(name for name, _ in memory.rows)
    assert kept == {name: max(1, round(fraction * rows)) for name in "abc"}
    assert len(set(memory.examples)) == len(memory), "a row was kept twice"


def test_default_is_two_percent() -> None:
    memory = Memory(MemoryOptions())
    memory.add(task("a", 1000), 0)
    assert len(memory) == 20


def test_reservoir_has_a_fixed_size_and_every_row_the_same_chance() -> None:
    kept: Counter[str] = Counter()
    for seed in range(400):
        memory = Memory(MemoryOptions(sampling="reservoir", count=10))
        for name, rows in (("a", 30), ("b", 10), ("c", 60)):
            memory.add(task(name, rows), seed)
        assert len(memory) == 10
        kept.update(name for name, _ in memory.rows)
    shares = {name: kept[name] / 4000 for name in "abc"}
    assert shares == pytest.approx({"a": 0.3, "b": 0.1, "c": 0.6}, abs=0.03)


@given(st.integers(1, 200), st.floats(0.05, 0.9))
def test_mixture_has_every_new_row_once_and_the_stated_ratio_of_old_ones(new: int, ratio: float) -> None:
    memory = Memory(MemoryOptions(count=7))
    memory.add(task("old", 50), 3)
    fresh = list(task("new", new).train)
    mixed = memory.mixed_with(fresh, ratio, 3)
    counts = Counter(mixed)
    assert all(counts[row] == 1 for row in fresh)
    old = len(mixed) - new
    assert old == round(new * ratio / (1 - ratio))
    times = [counts[row] for row in memory.examples]
    assert max(times) - min(times) <= 1, "some rows are replayed more often than others"


def test_without_old_tasks_nothing_is_mixed_in() -> None:
    fresh = list(task("new", 5).train)
    assert Memory(MemoryOptions()).mixed_with(fresh, 0.5, 0) == fresh


@pytest.mark.parametrize("sampling", ["balanced", "reservoir"])
def test_memory_restored_from_json_goes_on_as_the_original(sampling: str) -> None:
    options = MemoryOptions(count=4, sampling=sampling)
    original = Memory(options)
    original.add(task("a", 30), 5)
    restored = Memory(options)
    restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
    for memory in (original, restored):
        memory.add(task("b", 30), 5)
    assert restored.rows == original.rows
    assert restored.mixed_with(task("c", 9).train, 0.5, 5) == original.mixed_with(task("c", 9).train, 0.5, 5)


def test_chat_messages_survive_json() -> None:
    chat = Example(({"role": "user", "content": "hi"},), "hello")
    memory = Memory(MemoryOptions())
    memory.add(Task("chat", [chat], [chat]), 0)
    restored = Memory(MemoryOptions())
    restored.load_state_dict(json.loads(json.dumps(memory.state_dict())))
    assert restored.examples == [chat]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fraction": 0.1, "count": 5}, "one of `fraction` and `count`"),
        ({"sampling": "reservoir"}, "needs `count`"),
        ({"sampling": "reservoir", "fraction": 0.1}, "needs `count`"),
    ],
)
def test_memory_options_that_contradict_each_other_are_errors(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(MemoryOptions, values, "memory")
