"""What defines prog-prompt and l2p: which prompts an input sees, and what learns."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from holdfast.config import validate
from holdfast.errors import ConfigError
from holdfast.evaluation.answers import rank_options
from holdfast.models import tiny_llama
from holdfast.runner import RunConfig, run
from holdfast.strategies import STRATEGIES, Strategy
from holdfast.strategies.prompts.pool import PromptPool, query
from holdfast.strategies.prompts.soft import SUBMODULE, Prompted, question
from holdfast.tasks import toy_tokenizer
from prompt_cases import (
    KINDS,
    TOKENIZER,
    batch_of,
    constant,
    context_of,
    fit,
    knowing,
    model_of,
    rows_of,
    stage_of,
    strategy_of,
)
from tiny_runs import tiny_run

# prog-prompt


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks through the runner."""
    folder = tmp_path_factory.mktemp("run") / "run"
    values = tiny_run(folder, strategy={"name": "prog-prompt", "tokens": 4})
    values["tasks"] |= {"train_rows": 8, "test_rows": 4}
    values["training"] = {"max_steps": 4, "batch_size": 8, "learning_rate": 0.1, "weight_decay": 0.1}
    values["evaluation"] = {"max_new_tokens": 4, "zero_shot": False}
    run(validate(RunConfig, values, source="test"))
    return folder / "tasks"


STAGES = ["01-copy", "02-flip", "03-head"]


def test_earlier_prompts_and_the_base_are_bit_identical_after_later_tasks(stream: Path) -> None:
    states = [load_file(stream / stage / "strategy.safetensors") for stage in STAGES]
    assert [sorted(state) for state in states] == [["copy"], ["copy", "flip"], ["copy", "flip", "head"]]
    for earlier, later in pairwise(states):
        assert all(torch.equal(earlier[task], later[task]) for task in earlier)
    base = tiny_llama(toy_tokenizer(), seed=0, hidden=32, layers=2).state_dict()
    for stage in STAGES:
        saved = load_file(stream / stage / "model" / "model.safetensors")
        assert all(torch.equal(saved[n], base[n]) for n in saved)
        assert set(saved) == set(base) - {"lm_head.weight"}


def test_nothing_is_forgotten(stream: Path) -> None:
    def said(stage: str, task: str) -> list[str]:
        rows = (stream / stage / "predictions" / f"{task}.jsonl").read_text().splitlines()
        return [json.loads(row)["generated"] for row in rows]

    assert any(said("01-copy", "copy"))
    assert said("01-copy", "copy") == said("02-flip", "copy") == said("03-head", "copy")
    assert said("02-flip", "flip") == said("03-head", "flip")
    assert said("02-flip", "head") != said("03-head", "head"), "its own prompt changes the answers"


def restored(folder: Path) -> Strategy:
    strategy = strategy_of("prog-prompt")
    values = json.loads((folder / "strategy.json").read_text())
    strategy.load_state_dict(load_file(folder / "strategy.safetensors"), values)
    return strategy


def test_each_task_is_answered_with_the_prompts_it_was_learned_with(stream: Path) -> None:
    model = tiny_llama(toy_tokenizer(), seed=0, hidden=32, layers=2)
    batch = batch_of("llama", rows_of("llama"))
    prompts = load_file(stream / "03-head" / "strategy.safetensors")
    last = restored(stream / "03-head")
    for task, order in {
        "copy": ["copy"],
        "flip": ["flip", "copy"],
        "head": ["head", "flip", "copy"],
        "a task not learned": ["head", "flip", "copy"],
    }.items():
        expected = Prompted(model, constant(torch.cat([prompts[name] for name in order])))(**batch).logits
        assert torch.equal(last.route(model, task)(**batch).logits, expected)
    first = restored(stream / "01-copy").route(model, "copy")(**batch).logits
    assert torch.equal(last.route(model, "copy")(**batch).logits, first)
    assert not torch.allclose(last.route(model, "head")(**batch).logits, first, atol=1e-3)
    assert type(last).needs_task_identity
    assert not STRATEGIES["l2p"].needs_task_identity


@pytest.mark.parametrize("reparametrise", [True, False])
def test_prompt_starts_from_tokens_and_keeps_no_network(reparametrise: bool, tmp_path: Path) -> None:
    model = model_of("llama")
    strategy, context = strategy_of("prog-prompt", reparametrise=reparametrise), context_of(model, tmp_path)
    strategy.begin(context, stage_of(0))
    prompt = getattr(model, SUBMODULE)
    table = model.get_input_embeddings().weight
    assert all(any(torch.equal(row, token) for token in table) for row in prompt.rows)
    assert (prompt.network is not None) == reparametrise
    fit(strategy, "llama", model, rows_of("llama"), tmp_path)
    expected = prompt().detach()
    strategy.end(context, stage_of(0))
    tensors, values = strategy.state_dict()
    assert values == {"tasks": ["copy"]}
    assert torch.equal(tensors["copy"], expected)


def test_bottleneck_without_a_network_is_an_error() -> None:
    with pytest.raises(ConfigError, match="`bottleneck` applies with `reparametrise: true` only"):
        strategy_of("prog-prompt", reparametrise=False, bottleneck=8)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_gives_the_same_logits_with_the_written_adapter(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model, strategy = model_of(kind), strategy_of("prog-prompt", tokens=3)
    for number in range(2):
        context = context_of(model, tmp_path / str(number))
        strategy.begin(context, stage_of(number))
        strategy.end(context, stage_of(number))
    batch = batch_of(kind, rows_of(kind)[:1])
    if kind != "t5":
        del batch["labels"]  # PEFT would want them as long as the prompts
    expected = strategy.route(model, "flip")(**batch).logits
    peft = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "1" / "prompt")).eval()
    batch.pop("position_ids", None)
    logits = peft(**batch).logits
    torch.testing.assert_close(logits if kind == "t5" else logits[:, 6:], expected, rtol=1e-4, atol=1e-5)


# l2p


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a * b).sum() / (a.pow(2).sum().sqrt() * b.pow(2).sum().sqrt()))


def test_chosen_keys_are_the_nearest_by_cosine() -> None:
    pool, queries = PromptPool(torch.randn(7, 2, 16), torch.randn(7, 5)), torch.randn(4, 5)
    indices = pool.nearest(queries, 3)
    for row, asked in zip(indices.tolist(), queries, strict=True):
        order = sorted(range(7), key=lambda i: -cosine(asked, pool.keys[i]))
        assert row == order[:3]
    prompts = pool.chosen(indices)
    for row, chosen in zip(indices.tolist(), prompts, strict=True):
        assert torch.equal(chosen, torch.cat([pool.prompts[i] for i in row]))


def test_diversified_choice_is_equation_4() -> None:
    pool, asked = PromptPool(torch.randn(7, 2, 16), torch.randn(7, 5)), torch.randn(1, 5)
    seldom = torch.rand(7)
    (indices,) = pool.nearest(asked, 3, seldom).tolist()
    cost = [(1 - cosine(asked[0], pool.keys[i])) * float(seldom[i]) for i in range(7)]
    assert indices == sorted(range(7), key=cost.__getitem__)[:3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("feature", ["hidden", "embeddings"])
def test_query_is_the_mean_feature_of_the_question_alone(feature: Any, kind: str) -> None:
    model, rows = model_of(kind), rows_of(kind)
    batch = batch_of(kind, rows)
    asked = question(batch["attention_mask"], None if kind == "t5" else batch["labels"])
    assert asked.sum(1).tolist() == [len(row.prompt_ids) for row in rows]
    found = query(model, batch["input_ids"], asked, feature)
    for row, mine in zip(rows, found, strict=True):
        ids = torch.tensor([row.prompt_ids])
        if feature == "embeddings":
            states = model.get_input_embeddings()(ids)
        else:
            states = (model.get_encoder() if kind == "t5" else model.base_model)(ids).last_hidden_state
        torch.testing.assert_close(mine, states[0].mean(0), rtol=1e-4, atol=1e-5)
    if kind != "t5":
        other = batch["input_ids"].clone()
        other[batch["labels"] != -100] = 9
        assert not torch.equal(other, batch["input_ids"])
        assert torch.equal(query(model, other, asked, feature), found), "an answer was seen"


def test_query_has_no_dropout_and_leaves_the_training_mode() -> None:
    model, rows = model_of("gpt2"), rows_of("gpt2")
    batch = batch_of("gpt2", rows)
    asked = question(batch["attention_mask"], batch["labels"])
    expected = query(model, batch["input_ids"], asked, "hidden")
    model.train()
    assert torch.equal(query(model, batch["input_ids"], asked, "hidden"), expected)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_key_loss_is_equation_5_and_moves_the_chosen_keys_alone(kind: str, tmp_path: Path) -> None:
    model, strategy = model_of(kind), strategy_of("l2p", weight=0.7, chosen=2, pool=6)
    strategy.begin(context_of(model, tmp_path), stage_of(0))
    batch = batch_of(kind, rows_of(kind))
    strategy.watch(model, batch)
    model(**{k: v for k, v in batch.items() if k != "labels" or kind == "t5"})
    value = strategy.loss(model, batch, None, torch.zeros(()))
    pool: PromptPool = getattr(model, SUBMODULE)
    asked = question(batch["attention_mask"], None if kind == "t5" else batch["labels"])
    total, moved = 0.0, set()
    for row in query(model, batch["input_ids"], asked, "hidden"):
        nearest = sorted(range(6), key=lambda i: -cosine(row, pool.keys[i]))[:2]
        total += sum(1 - cosine(row, pool.keys[i]) for i in nearest)
        moved |= set(nearest)
    assert float(value) == pytest.approx(0.7 * total / len(batch["input_ids"]), abs=1e-5)
    value.backward()
    assert pool.keys.grad is not None
    assert {i for i in range(6) if pool.keys.grad[i].any()} == moved
    assert pool.prompts.grad is None


def test_training_shuns_what_earlier_tasks_took_and_testing_does_not(tmp_path: Path) -> None:
    batch = batch_of("llama", rows_of("llama"))
    state = {"prompts": torch.randn(6, 2, 16), "keys": torch.randn(6, 16)}
    taken, logits = {}, []
    for diversify in (True, False):
        for earlier in (0.0, 1e6):
            model, strategy = model_of("llama"), strategy_of("l2p", chosen=2, pool=6, diversify=diversify)
            counts = torch.tensor([0, 0, 0, 0, earlier, earlier])
            strategy.load_state_dict({**state, "counts": counts}, {})
            logits.append(strategy.route(model, None)(**batch).logits)
            strategy.begin(context_of(model, tmp_path), stage_of(1))
            strategy.watch(model, batch)
            taken[diversify, earlier > 0] = strategy.stage_state_dict()["counts"]
            strategy.end(context_of(model, tmp_path), stage_of(1))
            assert torch.equal(strategy.state_dict()[0]["counts"], counts + taken[diversify, earlier > 0])
    assert all(torch.equal(logits[0], other) for other in logits)
    nearest = taken[False, False]
    assert nearest.sum() == 2 * len(batch["input_ids"])
    assert torch.equal(taken[False, True], nearest)
    assert torch.equal(taken[True, False], nearest), "before anything was taken all count alike"
    assert nearest[4:].sum() > 0
    assert taken[True, True][4:].sum() == 0


def test_each_input_finds_its_own_prompts() -> None:
    model, strategy = model_of("llama"), strategy_of("l2p", chosen=1, pool=8)
    rows = rows_of("llama", 0)[:4]
    batch = batch_of("llama", rows)
    asked = question(batch["attention_mask"], batch["labels"])
    keys = torch.cat([query(model, batch["input_ids"], asked, "hidden"), -torch.ones(4, 16)])
    prompts = torch.randn(8, 5, 16)
    strategy.load_state_dict({"prompts": prompts, "keys": keys, "counts": torch.zeros(8)}, {})
    together = strategy.route(model, None)(**batch).logits
    for i, row in enumerate(rows):
        alone = Prompted(model, constant(prompts[i]))(**batch_of("llama", [row])).logits[0]
        torch.testing.assert_close(together[i, -len(alone) :], alone, rtol=1e-4, atol=1e-4)


def test_options_are_ranked_with_the_prompts_that_the_question_finds() -> None:
    strategy, model = knowing("l2p"), model_of("llama")
    view, rows = strategy.route(model, None), rows_of("llama")
    options = [("a", [5, 6, 2]), ("b", [7, 2]), ("c", [20, 21, 22, 23, 24, 25, 2])]
    found = []
    view.source = lambda ids, asked, source=view.source: found.append(asked.sum(1)) or source(ids, asked)
    answers = rank_options(view, TOKENIZER, rows, options, batch_size=6)
    lengths = sorted(int(n) for batch in found for n in batch)
    assert lengths == sorted(len(row.prompt_ids) for row in rows for _ in options)
    for row, answer in zip(rows, answers, strict=True):
        ids = torch.tensor([row.prompt_ids])
        prompt = strategy.route(model, None).source(ids, torch.ones_like(ids).bool())[0]
        scores = {}
        for text, option in options:
            whole = torch.tensor([[*row.prompt_ids, *option]])
            logits = Prompted(model, constant(prompt))(whole, torch.ones_like(whole)).logits[0]
            logp = logits[len(row.prompt_ids) - 1 : -1].log_softmax(-1)
            scores[text] = float(logp[range(len(option)), option].sum())
        assert answer == max(scores, key=scores.__getitem__)


def test_more_prompts_than_the_pool_has_is_an_error() -> None:
    with pytest.raises(ConfigError, match="`chosen: 4` prompts can't be taken from a `pool` of 3"):
        strategy_of("l2p", pool=3)


def test_model_without_a_body_has_no_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    monkeypatch.setattr(type(model), "base_model", property(lambda self: self))
    with pytest.raises(ConfigError, match="use `query: embeddings`"):
        strategy_of("l2p").check(model)
    strategy_of("l2p", query="embeddings").check(model)
