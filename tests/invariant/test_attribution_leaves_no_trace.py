"""An attribution leaves the model, its gradients, its later training and the random state bit-identical."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from attribution_models import ROWS, build, lora
from holdfast.attribution import AttributionOptions, attribute_batches
from holdfast.errors import UnruledOperationError
from holdfast.importance.aggregate import AbsoluteMean
from holdfast.models import digest
from holdfast.tasks.encode import collate


def make(name: str):
    model = build(name, torch.float32)
    if name == "llama":
        model = lora(model, ["q_proj", "up_proj"])
    return model


def train(model, steps: int = 3) -> list[torch.Tensor]:
    """A few steps with dropout; what comes back is every loss and every weight."""
    torch.manual_seed(5)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = collate(ROWS, 0, encoder_decoder=model.config.is_encoder_decoder)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses + [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "t5"])
def test_logits_gradients_and_training_are_bit_identical(name: str) -> None:
    plain, attributed = make(name), make(name)
    batch = collate(ROWS, 0, encoder_decoder=plain.config.is_encoder_decoder)
    for model in (plain, attributed):
        model.train()
        model(**batch).loss.backward()  # gradients that must survive
    attributed.load_state_dict(plain.state_dict())
    for p, q in zip(plain.parameters(), attributed.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in attributed.modules()]
    functions = copy.copy(F.__dict__)
    random = torch.get_rng_state()

    for rules in ("paper", "attnlrp"):
        attribute_batches(
            attributed,
            ROWS,
            options=AttributionOptions(rules=rules, halves="path"),
            fold=AbsoluteMean(),
            pad_id=0,
            correct_only=False,
        )

    assert torch.equal(torch.get_rng_state(), random)
    assert F.__dict__ == functions
    assert all(m.training for m in attributed.modules())
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in attributed.modules()] == hooks
    assert digest(attributed) == digest(plain)
    for p, q in zip(plain.parameters(), attributed.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)
    plain.eval(), attributed.eval()
    assert torch.equal(plain(**batch).logits, attributed(**batch).logits)
    for model in (plain, attributed):
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(train(plain), train(attributed), strict=True))


@pytest.mark.parametrize("rules", ["paper", "attnlrp"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "t5"])
def test_the_traced_forward_computes_the_plain_logits(name: str, rules: str) -> None:
    model = build(name, torch.float32)
    seen = []
    handle = model.register_forward_hook(lambda m, a, k, out: seen.append((k, out.logits)), with_kwargs=True)
    attribute_batches(
        model,
        ROWS,
        options=AttributionOptions(rules=rules, halves="path"),
        fold=AbsoluteMean(),
        pad_id=0,
        correct_only=False,
    )
    handle.remove()
    inputs, logits = seen[0]
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits.detach())


def test_a_failed_attribution_leaves_no_trace_either() -> None:
    model = build("llama", torch.float32).train()
    model.model.layers[1].mlp.act_fn = torch.nn.Sigmoid()
    before = digest(model)
    with pytest.raises(UnruledOperationError):
        attribute_batches(model, ROWS, fold=AbsoluteMean(), pad_id=0, correct_only=False)
    assert digest(model) == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
