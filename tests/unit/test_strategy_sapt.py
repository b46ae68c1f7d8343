"""SAPT: adapters mixed by attention, written out; what is frozen; and reflection on rows of earlier tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_cases
import prompt_cases
from contexts import context_of, stage_of
from holdfast.config import validate
from holdfast.errors import ConfigError
from holdfast.models.adapters import lora_factors, lora_layers
from holdfast.strategies import STRATEGIES
from holdfast.strategies.sapt.attention import AttentionOptions, SharedAttention, reflection
from holdfast.tasks.encode import Encoded, collate
from lora_cases import R, learn, lora_model, train_by_chance

ZERO = torch.zeros(())
MEMORY = {"memory": {"count": 3}}


def attention_by_hand(attention: SharedAttention, x: Tensor) -> Tensor:
    first, _, second, norm = attention.network
    hidden = first.weight @ x
    out = second.weight @ (hidden * hidden.sigmoid())
    q = (out - out.mean()) / (out.var(unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias
    scores = torch.stack([q @ key for key in attention.keys]) / len(x) ** 0.5 / 2.0
    return scores.exp() / scores.exp().sum()


def test_shares_are_the_softmax_of_query_times_keys() -> None:
    options = AttentionOptions(bottleneck=5, temperature=2.0)
    attention = SharedAttention(8, options, torch.randn(2, 8), 0)
    x = torch.randn(3, 8)
    expected = torch.stack([attention_by_hand(attention, one) for one in x])
    torch.testing.assert_close(attention(x), expected)
    assert {name for name, _ in attention.named_parameters() if "network" not in name} == {"key"}


def test_reflection_is_the_kl_to_what_was_remembered_and_shuns_later_tasks() -> None:
    old = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    now = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]], requires_grad=True)
    expected = sum(float(p * (p / q).log()) for a, b in zip(old, now.detach(), strict=True)
                   for p, q in zip(a, b, strict=True) if p > 0)  # fmt: skip
    assert float(reflection(old, now).detach()) == pytest.approx(expected / 2)
    assert float(reflection(old, old)) == 0.0


def lora_begun(tmp_path: Path, **options: Any) -> tuple[Any, Any, Any]:
    """In the second task of the stream, the first one learned by chance."""
    strategy, model = lora_cases.strategy_of("sapt-lora", **MEMORY, **options), lora_model()
    learn(strategy, model, 0, tmp_path, 0.3)
    context = context_of(model, tmp_path)
    strategy.begin(context, stage_of(lora_cases.STREAM, 1))
    train_by_chance(model, 1, 0.3)
    encoder = context.encoder
    batch = collate(encoder.many(lora_cases.STREAM.tasks[1].train[:3]), 0, encoder_decoder=False, side="left")
    return strategy, model, batch


def test_every_layer_adds_all_tasks_loras_by_their_shares_of_the_row(tmp_path: Path) -> None:
    strategy, model, batch = lora_begun(tmp_path)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    handles = strategy.attach(model, optimizer)
    strategy.watch(model, batch)
    shares = strategy.attended.shares
    table = model.get_input_embeddings()
    for row in range(3):  # the question alone is what is attended by
        asked = batch["attention_mask"][row].bool() & (batch["labels"][row] == -100)
        x = table(batch["input_ids"][row][asked]).float().mean(0)
        torch.testing.assert_close(shares[row], strategy.attended.attention(x[None])[0])
    layer = next(iter(lora_layers(model).values()))
    seen: list[tuple[Tensor, Tensor]] = []
    hook = layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    hook.remove()
    (x, out), (a, b) = seen[0], lora_factors(model)[0]
    for row in range(3):
        expected = x[row] @ layer.base_layer.weight.T
        for task in range(2):
            ranks = slice(task * R, (task + 1) * R)
            update = 8.0 / R * b[:, ranks] @ a[ranks]
            expected = expected + shares[row, task].double() * x[row] @ update.T
        torch.testing.assert_close(out[row], expected.detach(), rtol=1e-5, atol=1e-6)
    for handle in handles:
        handle.remove()


def test_earlier_loras_and_keys_stay_and_only_the_new_ones_learn(tmp_path: Path) -> None:
    strategy, model, batch = lora_begun(tmp_path)
    attention = strategy.attended.attention
    before = [f.detach().clone() for pair in lora_factors(model) for f in pair]
    keys = attention.keys.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    handles = strategy.attach(model, optimizer)
    for _ in range(2):
        strategy.watch(model, batch)
        outputs = model(**batch)
        strategy.loss(model, batch, outputs, outputs.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    for handle in handles:
        handle.remove()
    for i, (old, new) in enumerate(zip(before, (f for p in lora_factors(model) for f in p), strict=True)):
        mine = slice(R, None)
        assert torch.equal(old[:R] if i % 2 == 0 else old[:, :R], new[:R] if i % 2 == 0 else new[:, :R])
        assert not torch.equal(
            old[mine] if i % 2 == 0 else old[:, mine], new[mine] if i % 2 == 0 else new[:, mine]
        )
    assert torch.equal(keys[0], attention.keys[0])
    assert not torch.equal(keys[1], attention.keys[1])


def test_reflection_pulls_old_rows_back_to_their_own_lora(tmp_path: Path) -> None:
    strategy, model, batch = lora_begun(tmp_path)
    attended = strategy.attended
    assert [row.tolist() for row in attended.remembered] == [[1.0]] * 3, "one task alone has all"
    assert attended._targets.tolist() == [[1.0, 0.0]] * 3
    shares = attended.attention(attended._features)
    loss = strategy.loss(model, batch, None, ZERO + 2.0)
    torch.testing.assert_close(loss, 2.0 - shares[:, 0].log().mean())
    optimizer = torch.optim.SGD(attended.attention.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        strategy.loss(model, batch, None, ZERO).backward()
        optimizer.step()
    after = attended.attention(attended._features)
    assert bool((after[:, 0] > shares[:, 0]).all())


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_prompts_of_all_tasks_are_mixed_by_their_shares(kind: str, tmp_path: Path) -> None:
    strategy, model = prompt_cases.strategy_of("sapt-prompt", tokens=3, **MEMORY), prompt_cases.model_of(kind)
    for number in range(2):
        context, stage = context_of(model, tmp_path), prompt_cases.stage_of(number)
        strategy.begin(context, stage)
        if number == 0:
            strategy.end(context, stage)
    rows = [Encoded(r.prompt_ids[:5], r.completion_ids) for r in prompt_cases.rows_of(kind)[:2]]
    batch = prompt_cases.batch_of(kind, rows)
    seen: list[Tensor] = []
    inner = model.get_encoder() if kind == "t5" else model.model
    hook = inner.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].detach()), with_kwargs=True
    )
    strategy.watch(model, batch)
    with torch.no_grad():
        model(**batch)
    hook.remove()
    shares, new = strategy.attended.shares, strategy._new()
    for row in range(2):
        expected = shares[row, 0] * strategy.prompts[0] + shares[row, 1] * new
        torch.testing.assert_close(seen[-1][row, :3], expected.detach())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("soft_prompts.") for name in trained)


def test_a_buffer_that_drops_rows_is_refused() -> None:
    values = {"name": "sapt-lora", "memory": {"sampling": "reservoir", "count": 5}}
    with pytest.raises(ConfigError, match="take `balanced` or `generated`"):
        validate(STRATEGIES["sapt-lora"].Options, values, "test")
