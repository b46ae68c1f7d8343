"""What hides its operations in one step is put aside while a model is rated: it computes as torch shows it.

Undone on exit, bit for bit: training and answering keep their kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def by_operations(model: nn.Module) -> Iterator[None]:
    """Let a model compute by what torch shows: compiled parts, experts, attention, linear layers, Liger."""
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_fused_experts_and_attention(model))
        stack.enter_context(_kernels_in_modules(model))
        stack.enter_context(_another_linear())
        stack.enter_context(_kernels_in_classes())
        yield


@contextmanager
def _fused_experts_and_attention(model: Any) -> Iterator[None]:
    """Each expert is a linear map of its own (fused kernels copy the weights), and attention is torch's.

    Flash and flex attention are functions that show nothing of what they do.
    """
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    attention = "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"
    shown = {"_experts_implementation": ("eager",), "_attn_implementation": ("eager", "sdpa")}
    before = [
        (config, option, chosen)
        for config in configs.values()
        for option in shown
        if (chosen := getattr(config, option, None)) is not None
    ]
    try:
        for config, option, chosen in before:
            if chosen not in shown[option]:
                setattr(config, option, attention if option == "_attn_implementation" else "eager")
        yield
    finally:
        for config, option, chosen in before:  # what is set of a whole is set of its parts: these come later
            setattr(config, option, chosen)


@contextmanager
def _kernels_in_modules(model: nn.Module) -> Iterator[None]:
    """Take off what Liger puts into modules of a model that is there (the Trainer's ``use_liger_kernel``)."""
    fused = [
        (module, module.__dict__.pop("forward"))
        for module in model.modules()
        if getattr(module.__dict__.get("forward"), "__module__", "").startswith("liger_kernel.")
    ]
    try:
        yield
    finally:
        for module, forward in fused:
            module.__dict__["forward"] = forward


@contextmanager
def _another_linear() -> Iterator[None]:
    """Let nn.Linear show its operation: DeepSpeed's ZeRO-3 puts a function without one in its place."""
    found = nn.functional.linear
    try:
        nn.functional.linear = torch._C._nn.linear
        yield
    finally:
        nn.functional.linear = found


@contextmanager
def _kernels_in_classes() -> Iterator[None]:
    """Let Liger's functions, on which its classes stand (``apply_liger_kernel_to_llama()``), be torch's.

    Its rotation is linear, so that its own derivative is right.
    """
    functions = sys.modules.get("liger_kernel.ops")
    found = [(getattr(functions, name), shown) for name, shown in _SHOWN.items() if hasattr(functions, name)]
    try:
        for function, shown in found:
            function.apply = staticmethod(shown)
        yield
    finally:
        for function, _ in found:
            del function.apply


def _rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, casting_mode: str = "llama", *_: Any
) -> Tensor:
    wide = x if casting_mode == "none" else x.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if casting_mode == "gemma":
        return (normed * (offset + weight.to(torch.float32))).to(x.dtype)
    return (offset + weight if offset else weight) * normed.to(x.dtype)


def _silu_mul(gate: Tensor, up: Tensor, by_gate: float = 1.0, by_product: float = 1.0) -> Tensor:
    product = F.silu(gate * by_gate if by_gate != 1 else gate) * up
    return product * by_product if by_product != 1 else product


def _gelu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def _experts(
    x_NH: Tensor, gate_up_EIH: Tensor, down_EHI: Tensor, chosen_NK: Tensor, weights_NK: Tensor
) -> Tensor:
    """Each expert's own tokens by linear maps of its own."""
    sum_NH = torch.zeros_like(x_NH)
    for expert in chosen_NK.unique().tolist():
        token, place = torch.where(chosen_NK == expert)
        gate, up = F.linear(x_NH[token], gate_up_EIH[expert]).chunk(2, dim=-1)
        said = F.linear(_silu_mul(gate, up), down_EHI[expert]) * weights_NK[token, place, None]
        sum_NH.index_add_(0, token, said.to(sum_NH.dtype))
    return sum_NH


_SHOWN: dict[str, Callable[..., Tensor]] = {
    "LigerFusedMoEFunction": _experts,
    "LigerRMSNormFunction": _rms_norm,
    "LigerSiLUMulFunction": _silu_mul,
    "LigerGELUMulFunction": _gelu_mul,
}
