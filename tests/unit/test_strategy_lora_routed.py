"""lora-routed and lora-oracle: one task's ranks answer a row, found by the mean of frozen features."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from contexts import context_of, stage_of
from holdfast.config import validate
from holdfast.errors import ConfigError
from holdfast.evaluation.answers import generate
from holdfast.models import LoraOptions, add_lora
from holdfast.models.adapters import grow, lora_factors, lora_layers
from holdfast.runner import RunConfig, run
from holdfast.strategies.lora.ranks import Weighted, select
from holdfast.strategies.lora.routed import features, nearest
from holdfast.tasks import Encoder, Template
from holdfast.tasks.encode import Encoded, collate_prompts
from lora_cases import STREAM, TOKENIZER, R, lora_model, strategy_of, train_by_chance
from tiny_models import tiny_model
from tiny_runs import tiny_run

PAD = TOKENIZER.pad_token_id


def two_blocks() -> Any:
    model = lora_model()
    grow(model, R, seed=1)
    train_by_chance(model, 0, 0.3)
    return model


def with_block_merged(model: Any, task: int) -> Any:
    """The plain model with one task's LoRA added to its weights."""
    plain = copy.deepcopy(model).unload()
    part = slice(task * R, (task + 1) * R)
    with torch.no_grad():
        for (name, _), (a, b) in zip(lora_layers(model).items(), lora_factors(model), strict=True):
            plain.get_parameter(name).add_(8.0 / R * b[:, part] @ a[part])
    return plain


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits


def test_each_row_is_answered_by_its_own_ranks_alone() -> None:
    model, ids = two_blocks(), torch.arange(10, 28).view(3, 6)
    chosen = torch.eye(2)[[1, 0, 1]].repeat_interleave(R, 1)
    got = logits_of(Weighted(model, lambda ids, question: select(model, chosen)), ids)
    merged = [logits_of(with_block_merged(model, task), ids) for task in (0, 1)]
    expected = torch.stack([merged[task][row] for row, task in enumerate((1, 0, 1))])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert (merged[0] - merged[1]).abs().max() > 1e-2
    assert (logits_of(model, ids) - got).abs().max() > 1e-2, "the hooks are off again: both add up"


def test_a_task_is_trained_as_if_its_lora_were_alone_on_the_frozen_model(tmp_path: Path) -> None:
    strategy, model = strategy_of("lora-oracle"), lora_model()
    context = context_of(model, tmp_path)
    for number in (0, 1):
        strategy.begin(context, stage_of(STREAM, number))
        train_by_chance(model, number, 0.3)
        if not number:
            strategy.end(context, stage_of(STREAM, number))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    handles = strategy.attach(model, optimizer)
    alone = add_lora(copy.deepcopy(model).unload(), LoraOptions(r=R, alpha=8.0))
    with torch.no_grad():
        for (a, b), (own_a, own_b) in zip(lora_factors(model), lora_factors(alone), strict=True):
            own_a.copy_(a[R:])
            own_b.copy_(b[:, R:])
    ids = torch.arange(10, 28).view(3, 6)
    for m in (model, alone):
        m(input_ids=ids).logits.square().mean().backward()
    for (a, b), (own_a, own_b) in zip(lora_factors(model), lora_factors(alone), strict=True):
        torch.testing.assert_close(a.grad[R:], own_a.grad, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(b.grad[:, R:], own_b.grad, rtol=1e-8, atol=1e-12)
        assert not a.grad[:R].any()
        assert not b.grad[:, :R].any()
    before = logits_of(model, ids)
    for handle in handles:
        handle.remove()
    assert (logits_of(model, ids) - before).abs().max() > 1e-3, "only training silences the earlier ranks"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_features_are_means_over_the_question_of_the_model_without_lora_whatever_the_padding(
    kind: str,
) -> None:
    model = add_lora(tiny_model(kind), LoraOptions(r=2)).eval()
    plain = tiny_model(kind)
    train_by_chance(model, 0, 0.5)
    encoded = Encoder(TOKENIZER, Template(), encoder_decoder=kind == "t5").many(STREAM.tasks[0].train[:3])
    rows = [Encoded(row.prompt_ids[3 * i :], row.completion_ids) for i, row in enumerate(encoded)]
    batch = collate_prompts(rows, PAD, encoder_decoder=kind == "t5")
    got = features(model, batch["input_ids"], batch["attention_mask"].bool())
    for row, feature in zip(rows, got, strict=True):
        body = plain.get_encoder() if kind == "t5" else plain.base_model
        with torch.no_grad():
            states = body(input_ids=torch.tensor([row.prompt_ids])).last_hidden_state[0]
        torch.testing.assert_close(feature, states.mean(0), rtol=1e-4, atol=1e-5)


def test_nearest_is_the_mean_of_least_euclidean_distance_written_out() -> None:
    draw = torch.Generator().manual_seed(0)
    points, means = torch.randn(20, 6, generator=draw), torch.randn(4, 6, generator=draw)
    expected = [min(range(4), key=lambda i: float((p - means[i]).square().sum())) for p in points]
    assert nearest(points, means).tolist() == expected
    assert len(set(expected)) > 2


def test_means_and_the_routers_accuracy_are_those_of_separate_rows(tmp_path: Path) -> None:
    rows = len(STREAM.tasks[0].train)
    strategy: Any = strategy_of("lora-routed", samples=rows - 3, probes=3)
    model = lora_model()
    for number in range(3):
        context = context_of(model, tmp_path)
        strategy.begin(context, stage_of(STREAM, number))
        train_by_chance(model, number, 0.3)
        strategy.end(context, stage_of(STREAM, number))
    assert [tuple(p.shape) for p in strategy.probes] == [(3, 16)] * 3
    plain = copy.deepcopy(model).unload()
    for number, task in enumerate(STREAM.tasks):
        alone = []
        for row in context.encoder.many(task.train):
            with torch.no_grad():
                alone.append(
                    plain.base_model(torch.tensor([row.prompt_ids])).last_hidden_state[0].mean(0).float()
                )
        found = [
            min(range(len(alone)), key=lambda i: float((alone[i] - p).norm()))
            for p in strategy.probes[number]
        ]
        assert len(set(found)) == 3
        others = torch.stack([alone[i] for i in range(len(alone)) if i not in found])
        torch.testing.assert_close(strategy.means[number], others.mean(0), rtol=1e-5, atol=1e-6)
    said = json.loads((tmp_path / "adapters.json").read_text())
    for number, task in enumerate(STREAM.tasks):
        own = [
            min(range(3), key=lambda i: float((strategy.means[i] - p).square().sum())) == number
            for p in strategy.probes[number]
        ]
        assert said["router"][task.name] == pytest.approx(sum(own) / 3)
    assert (said["rank"], said["frozen"]) == (3 * R, 2 * R)


def test_rows_of_two_tasks_in_one_batch_find_their_own_lora(tmp_path: Path) -> None:
    strategy: Any = strategy_of("lora-routed")
    model = lora_model()
    for number in range(2):
        context = context_of(model, tmp_path)
        strategy.begin(context, stage_of(STREAM, number))
        train_by_chance(model, number, 0.3)
        strategy.end(context, stage_of(STREAM, number))
    rows = context.encoder.many([STREAM.tasks[0].train[0], STREAM.tasks[1].train[0]])
    means = torch.stack(strategy.means)
    answers = generate(strategy.route(model, None), TOKENIZER, rows, batch_size=2, max_new_tokens=5)
    for row, answer in zip(rows, answers, strict=True):
        ids = torch.tensor([row.prompt_ids])
        task = int(nearest(features(model, ids, torch.ones_like(ids).bool()), means))
        merged = with_block_merged(model, task)
        assert generate(merged, TOKENIZER, [row], batch_size=1, max_new_tokens=5) == [answer]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("run") / "run"
            values = tiny_run(made[name], strategy={"name": name})
            values["model"] |= {"lora": {"r": R}}
            values["training"] |= {"weight_decay": 0.1, "learning_rate": 1e-2, "epochs": 6}
            run(validate(RunConfig, values, "test"))
        return made[name]

    return make


def test_under_the_oracle_every_answer_stays_as_it_was_when_its_task_was_learned(finished: Any) -> None:
    folder = finished("lora-oracle")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["bwt"] == 0
    assert metrics["knows_task"] is True
    stages = sorted((folder / "tasks").iterdir())
    for number, stage in enumerate(stages):
        name = stage.name.split("-", 1)[1]
        said = {(s / "predictions" / f"{name}.jsonl").read_text() for s in stages[number:]}
        assert len(said) == 1
    before = (stages[0] / "predictions" / "head.jsonl").read_text()
    assert before == (stages[1] / "predictions" / "head.jsonl").read_text(), "unlearned: the frozen model"


def test_a_tasks_lora_is_the_same_whatever_finds_it(finished: Any) -> None:
    one, other = (
        load_file(sorted((finished(name) / "tasks").iterdir())[-1] / "model" / "adapter_model.safetensors")
        for name in ("lora-oracle", "lora-routed")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_export_says_why_no_folder_can_hold_it(tmp_path: Path) -> None:
    strategy, model = strategy_of("lora-routed"), lora_model()
    with pytest.raises(ConfigError, match=r"export: strategy 'lora-routed' answers each row with one task's"):
        strategy.export(context_of(model), tmp_path)


def test_selecting_no_rank_is_the_frozen_model() -> None:
    model, ids = two_blocks(), torch.arange(10, 28).view(3, 6)
    handle = select(model, torch.zeros(2 * R))
    torch.testing.assert_close(logits_of(model, ids), logits_of(copy.deepcopy(model).unload(), ids))
    handle.remove()


def test_layer_that_gets_all_tokens_in_one_row_is_refused_by_name() -> None:
    model = two_blocks()
    name, layer = next(iter(lora_layers(model).items()))
    handle = select(model, torch.ones(3, 2 * R))
    with pytest.raises(ConfigError, match=rf"target_modules: {name} gets \(18, 16\) as input"):
        layer(torch.zeros(18, 16, dtype=torch.float64))
    handle.remove()


def test_the_oracle_without_a_lora_is_refused_by_its_own_name() -> None:
    with pytest.raises(ConfigError, match="lora-oracle") as told:
        strategy_of("lora-oracle").check(tiny_model("llama"))
    assert "lora-routed" not in str(told.value)
