"""One rule for each operation: how Lambda = R / value flows back through it (A, section 4.1).

A rule is a function ``rule(trace, name, func, args, kwargs) -> output`` registered for the names of torch
operations. It is called when an argument is tracked. Operations that are linear in their tracked arguments
need no change to the gradient at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_input, conv1d_weight

from holdfast.attribution.ledger import Ledger, relevance
from holdfast.attribution.samples import rows_of
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
@rule(
    "transpose",
    "permute",
    "T",
    "mT",
    "t",
    "swapaxes",
    "swapdims",
    "movedim",
    "moveaxis",
    "unfold",
    "as_strided",
)
@rule("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "narrow", "select", "__getitem__")
@rule("index_select", "gather", "take_along_dim", "diagonal", "tril", "triu", "masked_select")
@rule("neg", "sum", "mean", "cumsum", "contiguous", "view_as_complex", "view_as_real", "real", "imag")
@rule("requires_grad_")  # a hook of PEFT and TRL on the embeddings; it changes no value
def linear_unchanged(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Selections, shapes and sums: autograd's gradient is the rule."""
    return func(*args, **kwargs)


@rule("topk", "max", "amax", "min", "amin", "sort", "maximum", "minimum")
def choice(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """What is chosen passes on; which it is, is a constant (the experts of a token, a row's largest)."""
    if name in _OF_TWO and len(args) > 1 and isinstance(args[1], Tensor):
        x, y = args[:2]
        return RULES["where"](trace, "where", torch.where, (x >= y if "max" in name else x <= y, x, y), {})
    return func(*args, **kwargs)


_OF_TWO = frozenset({"max", "min", "maximum", "minimum"})


@rule("to", "float", "double", "half", "bfloat16", "type", "type_as")
def cast(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """A change of type is linear. A float64 model stays in float64, so that conservation is exact."""
    output, x = func(*args, **kwargs), args[0]
    lowered = tracked(x) and x.dtype == torch.float64 and output.dtype != torch.float64
    return x if lowered and output.is_floating_point() else output


@rule("add", "add_", "sub", "sub_", "__rsub__", "rsub", "where", "masked_fill", "masked_fill_")
@rule(
    "cat",
    "concat",
    "concatenate",
    "stack",
    "hstack",
    "vstack",
    "pad",
    "copy_",
    "__setitem__",
    "index_copy",
    "index_copy_",
)
@rule("index_add", "index_add_", "scatter", "scatter_", "scatter_add", "scatter_add_", "masked_scatter")
@rule("masked_scatter_", "index_put", "index_put_")
def affine(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Sums and what is put into place: each part keeps its Lambda; a constant one absorbs its own."""
    bias = next((a for a in args if trace.maps.wants(_source(trace, a))), None)
    if bias is not None:
        if name in ("add", "add_"):
            return added_bias(trace, name, func, args, kwargs, bias)
        raise trace.unruled(name, "with a weight that is to be attributed")
    addends = tensors_in(args[0]) if name in _JOINING else args[:2]
    if trace.ledger is None or (name in _ADDING and all(map(tracked, addends))):
        return func(*args, **kwargs)
    with torch.no_grad():  # the constant part is the value at zero
        at_zero = _at_zero(args)
        if in_place(name):  # the operation is yet to change it
            at_zero = (at_zero[0].clone(), *at_zero[1:])
        constant = func(*at_zero, **_at_zero(kwargs))
        constant = at_zero[0] if name == "__setitem__" else constant
    output = func(*args, **kwargs)
    if constant.count_nonzero():
        changed = args[0] if name == "__setitem__" else output
        trace.book(changed, lambda ledger, lam: ledger.absorb(name.strip("_"), relevance(constant, lam)))
    return output


def _source(trace: Trace, value: Any) -> nn.Parameter | None:
    return trace.maps.source(value) if isinstance(value, Tensor) and not tracked(value) else None


def added_bias(trace: Trace, name: str, func: Any, args: Any, kwargs: Any, bias: Tensor) -> Any:
    """A bias that is added by an operation of its own (an expert's): R(B) = B Lambda, as in a linear map."""
    x = args[1] if args[0] is bias else args[0]
    maps, ledger, rows = trace.maps, trace.ledger, rows_of(x)
    if kwargs.get("alpha", 1) != 1 or not maps.placeable(bias):
        raise trace.unruled(name, "with a factor on a weight, or with its elements repeated")
    output = func(*args, **kwargs)
    by_rows = rows is not None and output.dim() == 2
    if not (by_rows or maps.holds_samples(output)):
        raise trace.mixed(name, output.shape)
    maps.expect(maps.source(bias))

    def take(lam: Tensor) -> None:
        maps.bias(bias, lam, ledger, rows if by_rows else None)
        if ledger is not None:
            of_bias = relevance(bias.expand_as(lam), lam)
            ledger.take(0.0, of_bias)
            ledger.maps_expected += of_bias

    output.register_hook(take)
    return output


_JOINING = frozenset({"cat", "concat", "concatenate", "stack", "hstack", "vstack"})
_ADDING = _JOINING | {"add", "sub"}


def in_place(name: str) -> bool:
    """Whether an operation changes its first argument."""
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"


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
    """Division is linear in what is divided; what divides an activation is a normaliser, so a constant."""
    if kwargs.get("rounding_mode"):
        raise trace.unruled(name, "with rounding")
    if not tracked(args[0]):
        raise trace.unruled(name, "of a constant by an activation")
    if tracked(args[1]):
        args = (args[0], args[1].detach(), *args[2:])
    return func(*args, **kwargs)


@rule("linalg_solve_triangular")
def solve(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """A^-1 B is linear in B; what divides is a constant, as in `divide`."""
    if not tracked(args[1]):
        raise trace.unruled(name, "of a constant by an activation")
    return func(args[0].detach(), args[1], *args[2:], **kwargs)


@rule("einsum")
def einsum(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """One activation with constants is linear; two are a product."""
    operands = list(tensors_in(*args[1:]))
    both = sum(map(tracked, operands))
    if both > 2 or any(trace.maps.source(o) is not None for o in operands if not tracked(o)):
        raise trace.unruled(name, "of three activations, or of an activation and a weight")
    output = func(*args, **kwargs)
    return trace.product(output) if both == 2 else output


@rule("addcmul")
def addcmul(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """A sum with a product, apart."""
    value = kwargs.get("value", 1)
    left = args[1] if value == 1 else multiply(trace, "mul", torch.mul, (args[1], value), {})
    product = multiply(trace, "mul", torch.mul, (left, args[2]), {})
    return affine(trace, "add", torch.add, (args[0], product), {})


# ---- linear maps, Lemma 4.1 --------------------------------------------------------------------------------


@rule("linear")
def linear(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """C = P W^T + B with W (O, I), as torch.nn.Linear has it."""
    x, weight, bias = arguments(("input", "weight", "bias"), args, kwargs)
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


@rule("matmul", "mm", "bmm")
def matmul(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Activation times weight is a linear map; activation times activation is a product."""
    left, right = arguments(("input", "other" if name == "matmul" else "mat2"), args, kwargs)
    if tracked(left) and tracked(right):
        return trace.product(func(left, right))
    constant = right if tracked(left) else left
    if trace.maps.source(constant) is None and made_of(constant) is None:
        return func(left, right)
    if constant is left and left.dim() == 2 and right.dim() > 1:  # W X = (X^T W^T)^T
        return linear_map(trace, name, right.mT, left, None, out_first=True).mT
    if constant is left:
        raise trace.unruled(name, "with a batch of weights on its left")
    if right.dim() == 2:
        return linear_map(trace, name, left, right, None, out_first=False)
    return batched_map(trace, name, left, right)


@rule("baddbmm")
def baddbmm(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """beta B + alpha P Q, apart: a product or linear map, and a sum."""
    added, left, right = arguments(("input", "batch1", "batch2"), args, kwargs)
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    product = matmul(trace, "bmm", torch.bmm, (left, right), {})
    if alpha != 1:
        product = product * alpha
    if beta == 0:
        return product
    added = added if beta == 1 else multiply(trace, "mul", torch.mul, (added, beta), {})
    return affine(trace, "add", torch.add, (product, added), {})


def arguments(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments of an operation by name; None for those that were not given."""
    return [args[i] if i < len(args) else kwargs.get(key) for i, key in enumerate(names)]


def linear_map(
    trace: Trace, name: str, x: Tensor, weight: Tensor, bias: Tensor | None, *, out_first: bool
) -> Tensor:
    """Lemma 4.1: Lambda_P = 1/2 Lambda_C W^T, R(W) = 1/2 W (P^T Lambda_C), R(B) = B Lambda_C.

    x is (..., I), weight (O, I) if `out_first` else (I, O). A matrix that is no parameter of the model is a
    constant linear map: it takes no relevance, so nothing is halved.
    """
    maps, parameter = trace.maps, trace.maps.source(weight)
    if made_of(weight) is not None:
        return computed_map(trace, name, x, weight, bias, out_first)
    if parameter is not None and maps.place(weight) is not None and maps.place(weight.t()) is None:
        weight, out_first = weight.t(), not out_first  # the whole of a weight, transposed
    half = 1.0 if parameter is None else trace.path
    rows = samples_of_rows(trace, name, x, [weight, bias])
    ledger = trace.ledger

    def compute(x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        if out_first:
            return F.linear(x, weight, bias), (x,)
        return (torch.matmul(x, weight) if bias is None else torch.addmm(bias, x, weight)), (x,)

    def backward(lam: Tensor, x: Tensor) -> tuple[Tensor]:
        lam_R, matrix_OI = lam.reshape(-1, lam.shape[-1]).to(x.dtype), weight if out_first else weight.t()
        lam_x = torch.addmm(lam_R.new_empty(1), lam_R, matrix_OI, beta=0, alpha=half).view(x.shape)
        if maps.wants(parameter):
            back = (lam_x if half == 1 else lam_x / half) if maps.by_token else None
            maps.weight(weight, x, lam, out_first, ledger, rows, back)
        if bias is not None and maps.wants(maps.source(bias)):
            maps.bias(bias, lam, ledger, rows)
        if ledger is not None:
            through = relevance(x, lam_x) / half * maps.factor  # of sum (P W) * Lambda the weight's part
            _book_linear(trace, ledger, weight, bias, through, 0.0 if bias is None else relevance(bias, lam))
        return (lam_x,)

    return Ruled.apply(compute, backward, x)


def made_of(weight: Tensor) -> str | None:
    """The operation that computed a tensor from weights that are to be attributed, if one did."""
    return getattr(weight, MADE_OF, None)


MADE_OF, SHADOW = "_holdfast_made_of", "_holdfast_shadow"


def computed_map(
    trace: Trace, name: str, x: Tensor, weight: Tensor, bias: Tensor | None, out_first: bool
) -> Tensor:
    """A linear map with a weight that is computed of attributed ones (an expert with LoRA's factors in it).

    Each of those gets its part by autograd, from the weight's map: R(A) = A * (d weight / d A)^T map.
    """
    shadow, maps, ledger = getattr(weight, SHADOW, None), trace.maps, trace.ledger
    used = [(p, leaf) for p, leaf in trace.stand_ins.values()]
    if shadow is None or (bias is not None and maps.wants(maps.source(bias))):
        raise trace.unruled(name, f"with a weight that '{made_of(weight)}' makes of the model's weights")
    rows = rows_of(x) if maps.samples > 1 and x.dim() == 2 else None
    if rows is None and not maps.holds_samples(x):
        raise trace.mixed(name, x.shape)
    ones = torch.autograd.grad(
        shadow, [leaf for _, leaf in used], torch.zeros_like(shadow), retain_graph=True, allow_unused=True
    )
    used = [pair for pair, grad in zip(used, ones, strict=True) if grad is not None]
    for parameter, _ in used:
        maps.expect(parameter)

    def compute(x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        return F.linear(x, weight if out_first else weight.t(), bias), (x,)

    def backward(lam: Tensor, x: Tensor) -> tuple[Tensor]:
        maps_S = maps.of_computed(x, lam, out_first, rows)
        parts = [
            torch.autograd.grad(shadow, [leaf for _, leaf in used], g, retain_graph=True) for g in maps_S
        ]
        for (parameter, _), grads in zip(used, zip(*parts, strict=True), strict=True):
            maps.take(parameter, torch.stack(grads))
        lam_x = lam.to(x.dtype) @ (weight if out_first else weight.t()) * trace.path
        if ledger is not None:
            of_bias = 0.0 if bias is None else relevance(bias.expand_as(lam), lam)
            ledger.take(relevance(x, lam_x) / trace.path * maps.factor, of_bias)
        return (lam_x,)

    return Ruled.apply(compute, backward, x)


def samples_of_rows(trace: Trace, name: str, x: Tensor, weights: Sequence[Tensor | None]) -> Tensor | None:
    """See that the weights' maps can be made; returns the samples of x's rows where they need telling."""
    maps = trace.maps
    wanted = [w for w in weights if w is not None and maps.wants(maps.source(w))]
    for weight in wanted:
        if not maps.placeable(weight):
            raise trace.unruled(
                name, "with a part of a weight whose elements it repeats, or with several in one"
            )
        maps.expect(maps.source(weight))
    rows = rows_of(x) if maps.samples > 1 and x.dim() == 2 else None
    if wanted and rows is None and not maps.holds_samples(x):
        raise trace.mixed(name, x.shape)
    return rows


def _book_linear(
    trace: Trace, ledger: Ledger, weight: Tensor, bias: Tensor | None, of_weight: float, of_bias: float
) -> None:
    """Book what a linear map's weight and bias take; `of_weight` has its factor in it."""
    maps = trace.maps
    parameter = maps.source(weight)
    ledger.take(0.0 if parameter is None else of_weight, of_bias)
    ledger.maps_expected += of_weight * maps.wants(parameter)
    ledger.maps_expected += of_bias * (bias is not None and maps.wants(maps.source(bias)))


def batched_map(trace: Trace, name: str, x_ENI: Tensor, weight_EIO: Tensor) -> Tensor:
    """A linear map for each expert, which is a part of one weight; rows of every expert are alike."""
    maps, ledger, parameter = trace.maps, trace.ledger, trace.maps.source(weight_EIO)
    made = made_of(weight_EIO)
    if made is not None or parameter is None or x_ENI.dim() != 3 or weight_EIO.dim() != 3:
        raise trace.unruled(
            name, f"with a weight that '{made}' makes, or a batch of weights of more dimensions"
        )
    half, wanted = trace.path, maps.wants(parameter)
    if wanted:
        for x_NI, weight_IO in zip(x_ENI, weight_EIO, strict=True):
            samples_of_rows(trace, name, x_NI, [weight_IO])

    def compute(x_ENI: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        return torch.bmm(x_ENI, weight_EIO), (x_ENI,)

    def backward(lam_ENO: Tensor, x_ENI: Tensor) -> tuple[Tensor]:
        back_ENI = torch.bmm(lam_ENO, weight_EIO.transpose(1, 2))
        if wanted:
            for x_NI, lam_NO, weight_IO, back_NI in zip(x_ENI, lam_ENO, weight_EIO, back_ENI, strict=True):
                maps.weight(weight_IO, x_NI, lam_NO, False, ledger, None, back_NI)
        lam_x = back_ENI * half
        if ledger is not None:
            of_weight = relevance(x_ENI, lam_x) / half * maps.factor
            _book_linear(trace, ledger, weight_EIO, None, of_weight, 0.0)
        return (lam_x,)

    return Ruled.apply(compute, backward, x_ENI)


@rule("conv1d")
def conv1d(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """A convolution over time is a linear map; the weight (O, I / groups, K) takes its part."""
    x, weight, bias, stride, padding, dilation, groups = arguments(
        ("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, kwargs
    )
    stride, dilation, groups = stride or 1, dilation or 1, groups or 1
    padding = 0 if padding is None else padding
    if tracked(weight) or isinstance(padding, str):
        raise trace.unruled(name, "with a weight that is an activation, or padding by name")
    maps, ledger, parameter = trace.maps, trace.ledger, trace.maps.source(weight)
    half = 1.0 if parameter is None else trace.path
    wanted = [w for w in (weight, bias) if w is not None and maps.wants(maps.source(w))]
    if wanted and (x.dim() != 3 or len(x) != maps.samples):
        raise trace.mixed(name, x.shape)
    for w in wanted:
        maps.expect(maps.source(w))
    how = (stride, padding, dilation)

    def compute(x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        return F.conv1d(x, weight, bias, *how, groups), (x,)

    def backward(lam_SOT: Tensor, x_SIT: Tensor) -> tuple[Tensor]:
        samples, channels = len(lam_SOT), weight.shape[0]
        if maps.wants(parameter):
            # each sample is a group of its own, so its gradient is too
            flat = (samples * channels, *weight.shape[1:])
            one = x_SIT.reshape(1, -1, x_SIT.shape[-1])
            lam = lam_SOT.reshape(1, -1, lam_SOT.shape[-1])
            grad = conv1d_weight(one, flat, lam, *how, samples * groups)
            maps.give(weight, grad.view(samples, *weight.shape) * maps.factor, ledger)
        if bias is not None and maps.wants(maps.source(bias)):
            maps.give(bias, lam_SOT.sum(-1), ledger)
        shape = x_SIT.shape
        lam_x = conv1d_input(shape, weight, lam_SOT, *how, groups) * half
        if ledger is not None:
            of_bias = 0.0 if bias is None else relevance(bias[:, None].expand_as(lam_SOT), lam_SOT)
            of_weight = relevance(x_SIT, lam_x) / half * maps.factor
            _book_linear(trace, ledger, weight, bias, of_weight, of_bias)
        return (lam_x,)

    return Ruled.apply(compute, backward, x)


# ---- activations, Proposition 4.2 --------------------------------------------------------------------------


@rule("silu")
def silu(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """silu(x) / x is the sigmoid, at x = 0 too."""
    return Ruled.apply(lambda x: (F.silu(x), (torch.sigmoid(x),)), lambda lam, ratio: (lam * ratio,), args[0])


@rule("sqrt")
def sqrt(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """sqrt(x) / x is 1 / sqrt(x). At x = 0, where the slope is infinite, there is nothing to pass."""

    def compute(x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        y = torch.sqrt(x)
        return y, (torch.where(x == 0, 0.0, 1 / y),)

    return Ruled.apply(compute, lambda lam, ratio: (lam * ratio,), args[0])


@rule("gelu", "relu", "tanh", "leaky_relu", "elu", "selu", "celu", "hardswish", "mish", "softsign")
@rule("hardtanh", "relu6", "erf", "clamp", "clip", "tanhshrink", "softshrink", "hardshrink", "clamp_min")
@rule("sigmoid", "softplus", "exp", "expm1", "log1p", "log_sigmoid", "hardsigmoid", "sin", "cos", "abs")
def activation(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """R(U) = R(S) less f(0)'s part: Lambda_U = Lambda_S (f(x) - f(0)) / x, and f'(0) at x = 0."""
    x, rest = args[0], args[1:]
    if any(map(tracked, rest)):
        raise trace.unruled(name, "with an activation as its limit")
    if any(t.numel() > 1 for t in tensors_in(*rest, *kwargs.values())):
        raise trace.unruled(name, "with a limit for each element")
    kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
    return identity(trace, name, lambda u: func(u, *rest, **kwargs), x)


def identity(
    trace: Trace, name: str, function: Callable[[Tensor], Tensor], x: Tensor, y: Tensor | None = None
) -> Tensor:
    """The identity rule for any element-wise function; y is its value if known.

    Its value at zero (a half for a sigmoid gate) depends on nothing: it absorbs its part, like a bias.
    """
    with torch.enable_grad():
        zero = torch.zeros(1, dtype=x.dtype, device=x.device, requires_grad=True)
        at_zero = function(zero)
        (slope,) = torch.autograd.grad(at_zero.sum(), zero)
    constant = at_zero.item()
    if not math.isfinite(constant):
        raise trace.unruled(name, f"as it is {constant:.3g} at zero, so relevance has no share there")
    # below it the difference to the value at zero is rounding
    near = 0.0 if constant == 0 else math.sqrt(torch.finfo(x.dtype).eps)
    ledger = trace.ledger

    def compute(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        value = function(x) if y is None else y
        change = value if constant == 0 else value - constant
        ratio = (change / x).masked_fill_(x.abs() <= near, slope.item())
        if ledger is None or constant == 0:
            return value, (ratio,)
        # an infinite x (a mask) takes nothing, so its value is a constant as well
        return value, (ratio, torch.where(x.isinf(), value, constant))

    def backward(lam: Tensor, ratio: Tensor, *absorbed: Tensor) -> tuple[Tensor]:
        for value in absorbed:
            ledger.absorb(name, relevance(value, lam))  # type: ignore[union-attr]
        return (lam * ratio,)

    return Ruled.apply(compute, backward, x)


def whole_module(trace: Trace, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """An activation module of transformers, composed of elementary operations, as one function of x."""
    name = type(module).__name__
    return identity(trace, name, lambda u: type(module).forward(module, u), x, y)


# ---- normalisation: the normaliser is a constant -----------------------------------------------------------


@rule("layer_norm")
def layer_norm(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """1 / sigma is a constant, subtracting the mean is linear, and the bias absorbs its part."""
    x, shape, weight, bias = arguments(("input", "normalized_shape", "weight", "bias"), args, kwargs)
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
    x, shape, weight, eps = arguments(("input", "normalized_shape", "weight", "eps"), args, kwargs)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    dims = tuple(range(-len(shape), 0))

    def compute(x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        wide = x if x.dtype == torch.float64 else x.float()
        inverse = torch.rsqrt(wide.square().mean(dims, keepdim=True) + eps)
        return func(x, shape, weight, eps), (inverse,)

    def backward(lam: Tensor, inverse: Tensor) -> tuple[Tensor]:
        return (((lam if weight is None else lam * weight) * inverse).to(x.dtype),)

    return Ruled.apply(compute, backward, x)
