"""Relevance sums to the target, on every architecture, without a line of code about any of them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from attribution_models import BUILDERS, ROWS, Keep, build, lora
from holdfast.attribution import AttributionOptions, attribute_batches
from holdfast.errors import ConservationError, UnruledOperationError
from holdfast.importance.aggregate import AbsoluteMean


def attribute(model, fold=None, **options):
    return attribute_batches(
        model,
        ROWS,
        options=AttributionOptions(**{"halves": "path", **options}),
        fold=fold or AbsoluteMean(),
        pad_id=0,
        correct_only=False,
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rules", ["paper", "attnlrp"])
@pytest.mark.parametrize("name", list(BUILDERS))
def test_relevance_is_conserved_to_1e_9_in_float64(name: str, rules: str, attention: str) -> None:
    model = build(name, attention=attention)
    for halves in ("path", "weights", "none"):
        report = attribute(model, rules=rules, halves=halves)
        assert report.conservation_max_relative_error < 1e-9, halves
        assert report.unreached == ()
        assert (report.created != 0) == (halves != "path")


@pytest.mark.parametrize("of", ["logit", "log_probability"])
@pytest.mark.parametrize("target", ["all", "first"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_every_target_is_conserved(name: str, target: str, of: str) -> None:
    assert attribute(build(name), target=target, of=of).conservation_max_relative_error < 1e-9


@pytest.mark.parametrize(
    ("name", "reason"), [("gpt_neox", "layer_norm bias"), ("opt", "add"), ("t5", "attention bias")]
)
def test_absorbed_terms_are_accounted_for_by_name(name: str, reason: str) -> None:
    assert attribute(build(name), rules="paper").absorbed[reason] != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "t5"])
def test_lower_precision_passes_the_check(name: str, dtype: torch.dtype) -> None:
    report = attribute(build(name, dtype))
    assert report.conservation_max_relative_error < (1e-3 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("rules", ["paper", "attnlrp"])
@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama", ["q_proj", "v_proj", "down_proj"]), ("gpt2", ["c_attn", "c_fc"]), ("t5", ["q", "v", "wo"])],
)
def test_both_lora_factors_get_relevance_and_the_frozen_backbone_is_counted(name, targets, rules) -> None:
    model = lora(build(name), targets)
    fold = Keep()
    report = attribute(model, fold, rules=rules)
    assert report.conservation_max_relative_error < 1e-9
    assert all(".lora_A.weight" in n or ".lora_B.weight" in n for n in fold.maps)
    assert not any("base_model" in n or "default" in n for n in fold.maps)
    assert {n for n, r in fold.maps.items() if r.abs().max() == 0} == set()
    assert len(fold.maps) == 2 * sum(n.endswith("lora_A.default") for n, _ in model.named_modules())


def test_hooks_that_make_embeddings_require_grad_do_no_harm() -> None:
    model = build("llama")
    plain = attribute(model).conservation_max_relative_error
    model.enable_input_require_grads()  # what PEFT and TRL do for gradient checkpointing
    assert attribute(model).conservation_max_relative_error == plain


class Tangent(torch.nn.Module):
    def forward(self, x):
        return torch.tan(x)


class Cube(torch.nn.Module):
    def forward(self, x):
        return x**3


class Square(torch.nn.Module):
    def forward(self, x):
        return x.square() + x


@pytest.mark.parametrize(("module", "operation"), [(Tangent, "tan"), (Cube, "pow"), (Square, "add")])
def test_an_unruled_operation_is_named_with_its_module(module, operation) -> None:
    model = build("llama")
    model.model.layers[1].mlp.act_fn = module()
    with pytest.raises(
        UnruledOperationError, match=rf"model\.layers\.1\.mlp\.act_fn \({module.__name__}\).*'{operation}'"
    ):
        attribute(model)


class Unhooked(torch.nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.data * 2)


def test_a_map_computed_of_a_weight_that_is_read_past_autograd_is_named() -> None:
    model = build("llama")
    old = model.model.layers[0].mlp.up_proj
    new = Unhooked(old.in_features, old.out_features, bias=False).double()
    model.model.layers[0].mlp.up_proj = new
    with pytest.raises(UnruledOperationError, match=r"mlp\.up_proj \(Unhooked\).*'linear'.*that '\w+' makes"):
        attribute(model)


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        with torch._C.DisableTorchFunction():  # as a kernel, which shows nothing of what it does
            return F.silu(x) + 0.3 * x.softmax(-1)

    @staticmethod
    def backward(ctx, g):
        return g * torch.sigmoid(ctx.saved_tensors[0])


class Hidden(torch.nn.Module):
    def forward(self, x):
        return Opaque.apply(x)


def test_a_leak_that_no_operation_shows_fails_the_check() -> None:
    model = build("llama", torch.float32)
    for layer in model.model.layers:
        layer.mlp.act_fn = Hidden()
    with pytest.raises(ConservationError, match=r"not conserved.*autograd\.Function"):
        attribute(model)


def test_a_wrong_rule_fails_the_check_and_is_named(monkeypatch) -> None:
    from holdfast.attribution.rules import RULES

    monkeypatch.setitem(RULES, "silu", lambda trace, name, func, args, kwargs: func(*args, **kwargs))
    with pytest.raises(ConservationError, match=r"Most is lost in 'silu' in model\.layers\.\d\.mlp\.act_fn"):
        attribute(build("llama"))
