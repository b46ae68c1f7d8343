"""Intercepts the torch operations of one forward pass and applies their rules; no model is patched."""

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
from holdfast.attribution.kernels import by_operations
from holdfast.attribution.rules import (
    MADE_OF,
    RULES,
    SHADOW,
    affine,
    cast,
    choice,
    in_place,
    linear_unchanged,
    made_of,
    whole_module,
)
from holdfast.attribution.samples import follow
from holdfast.attribution.trace import Trace, tensors_in, tracked
from holdfast.models import own_forward

# Needed for relevance and for plain per-sample gradients alike.
LINEAR_MAPS = frozenset({"linear", "addmm", "matmul", "mm", "bmm", "baddbmm", "conv1d"})
_WITH_WEIGHTS = LINEAR_MAPS | {"add", "add_"}  # an expert's bias is added by an operation of its own
# Their rule is autograd's derivative.
LINEAR_RULES = frozenset({linear_unchanged, cast, affine, choice})
CASTS = frozenset(name for name, rule in RULES.items() if rule is cast)
# New tensors that take only shape and type from an activation.
_FRESH = frozenset(f"{kind}_like" for kind in ("zeros", "ones", "empty", "full", "rand", "randn")) | {
    f"new_{kind}" for kind in ("zeros", "ones", "empty", "full", "tensor")
}


@lru_cache(maxsize=4096)
def operation_name(func: Any) -> str:
    """The plain name of an operation: ``mul`` for ``torch.mul`` and the methods ``mul`` and ``__mul__``."""
    name = getattr(func, "__name__", str(func))
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name


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
        name = operation_name(func)
        tensors = list(tensors_in(*args, *kwargs.values()))
        if not any(map(tracked, tensors)):
            roles = self.trace.rules != "gradient" and any(normaliser.role_of(t) for t in tensors)
            if roles:
                return normaliser.apply(self.trace, name, func, args, kwargs)
            if name not in LINEAR_MAPS or not any(map(self._wanted, tensors)):
                return self._constant(name, func, args, kwargs, tensors)
            with_leaves = self._leaves(args), self._leaves(kwargs)
            if not any(map(tracked, tensors_in(*with_leaves))):  # weights alone: LoRA's factors, merged
                return self._constant(name, func, args, kwargs, tensors)
            args, kwargs = with_leaves
        output = self._tracked(name, func, args, kwargs, tensors)
        follow(self.trace.maps, name, func, args, kwargs, output)
        return output

    def _tracked(self, name: str, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        made = next((made_of(t) for t in tensors if made_of(t) is not None), None)
        if made is not None and name not in LINEAR_MAPS:
            raise self.trace.unruled(name, f"with what '{made}' makes of weights that are to be attributed")
        if name in _FRESH:
            return self._fresh(func, args, kwargs, tensors)
        if self.trace.rules == "gradient":
            return self._gradient(name, func, args, kwargs, tensors)
        if any(normaliser.role_of(t) for t in tensors):
            return normaliser.apply(self.trace, name, func, args, kwargs)
        rule = RULES.get(name)
        if rule is not None:
            behind = None if rule in LINEAR_RULES else self.trace.behind()
            if behind is not None:
                raise self.trace.unruled(name, f"inside '{behind}', whose way back is the model's own")
            return rule(self.trace, name, func, args, kwargs)
        role = normaliser.starts(name, args, kwargs)
        if role is not None:
            with torch.no_grad():
                return normaliser.given(func(*args, **kwargs), role)
        return self._without_relevance(name, func, args, kwargs)

    def _wanted(self, tensor: Tensor) -> bool:
        return self.trace.maps.wants(self.trace.maps.source(tensor))

    def _gradient(self, name: str, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        weights = any(self._wanted(t) or made_of(t) is not None for t in tensors)
        if name in CASTS or (name in _WITH_WEIGHTS and weights):
            return RULES[name](self.trace, name, func, args, kwargs)
        if name == "softmax" and args[0].dtype == torch.float64:  # float64 stays float64, as under the rules
            kwargs = {key: value for key, value in kwargs.items() if key != "dtype"}
        return func(*args, **kwargs)

    def _constant(self, name: str, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """An operation without an activation; what it makes of attributed weights is remembered as such."""
        maps = self.trace.maps
        output = func(*args, **kwargs)
        results = list(tensors_in(output))
        if not any(t.is_floating_point() for t in results) or name in _FRESH | {"detach"} or in_place(name):
            return output  # what a model detaches is meant to be a constant
        if name in CASTS and maps.source(args[0]) is not None:
            weight = args[0]
            if weight.dtype == torch.float64 and output.dtype != torch.float64:
                return weight  # float64 stays float64
            if maps.source(output) is not None or maps.cast(weight, output):
                return output
        made = next((made_of(t) for t in tensors if made_of(t) is not None), None)
        if made is None and not any(map(self._wanted, tensors)):
            return output
        shadows: Any = self._shadows(func, args, kwargs)
        for result, shadow in zip(results, shadows or [None] * len(results), strict=True):
            if made is not None or maps.source(result) is None:
                setattr(result, MADE_OF, made or name)
            setattr(result, SHADOW, shadow)
        return output

    def _shadows(self, func: Any, args: Any, kwargs: Any) -> list[Tensor] | None:
        """The same for autograd, from leaves that stand for the weights; None if that is unknown."""
        trace = self.trace

        def shadow(value: Any) -> Any:
            if isinstance(value, nn.Parameter) and trace.maps.wants(value):
                return trace.stand_in(value)
            if isinstance(value, Tensor) and (made_of(value) is not None or self._wanted(value)):
                found = getattr(value, SHADOW, None)
                if found is None:
                    raise LookupError
                return found
            if isinstance(value, dict):
                return {key: shadow(item) for key, item in value.items()}
            return type(value)(map(shadow, value)) if type(value) in (list, tuple) else value

        try:
            with torch.enable_grad():
                found = list(tensors_in(func(*shadow(args), **shadow(kwargs))))
        except LookupError:
            return None
        return found if all(t.requires_grad for t in found) else None  # a weight read by its data has no leaf

    def _leaves(self, value: Any) -> Any:
        """Constants that go into attributed weights (tokens that every text gets) are inputs."""
        if isinstance(value, Tensor):
            weight = self.trace.maps.source(value) is not None or made_of(value) is not None
            maps = self.trace.maps  # tokens; not an identity that shows what a weight is
            tokens = maps.samples in (1, *value.shape[:2]) if value.dim() > 2 else len(value) in maps.rows
            if weight or not value.is_floating_point() or not tokens:
                return value
            leaf = value.detach().requires_grad_()
            self.trace.constants.append(leaf)
            return leaf
        if isinstance(value, dict):
            return {key: self._leaves(item) for key, item in value.items()}
        return type(value)(map(self._leaves, value)) if isinstance(value, list | tuple) else value

    def _fresh(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Tensor:
        """A constant with the shape of an activation; as activations do, it stays in float64."""
        with torch.no_grad():
            made: Tensor = func(*args, **kwargs)
        wide = made.is_floating_point() and any(t.dtype == torch.float64 for t in tensors)
        return made.double() if wide else made

    def _without_relevance(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Shapes, comparisons, indices: what has no real-valued result carries no relevance."""
        if in_place(name):
            raise self.trace.unruled(name, "(it works in place)")
        with torch.no_grad():
            result = func(*args, **kwargs)
        if any(t.is_floating_point() or t.is_complex() for t in tensors_in(result)):
            raise self.trace.unruled(name)
        return result


@contextmanager
def attributable(model: nn.Module, leaves: list[Tensor]) -> Iterator[None]:
    """Make only activations require grad, from the embeddings on; undone on exit.

    Parameters
    ----------
    model : nn.Module
        Put into evaluation mode, with all parameters frozen. It computes by operations that torch shows
        (`holdfast.attribution.kernels`).
    leaves : list of Tensor
        Each forward pass appends the embeddings' outputs, where relevance ends.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]

    def cut(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        # PEFT and TRL may have a hook there that makes the output such a leaf already
        leaf = output if output.requires_grad else output.detach().requires_grad_()
        leaves.append(leaf)
        return leaf.clone()  # a model may scale it in place

    with ExitStack() as stack:
        stack.enter_context(by_operations(model))
        stack.enter_context(own_forward(model))
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
        own = getattr(part, "embed_tokens", None)  # of FSMT's decoder, which is no model of transformers'
        embedding = part.get_input_embeddings() if hasattr(part, "get_input_embeddings") else own
        if embedding is not None:
            found[id(embedding)] = embedding
    return list(found.values())


@contextmanager
def whole_activations(model: nn.Module, trace: Trace) -> Iterator[None]:
    """Treat the activation modules of transformers, composed of elementary operations, as one function."""
    inputs: list[Tensor] = []

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
            if _composed(module) or _hidden(module):
                stack.callback(module.register_forward_pre_hook(before).remove)
                stack.callback(module.register_forward_hook(after).remove)
        yield


def _composed(module: nn.Module) -> bool:
    # silu is one operation, with a rule of its own
    return type(module).__module__ == "transformers.activations" and type(module).__name__ != "SiLUActivation"


def _hidden(module: nn.Module) -> bool:
    """Whether a module is an element-wise function behind an autograd.Function, which shows no operation."""
    code = getattr(type(module).forward, "__code__", None)
    holds = next(module.parameters(), None) is not None or next(module.children(), None) is not None
    if holds or "apply" not in getattr(code, "co_names", ()):
        return False
    probe = torch.tensor([[[-1.5, -0.2, 0.7, 2.0]]])
    try:
        with torch.no_grad():
            whole = type(module).forward(module, probe)
            apart = torch.cat([type(module).forward(module, part) for part in probe.split(1, dim=-1)], dim=-1)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    return isinstance(whole, Tensor) and whole.shape == probe.shape and torch.allclose(whole, apart)
