"""Importances by gradients rate whatever is trained: embeddings, norms, magnitudes, saved modules, biases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PromptTuningConfig,
    ShiraConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor

from holdfast.attribution.targets import make_batch
from holdfast.hold import Gate
from holdfast.importance import compute_prior
from holdfast.importance.prior import trained_parameters
from holdfast.tasks.encode import Encoded
from tiny_models import tiny_model

ADAPTERS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "modules to save": {"modules_to_save": ["norm"]},
    "bias": {"bias": "all"},
}


OTHERS = {
    "IA3": IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False),
    "SHiRA": ShiraConfig(r=2, target_modules=["q_proj"], init_weights=False),
    "LoHa": LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False),
    "VeRA": VeraConfig(r=2, target_modules=["q_proj"], init_weights=False),
    "OFT": OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"], init_weights=False),
    "norms": LNTuningConfig(target_modules=["input_layernorm"]),
    "prompts": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
}


def rows() -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(3, 20, (count,), generator=generator).tolist()

    return [Encoded(draw(5 + i), draw(2 + i % 2), 0) for i in range(3)]


def model_of(kind: str) -> Any:
    if kind in OTHERS:
        return get_peft_model(tiny_model("llama"), OTHERS[kind]).eval()
    made = tiny_model(kind if kind not in ADAPTERS else "gpt2" if kind == "bias" else "llama")
    if kind in ADAPTERS:
        target = ["c_attn"] if kind == "bias" else ["q_proj"]
        config = LoraConfig(r=2, target_modules=target, init_lora_weights=False, **ADAPTERS[kind])
        made = get_peft_model(made, config)
    return made.eval()


def squares_of_autograd(model: Any) -> dict[str, Tensor]:
    """Sample by sample, of the log-likelihood of the answer."""
    trained = trained_parameters(model)
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    for row in rows():
        batch = make_batch(model, [row], 0, torch.device("cpu"), "left")
        log_p_STV = torch.log_softmax(model(**batch.inputs).logits, dim=-1)
        place = batch.answer_ST != -100
        chosen = log_p_STV.gather(-1, batch.answer_ST.clamp(min=0)[..., None])[..., 0][place].sum()
        grads = torch.autograd.grad(chosen, list(trained.values()), allow_unused=True)
        for name, grad in zip(trained, grads, strict=True):
            total[name] += 0 if grad is None else grad.square() / len(rows())
    return total


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", *ADAPTERS, *OTHERS])
def test_fisher_of_every_trained_weight_is_autograds_one_sample_at_a_time(kind: str) -> None:
    model = model_of(kind)
    expected, prior = squares_of_autograd(model), compute_prior(model, rows(), "fisher", pad_id=0)
    assert list(prior.tensors)
    assert prior.tensors.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(float(value.max()), 1e-12)
        assert float((prior.tensors[name] - value).abs().max()) < 1e-4 * scale, name
    # LoHa's weights are made by products that are followed sample by sample
    assert bool(prior.meta.get("one_at_a_time")) == (kind != "LoHa")


@pytest.mark.parametrize("kind", ["llama", *OTHERS])
def test_all_that_such_a_prior_rates_is_held_bit_for_bit(kind: str) -> None:
    model = model_of(kind)
    prior = compute_prior(model, rows(), "uniform", pad_id=0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    Gate(prior).attach(model, optimizer)
    model(torch.arange(6)[None]).logits.square().mean().backward()
    optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_what_trains_linear_maps_alone_is_rated_in_batches_as_before() -> None:
    model = model_of("llama")
    for name, p in model.named_parameters():
        p.requires_grad_("proj" in name)
    prior = compute_prior(model, rows(), "fisher", pad_id=0)
    assert "one_at_a_time" not in prior.meta
    assert all("proj" in name for name in prior.tensors)


def test_lrp_rates_linear_maps_in_the_blocks() -> None:
    prior = compute_prior(model_of("llama"), rows(), {"name": "lrp", "correct_only": False}, pad_id=0)
    assert all("proj" in name for name in prior.tensors)
