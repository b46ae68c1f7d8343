"""When relevance is not conserved: which operation loses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from holdfast.attribution.ledger import Ledger, relevance
from holdfast.attribution.mode import RuleMode, operation_name
from holdfast.attribution.rules import in_place
from holdfast.attribution.trace import Scale, Trace, tensors_in, tracked

SHOWN = 3


class LocalMode(RuleMode):
    """Applies the rules like `RuleMode`, with a ledger of its own for every operation.

    Attributes
    ----------
    entries : list of (operation, module, Ledger)
        `target` of each ledger is the relevance of the operation's outputs, `inputs` that of its inputs.
    """

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self.entries: list[tuple[str, str, Ledger]] = []

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Apply the rule of one operation between probes."""
        kwargs = kwargs or {}
        unprobed = self.trace.suspended or in_place(operation_name(func))
        if unprobed or not any(map(tracked, tensors_in(*args, *kwargs.values()))):
            return super().__torch_function__(func, types, args, kwargs)
        ledger = Ledger()
        self.trace.ledger = ledger
        try:
            probed, probed_kwargs = _probed(list(args), ledger), _probed(kwargs, ledger)
            output = super().__torch_function__(func, types, probed, probed_kwargs)
        finally:
            self.trace.ledger = None
        outputs = [t for t in tensors_in(output) if tracked(t)]
        for tensor in outputs:
            tensor.register_hook(_adder(ledger, "target", tensor.detach()))
        if outputs:
            self.entries.append((operation_name(func), self.trace.where(), ledger))
        return output

    def verdict(self, *, weights_share: bool) -> str:
        """The operations that lose most, in words; call after the backward pass."""
        leaks = [(e.leak(weights_share=weights_share), name, where) for name, where, e in self.entries]
        whole = max((abs(e.target) for _, _, e in self.entries), default=0.0)
        worst = [leak for leak in sorted(leaks, reverse=True)[:SHOWN] if leak[0] > 1e-6 * whole]
        if not worst:
            return (
                "No operation that torch shows loses any: look for compiled code or an autograd.Function "
                "of its own in the model, or for rounding (try float32)."
            )
        named = ", ".join(f"'{name}' in {where} ({leak:.3g})" for leak, name, where in worst)
        return f"Most is lost in {named}. If that is rounding, use float32; if not, these need a rule."


def _adder(ledger: Ledger, entry: str, value: Tensor) -> Any:
    def add(lam: Tensor) -> None:
        setattr(ledger, entry, getattr(ledger, entry) + relevance(value, lam))

    return add


def _probed(value: Any, ledger: Ledger) -> Any:
    if isinstance(value, Tensor):
        if not tracked(value):
            return value
        probe = Scale.apply(value, 1.0)
        if not probe.requires_grad:  # the model computes this without gradients
            return value
        probe.register_hook(_adder(ledger, "inputs", value.detach()))
        return probe
    if isinstance(value, dict):
        return {key: _probed(item, ledger) for key, item in value.items()}
    return type(value)(_probed(item, ledger) for item in value) if isinstance(value, list | tuple) else value
