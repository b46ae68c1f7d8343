"""What the rules share: the state of one traced forward pass, and the one function that bends a gradient."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from holdfast.attribution.ledger import Ledger, relevance
from holdfast.attribution.maps import WeightMaps
from holdfast.errors import UnruledOperationError


class SamplesMixedError(Exception):
    """A weight met rows of several samples in an unknown order; one sample at a time it would not."""


RuleSet = Literal["paper", "attnlrp", "gradient"]
Backward = Callable[..., tuple[Tensor | None, ...]]


class Ruled(torch.autograd.Function):
    """Computes an operation as it is, and sends Lambda back by a rule instead of the derivative."""

    @staticmethod
    def forward(
        ctx: Any, compute: Callable[..., tuple[Tensor, Sequence[Tensor]]], rule: Backward, *inputs: Any
    ) -> Tensor:
        """compute(*inputs) -> (output, what the rule needs); rule(Lambda, *saved) -> Lambda of each input."""
        output, saved = compute(*inputs)
        ctx.save_for_backward(*saved)
        ctx.rule = rule
        return output.detach()  # no view, see `Scale`

    @staticmethod
    def backward(ctx: Any, *lams: Tensor) -> tuple[Any, ...]:
        """Apply the rule."""
        return (None, None, *ctx.rule(lams[0], *ctx.saved_tensors))


class Scale(torch.autograd.Function):
    """The identity, whose gradient is scaled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        """Return x."""
        ctx.factor = factor
        return x.detach()  # no view of x: a model may go on to change it in place

    @staticmethod
    def backward(ctx: Any, *lams: Tensor) -> tuple[Any, ...]:
        """Scale Lambda."""
        return lams[0] * ctx.factor, None


def scaled(x: Tensor, factor: float) -> Tensor:
    """x, with the relevance that flows back through it multiplied by `factor`."""
    return x if factor == 1.0 or not tracked(x) else Scale.apply(x, factor)


def tracked(value: object) -> bool:
    """Whether relevance flows through a value: while a model is traced only activations require grad."""
    return isinstance(value, Tensor) and value.requires_grad


def tensors_in(*values: object) -> Iterator[Tensor]:
    """All tensors among the arguments of an operation, in lists and tuples too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(*value)
        elif isinstance(value, dict):
            yield from tensors_in(*value.values())


@dataclass
class Trace:
    """State of one traced forward pass.

    Attributes
    ----------
    rules : {"paper", "attnlrp", "gradient"}
        How softmax is treated; with `gradient` only linear maps are intercepted, for per-sample gradients.
    path : float
        Factor on Lambda wherever two things that both get relevance are multiplied: 1/2 (A) or 1.
    maps : WeightMaps
    ledger : Ledger or None
        Where relevance is booked; None where nothing is checked.
    modules : dict
        id of a module to its name, for messages.
    constants : list of Tensor
        Where relevance ends beside the embeddings: constants that go into attributed weights.
    stand_ins : dict
        id of an attributed weight to it and to the leaf that stands for it where weights are computed of it.
    suspended : bool
        Let all operations pass (inside an activation module, which has one rule as a whole).
    """

    rules: RuleSet
    path: float
    maps: WeightMaps
    ledger: Ledger | None
    modules: dict[int, str]
    constants: list[Tensor] = field(default_factory=list)
    stand_ins: dict[int, tuple[nn.Parameter, Tensor]] = field(default_factory=dict)
    suspended: bool = False

    def book(self, output: Tensor, entry: Callable[[Ledger, Tensor], None]) -> None:
        """Call entry(ledger, Lambda of output) in the backward pass, where the check is on."""
        ledger = self.ledger
        if ledger is not None and output.requires_grad:
            output.register_hook(lambda lam: entry(ledger, lam))

    def product(self, output: Tensor) -> Tensor:
        """Lemma 4.1 for a product of two activations: each side gets `path` of the relevance."""
        if self.path == 1.0:
            if self.ledger is None:
                return output
            # what follows may change it in place, which would take the hook off a view
            value, output = output.detach().clone(), output.clone()
            self.book(output, lambda ledger, lam: ledger.create(relevance(value, lam)))
            return output
        return scaled(output, self.path)

    def stand_in(self, parameter: nn.Parameter) -> Tensor:
        """A leaf with the values of an attributed weight."""
        if id(parameter) not in self.stand_ins:
            self.stand_ins[id(parameter)] = parameter, parameter.detach().requires_grad_()
        return self.stand_ins[id(parameter)][1]

    def where(self) -> str:
        """Name of the innermost module of the model that is running."""
        frame: Any = sys._getframe(1)
        while frame is not None:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and id(module) in self.modules:
                return f"{self.modules[id(module)] or 'the model'} ({type(module).__name__})"
            frame = frame.f_back
        return "the model"

    def behind(self) -> str | None:
        """The model's own autograd.Function whose forward is running: it takes no rule on the way back."""
        frame: Any = None if torch.is_grad_enabled() else sys._getframe(1)
        while frame is not None:
            first = next(iter(frame.f_locals.values()), None) if frame.f_code.co_name == "forward" else None
            if isinstance(first, torch.autograd.function.BackwardCFunction):
                return type(first).__name__.removesuffix("Backward")
            frame = frame.f_back
        return None

    def unruled(self, operation: str, reason: str = "") -> UnruledOperationError:
        """The error for an operation that can't be attributed."""
        return UnruledOperationError(
            f"{self.where()}: the operation '{operation}' has no attribution rule"
            f"{' ' + reason if reason else ''}. Relevance can't be followed through it. Add a rule in "
            "holdfast/attribution/rules.py, or use an importance that needs none, such as 'fisher'."
        )

    def mixed(self, operation: str, shape: Sequence[int]) -> SamplesMixedError:
        """The error for an operation in which the samples of a batch can't be told apart."""
        return SamplesMixedError(
            f"{self.where()}: in '{operation}' the samples of a batch can't be told apart (the input "
            f"has shape {tuple(shape)})"
        )
