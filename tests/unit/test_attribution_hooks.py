"""A model that PEFT or TRL has put hooks on is attributed like one without them."""

from __future__ import annotations

import sys
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import holdfast
from holdfast.attribution import kernels
from holdfast.attribution.mode import attributable
from holdfast.models import tiny_llama
from holdfast.tasks import toy_tokenizer
from model_families import family


def test_hook_that_makes_embeddings_require_a_gradient_changes_nothing() -> None:
    tokenizer = toy_tokenizer()
    model = tiny_llama(tokenizer, hidden=16, layers=1)
    rows = [{"prompt": "ab=", "completion": "a"}, {"prompt": "cde=", "completion": "c"}]
    options = {"name": "lrp", "correct_only": False}
    plain = holdfast.attribute(model, tokenizer, rows, importance=options, progress=False)
    model.enable_input_require_grads()  # what gradient checkpointing with adapters needs: TRL's default
    hooked = holdfast.attribute(model, tokenizer, rows, importance=options, progress=False)
    assert all(torch.equal(plain.tensors[name], hooked.tensors[name]) for name in plain.tensors)
    assert hooked.meta["conservation_max_relative_error"] < 1e-5


class _OtherLinear(torch.autograd.Function):
    """As DeepSpeed's ZeRO-3 puts in the place of torch's, until the process ends."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return x.matmul(weight.t())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0].matmul(ctx.saved_tensors[0]), None


@pytest.mark.parametrize("importance", ["inputs", "lrp", "fisher"])
def test_a_linear_function_that_somebody_replaced_changes_nothing(
    importance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = toy_tokenizer()
    model = tiny_llama(tokenizer, hidden=16, layers=1)
    rows = [{"prompt": "ab=", "completion": "a"}, {"prompt": "cde=", "completion": "c"}]
    options = {"name": importance, **({} if importance == "fisher" else {"correct_only": False})}
    plain = holdfast.attribute(model, tokenizer, rows, importance=options, progress=False)
    other = lambda x, weight, bias=None: _OtherLinear.apply(x, weight)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "linear", other)
    replaced = holdfast.attribute(model, tokenizer, rows, importance=options, progress=False)
    assert all(torch.equal(plain.tensors[name], replaced.tensors[name]) for name in plain.tensors)
    assert torch.nn.functional.linear is other


@pytest.mark.parametrize("importance", ["inputs", "lrp", "fisher"])
def test_attention_by_a_kernel_that_shows_no_operation_is_rated_as_torch_s(importance: str) -> None:
    """flex_attention, which has no way back on a CPU; flash attention's kernels show nothing either."""
    tokenizer, found = toy_tokenizer(), []
    rows = [{"prompt": "ab=", "completion": "a"}, {"prompt": "cde=", "completion": "c"}]
    options = {"name": importance, **({} if importance == "fisher" else {"correct_only": False})}
    for attention in ("sdpa", "flex_attention"):
        model = tiny_llama(tokenizer, hidden=32, layers=1, heads=2)
        model.set_attn_implementation(attention)
        found.append(holdfast.attribute(model, tokenizer, rows, importance=options, progress=False).tensors)
        assert model.config._attn_implementation == attention
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_the_attention_of_each_part_is_what_it_was() -> None:
    model = family("gemma3", torch.float32)
    config = model.config
    config._attn_implementation = "flex_attention"
    config.text_config._attn_implementation = "sdpa"
    with attributable(model, []):
        assert config._attn_implementation == config.text_config._attn_implementation == "sdpa"
    assert config._attn_implementation == "flex_attention"
    assert config.text_config._attn_implementation == "sdpa"
    assert config.vision_config._attn_implementation == "flex_attention"


class _FusedNorm(torch.autograd.Function):
    """As Liger's: one kernel for the norm, and its derivative, which is no rule for relevance."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x.detach() * torch.rsqrt(x.detach().square().mean(-1, keepdim=True) + 1e-6) * weight

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return torch.zeros_like(gradients[0]), None


def test_kernels_that_liger_puts_into_modules_are_off_while_they_are_rated() -> None:
    def fused(self: Any, x: torch.Tensor) -> torch.Tensor:
        return _FusedNorm.apply(x, self.weight)

    fused.__module__ = "liger_kernel.transformers.rms_norm"
    tokenizer, found = toy_tokenizer(), []
    rows = [{"prompt": "ab=", "completion": "a"}, {"prompt": "cde=", "completion": "c"}]
    for liger in (False, True):
        model = tiny_llama(tokenizer, hidden=32, layers=1, heads=2)
        norm = model.model.layers[0].input_layernorm
        if liger:  # as _apply_liger_kernel_to_instance does, which the Trainer calls
            norm.forward = MethodType(fused, norm)  # type: ignore[method-assign]
        options = {"name": "inputs", "correct_only": False}
        found.append(holdfast.attribute(model, tokenizer, rows, importance=options, progress=False).tensors)
        assert ("forward" in norm.__dict__) == liger
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_an_importance_that_is_zero_everywhere_says_so() -> None:
    tokenizer = toy_tokenizer()
    model = get_peft_model(
        tiny_llama(tokenizer, hidden=16, layers=1), LoraConfig(target_modules="all-linear")
    )
    rows = [{"prompt": "ab=", "completion": "a"}]
    options = {"name": "inputs", "correct_only": False}
    with pytest.warns(UserWarning, match=r"'inputs': all 14 tensors came out as zero.*new \(B = 0\)"):
        holdfast.attribute(model, tokenizer, rows, importance=options, progress=False)


class _FusedProduct(torch.autograd.Function):
    """As Liger's, whose derivative gives the relevance of a product twice."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.nn.functional.silu(gate.detach()) * up.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], gradients[0], None, None


def test_classes_that_stand_on_ligers_functions_are_rated_as_those_they_replace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    norm_by = type("LigerRMSNormFunction", (_FusedNorm,), {})
    product_by = type("LigerSiLUMulFunction", (_FusedProduct,), {})
    functions = SimpleNamespace(LigerRMSNormFunction=norm_by, LigerSiLUMulFunction=product_by)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", functions)  # type: ignore[arg-type]
    norm = {"forward": lambda self, x: norm_by.apply(x, self.weight, self.variance_epsilon)}
    mlp = {"forward": lambda self, x: self.down_proj(product_by.apply(self.gate_proj(x), self.up_proj(x)))}
    tokenizer, found = toy_tokenizer(), []
    rows = [{"prompt": "ab=", "completion": "a"}, {"prompt": "cde=", "completion": "c"}]
    for liger in (False, True):
        model = tiny_llama(tokenizer, hidden=32, layers=2, heads=2)
        for module in model.modules() if liger else ():  # as apply_liger_kernel_to_llama() lets them be made
            if type(module) is LlamaRMSNorm:
                module.__class__ = type("LigerRMSNorm", (LlamaRMSNorm,), norm)
            elif type(module) is LlamaMLP:
                module.__class__ = type("LigerSwiGLUMLP", (LlamaMLP,), mlp)
        options = {"name": "inputs", "correct_only": False}
        found.append(holdfast.attribute(model, tokenizer, rows, importance=options, progress=False).tensors)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert "apply" not in vars(norm_by)
    assert "apply" not in vars(product_by)


def test_what_stands_in_for_ligers_functions_computes_what_transformers_does() -> None:
    x_ND, weight_D = torch.randn(7, 6), torch.randn(6)
    norms = {"llama": LlamaRMSNorm(6, 1e-5), "gemma": GemmaRMSNorm(6, 1e-5)}
    for mode, norm in norms.items():
        norm.weight.data = weight_D
        shown = kernels._rms_norm(x_ND, weight_D, 1e-5, 1.0 if mode == "gemma" else 0.0, mode)
        assert torch.equal(shown, norm(x_ND))
    gate, up = torch.randn(2, 7, 6)
    assert torch.equal(kernels._gelu_mul(gate, up), torch.nn.functional.gelu(gate, approximate="tanh") * up)
    assert torch.equal(kernels._silu_mul(gate, up, 2.0, 3.0), torch.nn.functional.silu(2 * gate) * up * 3)
    config = MixtralConfig(hidden_size=6, intermediate_size=5, num_local_experts=4)
    config._experts_implementation = "eager"
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        parameter.data.normal_()
    chosen_NK, weights_NK = torch.rand(7, 4).topk(2).indices, torch.rand(7, 2)
    shown = kernels._experts(x_ND, experts.gate_up_proj, experts.down_proj, chosen_NK.int(), weights_NK)
    assert torch.allclose(shown, experts(x_ND, chosen_NK, weights_NK), atol=1e-6)
