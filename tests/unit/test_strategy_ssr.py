"""SSR: who writes behind what, who answers, and that clusters choose what is rehearsed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from contexts import context_of
from holdfast.errors import ConfigError
from holdfast.evaluation.writing import Written
from holdfast.strategies.ssr import clustered, selected
from holdfast.tasks.task import Example
from prompt_cases import STREAM, model_of, stage_of, strategy_of

ssr = importlib.import_module("holdfast.strategies.ssr")


def test_clusters_are_those_of_separate_clouds_whatever_the_seed() -> None:
    draw = torch.Generator().manual_seed(0)
    clouds = [torch.randn(5, 3, generator=draw) * 0.01 + 10 * i for i in range(3)]
    for seed in range(5):
        centres, nearest = clustered(torch.cat(clouds), 3, seed)
        groups = [set(nearest[i * 5 : i * 5 + 5].tolist()) for i in range(3)]
        assert [len(group) for group in groups] == [1, 1, 1]
        assert len(set.union(*groups)) == 3
        for group, cloud in zip(groups, clouds, strict=True):
            torch.testing.assert_close(centres[next(iter(group))], cloud.mean(0))


def test_each_cluster_gives_its_share_those_nearest_to_its_centre_first() -> None:
    large = torch.tensor([[0.0], [0.1], [0.2], [0.3], [0.4], [0.5]])
    small = torch.tensor([[9.0], [9.6], [9.1]])
    features = torch.cat([large, small])
    chosen = selected(features, 2, 4, 0)
    assert [i for i in chosen if i > 5] == [8], "a third of four, as it has a third of the rows"
    assert [i for i in chosen if i < 6] == [1, 2, 3]
    assert selected(features, 2, 9, 0) == list(range(9))
    assert selected(torch.zeros(5, 2), 3, 2, 0) == [0, 1], "all in one place"


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_base_writes_behind_kept_demonstrations_and_the_latest_model_answers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy, model, base = (
        strategy_of("ssr", demonstrations=3, candidates=16, count=4, clusters=2, ratio=0.5),
        model_of(kind),
        model_of(kind),
    )
    context = context_of(model, tmp_path, base_model=lambda: base)
    strategy.begin(context, stage_of(0))
    assert list(strategy.examples(context, stage_of(0))) == list(STREAM.tasks[0].train), "no base is needed"
    strategy.end(context, stage_of(0))
    kept = strategy.memory.examples
    assert len(kept) == 3
    calls: list[tuple[Any, ...]] = []

    def write_rows(answers: Any, encoder: Any, opening: Any, options: Any, **values: Any) -> Written:
        calls.append((answers, values["writer"], opening, values["known"]))
        rows = [Example(f"copy {'abcdefgh'[i]}{'abcdefgh'[len(calls)]}=", "ab") for i in range(8)]
        return Written(8, written=8, rows=rows, confidence=[0.0] * 8)

    monkeypatch.setattr(ssr, "write_rows", write_rows)
    strategy.begin(context, stage_of(1))
    examples = strategy.examples(context, stage_of(1))
    assert len(calls) == 2
    encoded = [(*row.prompt_ids, *row.completion_ids) for row in context.encoder.many(kept)]
    own = strategy.openings["copy"]
    for answers, writer, opening, known in calls:
        assert answers is model
        assert writer is base
        assert known == kept
        assert opening.shared == own.shared
        pairs = [(*a, *b, *own.before) for a in encoded for b in encoded if a != b]
        assert opening.before in pairs, "two demonstrations, then the frame of a prompt"
    old = [row for row in examples if row not in STREAM.tasks[1].train]
    assert (len(examples), len(old)) == (16, 8)
    assert len({row.prompt for row in old}) == 4, "the chosen ones, each twice"
    assert not set(old) & set(kept)


@pytest.mark.parametrize("wrong", [{"demonstrations": 2, "shots": 3}, {"candidates": 10, "count": 50}])
def test_more_than_there_is_to_take_from_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"are taken from .* give at most as many"):
        strategy_of("ssr", **wrong)
