"""Intercepts the torch operations of one forward pass and applies their rules; nothing is patched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import holdfast.attribution.attention  # noqa: F401  (registers its rules)
from holdfast.attribution import normaliser
from holdfast.attribution.rules import RULES, cast, whole_module
from holdfast.attribution.trace import Trace, tensors_in, tracked

# Needed for relevance and for plain per-sample gradients alike.
LINEAR_MAPS = frozenset({"linear", "addmm", "matmul", "mm"})
CASTS = frozenset(name for name, rule in RULES.items() if rule is cast)
# New tensors that take only shape and type from an activation.
_FRESH = frozenset(f"{kind}_like" for kind in ("zeros", "ones", "empty", "full")) | {
    f"new_{kind}" for kind in ("zeros", "ones", "empty", "full")
}


@lru_cache(maxsize=4096)
def operation_name(func: Any) -> str:
    """The plain name of an operation: ``mul`` for ``torch.mul`` and the methods ``mul`` and ``__mul__``."""
    name = getattr(func, "__name__", str(func))
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name


def in_place(name: str) -> bool:
    """Whether an operation changes its first argument."""
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"


class RuleMode(TorchFunctionMode):
    """While active, operations on tracked tensors follow the rules of `trace`."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Apply the rule of one operation."""
        kwargs = kwargs or {}
        if self.trace.suspended:
            return func(*args, **kwargs)
        tensors = list(tensors_in(*args, *kwargs.values()))
        is_tracked = any(map(tracked, tensors))
        if self.trace.rules == "gradient":
            return self._gradient(func, args, kwargs) if is_tracked else func(*args, **kwargs)
        name = operation_name(func)
        if any(normaliser.role_of(t) for t in tensors):
            return normaliser.apply(self.trace, name, func, args, kwargs)
        if not is_tracked:
            return func(*args, **kwargs)
        rule = RULES.get(name)
        if rule is not None:
            return rule(self.trace, name, func, args, kwargs)
        role = normaliser.starts(name, args, kwargs)
        if role is not None:
            with torch.no_grad():
                return normaliser.given(func(*args, **kwargs), role)
        return self._without_relevance(name, func, args, kwargs)

    def _gradient(self, func: Any, args: Any, kwargs: Any) -> Any:
        name, maps = operation_name(func), self.trace.maps
        weights = (maps.source(t) for t in tensors_in(*args, *kwargs.values())) if name in LINEAR_MAPS else ()
        if name in CASTS or any(map(maps.wants, weights)):
            return RULES[name](self.trace, name, func, args, kwargs)
        if name == "softmax" and args[0].dtype == torch.float64:  # float64 stays float64, as under the rules
            kwargs = {key: value for key, value in kwargs.items() if key != "dtype"}
        return func(*args, **kwargs)

    def _without_relevance(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Shapes, comparisons, indices: what has no real-valued result carries no relevance."""
        if in_place(name):
            raise self.trace.unruled(name, "(it works in place)")
        with torch.no_grad():
            result = func(*args, **kwargs)
        real = any(t.is_floating_point() or t.is_complex() for t in tensors_in(result))
        if real and name not in _FRESH:
            raise self.trace.unruled(name)
        return result


@contextmanager
def attributable(model: nn.Module, leaves: list[Tensor]) -> Iterator[None]:
    """Make only activations require grad, from the embeddings on; undone on exit.

    Parameters
    ----------
    model : nn.Module
        Put into evaluation mode, with all parameters frozen.
    leaves : list of Tensor
        Each forward pass appends the embeddings' outputs, where relevance ends.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]

    def cut(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        # PEFT and TRL may have a hook there that makes the output such a leaf already
        leaf = output if output.requires_grad else output.detach().requires_grad_()
        leaves.append(leaf)
        return leaf

    with ExitStack() as stack:
        for module in _embeddings(model):
            # first of all hooks: one of PEFT's and TRL's makes the output require a gradient
            stack.callback(module.register_forward_hook(cut, prepend=True).remove)
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for module, mode in modes:
                module.training = mode


def _embeddings(model: Any) -> list[nn.Module]:
    """The modules whose outputs are the model's inputs: one, or encoder's and decoder's."""
    found = {}
    parts = [model]
    for getter in ("get_encoder", "get_decoder"):
        if hasattr(model, getter):
            parts.append(getattr(model, getter)())
    for part in parts:
        embedding = part.get_input_embeddings() if hasattr(part, "get_input_embeddings") else None
        if embedding is not None:
            found[id(embedding)] = embedding
    return list(found.values())


@contextmanager
def whole_activations(model: nn.Module, trace: Trace) -> Iterator[None]:
    """Treat the activation modules of transformers, composed of elementary operations, as one function."""
    inputs: list[Tensor] = []

    def composed(module: nn.Module) -> bool:  # silu is one operation, with a rule of its own
        return (
            type(module).__module__ == "transformers.activations"
            and type(module).__name__ != "SiLUActivation"
        )

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs.append(args[0])
        trace.suspended = True
        return (args[0].detach(), *args[1:])

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        x = inputs.pop()
        result = whole_module(trace, module, x, output) if tracked(x) else output
        trace.suspended = False
        return result

    with ExitStack() as stack:
        for module in model.modules():
            if composed(module):
                stack.callback(module.register_forward_pre_hook(before).remove)
                stack.callback(module.register_forward_hook(after).remove)
        yield
