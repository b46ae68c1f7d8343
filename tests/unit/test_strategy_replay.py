"""Replay: a stated share of old rows among the new ones, by one option around any strategy."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from holdfast.config import validate
from holdfast.errors import ConfigError
from holdfast.runner import RunConfig, run
from holdfast.tasks.memory import Rehearsal
from holdfast.tasks.task import Example
from tiny_runs import tiny_run

SECTION = {"memory": {"fraction": 0.25}, "ratio": 0.2}


def trained(
    output: Path, strategy: Any, replay: Any = None, order: Sequence[str] = ("copy", "flip")
) -> dict[str, torch.Tensor]:
    values = tiny_run(output, strategy=strategy, replay=replay)
    values["tasks"] = {**values["tasks"], "order": list(order)}
    values["training"] = {"max_steps": 6, "batch_size": 8, "learning_rate": 3e-3}
    run(validate(RunConfig, values, source="test"))
    return load_file(
        next((output / "tasks" / f"{len(order):02d}-{order[-1]}" / "model").glob("*.safetensors"))
    )


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_strategy_and_the_section_around_sequential_are_one_mechanism(tmp_path: Path) -> None:
    strategy = trained(tmp_path / "a", {"name": "replay", **SECTION})
    section = trained(tmp_path / "b", "sequential", SECTION)
    assert same(strategy, section)
    assert not same(strategy, trained(tmp_path / "c", "sequential"))
    memory = json.loads((tmp_path / "a" / "tasks" / "02-flip" / "strategy.json").read_text())["memory"]
    assert memory == json.loads((tmp_path / "b" / "tasks" / "02-flip" / "replay.json").read_text())
    assert Counter(row["task"] for row in memory["rows"]) == {"copy": 8, "flip": 8}  # 0.25 of 32


def test_every_later_stage_trains_on_the_stated_ratio_of_old_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[tuple[int, list[Example]]] = []
    original = Rehearsal.mixed

    def spy(self: Rehearsal, new: Sequence[Example], seed: int) -> list[Example]:
        rows = original(self, new, seed)
        stages.append((len(self.memory), rows))
        return rows

    monkeypatch.setattr(Rehearsal, "mixed", spy)
    trained(tmp_path / "run", "sequential", SECTION, ("copy", "flip", "head"))
    assert [(kept, len(rows)) for kept, rows in stages] == [(0, 32), (8, 40), (16, 40)]  # 8 of 40 are old


def test_replay_combines_with_a_strategy_that_protects(tmp_path: Path) -> None:
    ewc = {"name": "ewc", "strength": 100.0, "fisher": {"samples": 8}}
    plain, both = trained(tmp_path / "a", ewc), trained(tmp_path / "b", ewc, SECTION)
    assert not same(plain, both)
    assert (tmp_path / "b" / "tasks" / "02-flip" / "protection.json").exists()
    assert json.loads((tmp_path / "b" / "metrics.json").read_text())["label"] == "ewc · replay"


@pytest.mark.parametrize(
    "strategy", ["replay", "kif-m", "multitask", {"name": "kif", "memory": {"count": 3}}]
)
def test_two_memories_at_once_are_an_error(strategy: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`replay:` doesn't combine with `strategy: .*leave out one"):
        validate(RunConfig, tiny_run(tmp_path, strategy=strategy, replay={}), source="test")


@pytest.mark.parametrize(
    ("sections", "rehearses"),
    [
        ({"strategy": "kif"}, False),
        ({"strategy": "kif", "replay": {}}, True),
        ({"strategy": {"name": "kif", "memory": {"count": 3}}}, True),
        ({"strategy": "kif-m"}, True),
    ],
)
def test_a_run_says_whether_it_trains_on_earlier_examples_again(
    sections: Any, rehearses: bool, tmp_path: Path
) -> None:
    config = validate(RunConfig, tiny_run(tmp_path, **sections), source="test")
    assert config.rehearses is rehearses
