"""One rule for each operation: how Lambda = R / value flows back through it (A, section 4.1).

A rule is a function ``rule(trace, name, func, args, kwargs) -> output`` registered for the names of torch
operations. It is called when an argument is tracked. Operations that are linear in their tracked arguments
need no change to the gradient at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast.attribution.ledger import relevance
from holdfast.attribution.trace import Ruled, Trace, tensors_in, tracked

Rule = Callable[[Trace, str, Callable[..., Any], Sequence[Any], Mapping[str, Any]], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations by name; in-place and reflected forms are separate names."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


# ---- linear: unchanged -------------------------------------------------------------------------------------


@rule("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze")
@rule("expand", "expand_as", "broadcast_to", "repeat", "repeat_interleave", "tile", "roll", "flip", "clone")
@rule("transpose", "permute", "T", "mT", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "unfold")
@rule("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "narrow", "select", "__getitem__")
@rule("index_select", "gather", "take_along_dim", "diagonal", "tril", "triu")
@rule("neg", "sum", "mean", "cumsum", "contiguous")
@rule("requires_grad_")  # a hook of PEFT and TRL on the embeddings; it changes no value
def linear_unchanged(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Selections, shapes and sums: autograd's gradient is the rule."""
    return func(*args, **kwargs)


@rule("to", "float", "double", "half", "bfloat16", "type", "type_as")
def cast(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """A change of type is linear. A float64 model stays in float64, so that conservation is exact."""
    output, x = func(*args, **kwargs), args[0]
    lowered = tracked(x) and x.dtype == torch.float64 and output.dtype != torch.float64
    return x if lowered and output.is_floating_point() else output


@rule("add", "add_", "sub", "sub_", "__rsub__", "rsub", "where", "masked_fill", "masked_fill_")
@rule("cat", "concat", "stack", "hstack", "pad")
def affine(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Sums: every addend keeps its Lambda; what is added as a constant absorbs its part."""
    addends = tensors_in(args[0]) if name in _JOINING else args[:2]
    if trace.ledger is None or (name in _ADDING and all(map(tracked, addends))):
        return func(*args, **kwargs)
    with torch.no_grad():  # the constant part is the value at zero
        constant = func(*_at_zero(args), **_at_zero(kwargs))
        constant = constant.clone() if name.endswith("_") else constant  # the operation is yet to change it
    output = func(*args, **kwargs)
    if constant.count_nonzero():
        trace.book(output, lambda ledger, lam: ledger.absorb(name, relevance(constant, lam)))
    return output


_JOINING = frozenset({"cat", "concat", "stack", "hstack"})
_ADDING = _JOINING | {"add", "sub"}


def _at_zero(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.zeros_like(value) if tracked(value) else value
    if isinstance(value, dict):
        return {key: _at_zero(item) for key, item in value.items()}
    return type(value)(_at_zero(item) for item in value) if isinstance(value, list | tuple) else value


@rule("dropout")
def dropout(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """The identity, as attribution runs in evaluation mode."""
    p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    training = args[2] if len(args) > 2 else kwargs.get("training", True)
    if p and training:
        raise trace.unruled(name, "while it drops something at random")
    return func(*args, **kwargs)


# ---- products ----------------------------------------------------------------------------------------------


@rule("mul", "mul_", "multiply")
def multiply(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """A product of two activations halves; a factor without relevance (norm weight) is a constant."""
    if tracked(args[0]) and tracked(args[1]):
        if name == "mul_":
            raise trace.unruled(name, "for two activations")
        return trace.product(func(*args, **kwargs))
    return func(*args, **kwargs)


@rule("div", "div_", "true_divide")
def divide(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Division by a constant is linear."""
    if tracked(args[1]) or kwargs.get("rounding_mode"):
        raise trace.unruled(name, "by an activation")
    return func(*args, **kwargs)


@rule("einsum")
def einsum(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """One activation with constants is linear; two are a product."""
    operands = list(tensors_in(*args[1:]))
    both = sum(map(tracked, operands))
    if both > 2 or any(trace.maps.source(o) is not None for o in operands if not tracked(o)):
        raise trace.unruled(name, "of three activations, or of an activation and a weight")
    output = func(*args, **kwargs)
    return trace.product(output) if both == 2 else output


# ---- linear maps, Lemma 4.1 --------------------------------------------------------------------------------


@rule("linear")
def linear(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """C = P W^T + B with W (O, I), as torch.nn.Linear has it."""
    x, weight, bias = _arguments(("input", "weight", "bias"), args, kwargs)
    if tracked(weight) or tracked(bias):
        raise trace.unruled(name, "with a weight that is itself an activation")
    return linear_map(trace, name, x, weight, bias, out_first=True)


@rule("addmm")
def addmm(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """C = B + P W with W (I, O), as transformers' Conv1D has it."""
    bias, x, weight = args[:3]
    if len(args) > 3 or kwargs or tracked(bias) or tracked(weight):
        raise trace.unruled(name, "except as bias + activation @ weight")
    return linear_map(trace, name, x, weight, bias, out_first=False)


@rule("matmul", "mm", "bmm", "baddbmm")
def matmul(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Activation times weight is a linear map; activation times activation is a product."""
    left, right = args[-2:] if name == "baddbmm" else args[:2]
    if name == "baddbmm" and kwargs.get("beta", 1) != 0:
        raise trace.unruled(name, "with beta other than 0")
    if tracked(left) and tracked(right):
        return trace.product(func(*args, **kwargs))
    constant = right if tracked(left) else left
    if trace.maps.source(constant) is None:
        return func(*args, **kwargs)
    if constant is left or right.dim() != 2 or name == "baddbmm":
        raise trace.unruled(name, "with a weight on its left, or with a batch of weights")
    return linear_map(trace, name, left, right, None, out_first=False)


def _arguments(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    return [args[i] if i < len(args) else kwargs.get(key) for i, key in enumerate(names)]


def linear_map(
    trace: Trace, name: str, x: Tensor, weight: Tensor, bias: Tensor | None, *, out_first: bool
) -> Tensor:
    """Lemma 4.1: Lambda_P = 1/2 Lambda_C W^T, R(W) = 1/2 W (P^T Lambda_C), R(B) = B Lambda_C.

    x is (..., I), weight (O, I) if `out_first` else (I, O). A matrix that is no parameter of the model is a
    constant linear map: it takes no relevance, so nothing is halved.
    """
    maps, parameter = trace.maps, trace.maps.source(weight)
    if maps.wants(parameter) and weight is not parameter:
        raise trace.unruled(name, "with a part or a transpose of a weight")
    half = 1.0 if parameter is None else trace.path
    wanted = [p for p in (parameter, bias) if maps.wants(p)]
    if wanted and not maps.holds_samples(x):
        raise trace.unruled(name, f"where samples are not the first dimension (got shape {tuple(x.shape)})")
    for p in wanted:
        maps.expect(p)
    ledger = trace.ledger

    def compute(x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        if out_first:
            return F.linear(x, weight, bias), (x,)
        return (torch.matmul(x, weight) if bias is None else torch.addmm(bias, x, weight)), (x,)

    def backward(lam: Tensor, x: Tensor) -> tuple[Tensor]:
        if maps.wants(parameter):
            maps.weight(parameter, x, lam, out_first, ledger)  # type: ignore[arg-type]
        if maps.wants(bias):
            maps.bias(bias, lam, ledger)  # type: ignore[arg-type]
        lam_R, matrix_OI = lam.reshape(-1, lam.shape[-1]).to(x.dtype), weight if out_first else weight.t()
        lam_x = torch.addmm(lam_R.new_empty(1), lam_R, matrix_OI, beta=0, alpha=half).view(x.shape)
        if ledger is not None:
            through = relevance(x, lam_x) / half * maps.factor  # of sum (P W) * Lambda the weight's part
            of_bias = 0.0 if bias is None else relevance(bias, lam)
            ledger.take(0.0 if parameter is None else through, of_bias)
            ledger.maps_expected += through * maps.wants(parameter) + of_bias * maps.wants(bias)
        return (lam_x,)

    return Ruled.apply(compute, backward, x)


# ---- activations, Proposition 4.2 --------------------------------------------------------------------------


@rule("silu")
def silu(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """silu(x) / x is the sigmoid, at x = 0 too."""
    return Ruled.apply(lambda x: (F.silu(x), (torch.sigmoid(x),)), lambda lam, ratio: (lam * ratio,), args[0])


@rule("gelu", "relu", "tanh", "leaky_relu", "elu", "selu", "celu", "hardswish", "mish", "softsign")
@rule("hardtanh", "relu6", "erf", "clamp", "clip", "tanhshrink", "softshrink", "hardshrink")
def activation(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """R(U) = R(S): Lambda_U = Lambda_S * f(x) / x, and f'(0) at x = 0."""
    x, rest = args[0], args[1:]
    if any(map(tracked, rest)):
        raise trace.unruled(name, "with an activation as its limit")
    kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
    return identity(trace, name, lambda u: func(u, *rest, **kwargs), x)


def identity(
    trace: Trace, name: str, function: Callable[[Tensor], Tensor], x: Tensor, y: Tensor | None = None
) -> Tensor:
    """The identity rule for any element-wise function with function(0) = 0; y is its value if known."""
    with torch.enable_grad():
        zero = torch.zeros(1, dtype=x.dtype, device=x.device, requires_grad=True)
        at_zero = function(zero)
        (slope,) = torch.autograd.grad(at_zero.sum(), zero)
    if at_zero.item() != 0:
        raise trace.unruled(name, f"as it is {at_zero.item():.3g} at zero, so relevance has no share there")

    def compute(x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        value = function(x) if y is None else y
        return value, ((value / x).masked_fill_(x == 0, slope.item()),)

    return Ruled.apply(compute, lambda lam, ratio: (lam * ratio,), x)


def whole_module(trace: Trace, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """An activation module of transformers, composed of elementary operations, as one function of x."""
    name = type(module).__name__
    return identity(trace, name, lambda u: type(module).forward(module, u), x, y)


# ---- normalisation: the normaliser is a constant -----------------------------------------------------------


@rule("layer_norm")
def layer_norm(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """1 / sigma is a constant, subtracting the mean is linear, and the bias absorbs its part."""
    x, shape, weight, bias = _arguments(("input", "normalized_shape", "weight", "bias"), args, kwargs)
    eps = args[4] if len(args) > 4 else kwargs.get("eps", 1e-5)
    dims = tuple(range(-len(shape), 0))
    ledger = trace.ledger

    def compute(x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        y, _, inverse = torch.native_layer_norm(x, tuple(shape), weight, bias, eps)
        return y, (inverse,)

    def backward(lam: Tensor, inverse: Tensor) -> tuple[Tensor]:
        if ledger is not None and bias is not None:
            ledger.absorb("layer_norm bias", relevance(bias, lam))
        lam_x = (lam if weight is None else lam * weight) * inverse
        return ((lam_x - lam_x.mean(dims, keepdim=True)).to(x.dtype),)

    return Ruled.apply(compute, backward, x)


@rule("rms_norm")
def rms_norm(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """1 / rms is a constant."""
    x, shape, weight, eps = _arguments(("input", "normalized_shape", "weight", "eps"), args, kwargs)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    dims = tuple(range(-len(shape), 0))

    def compute(x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        wide = x if x.dtype == torch.float64 else x.float()
        inverse = torch.rsqrt(wide.square().mean(dims, keepdim=True) + eps)
        return func(x, shape, weight, eps), (inverse,)

    def backward(lam: Tensor, inverse: Tensor) -> tuple[Tensor]:
        return (((lam if weight is None else lam * weight) * inverse).to(x.dtype),)

    return Ruled.apply(compute, backward, x)
