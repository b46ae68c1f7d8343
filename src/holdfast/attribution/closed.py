"""Modules that are one linear map as a whole: a quantised layer, and a layer with the LoRA on it.

What they compute inside is no operation of torch on a weight (a kernel unpacks 4 bits), or more than one
(W x + alpha/r B A x). Their own backward gives Wᵀ Lambda; this is all that a linear map's rule needs, so
nothing is unpacked or merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from holdfast.attribution.ledger import relevance
from holdfast.attribution.maps import WeightMaps
from holdfast.attribution.rules import samples_of_rows
from holdfast.attribution.samples import follow
from holdfast.attribution.trace import Ruled, Trace, tracked
from holdfast.errors import ModelError
from holdfast.models.adapters import is_quantised, under_lora

# Of the relevance of a quantised layer's inputs, in magnitude: 8 bits round them by 1 in 254 of the largest.
ROUNDED = 0.1


class Closed(NamedTuple):
    """A module that is followed as one linear map.

    Attributes
    ----------
    weight : Tensor or None
        What the map is known by; with an adapter the weight under it.
    bias : Tensor or None
    exact : bool
        Whether its output is W x + b up to rounding. Quantised layers may round x too.
    name : str
    """

    weight: Tensor | None
    bias: Tensor | None
    exact: bool
    name: str


def closed_modules(model: nn.Module, maps: WeightMaps) -> dict[nn.Module, Closed]:
    """The outermost modules that are one map: quantised layers, and layers whose map with LoRA is wanted.

    With LoRA a map is wanted as a whole where the weight under it is, and none of the factors: what goes into
    it and what comes out is then the merged map's. For the maps of single weights (no `TokenFold`) that is no
    different, and the layer is followed operation by operation.
    """
    found: dict[nn.Module, Closed] = {}
    inside: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in inside:
            continue
        layer = under_lora(module)
        quantised = is_quantised(layer)
        weight = getattr(layer, "weight", None)
        if layer is not module:
            wanted = maps.by_token and maps.wants(weight)
            if not wanted or any(maps.wants(p) for p in module.parameters() if p is not weight):
                continue
        elif not quantised:
            continue
        found[module] = Closed(weight, getattr(layer, "bias", None), not quantised, path)
        inside |= {id(part) for part in module.modules()}
    return found


@contextmanager
def closed_maps(model: nn.Module, trace: Trace) -> Iterator[None]:
    """Follow `closed_modules` as linear maps while open."""
    leaving: list[Callable[[Tensor], Tensor] | None] = []

    def before(closed: Closed) -> Any:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            trace.suspended = True
            if not tracked(x) and trace.maps.wants(closed.weight):  # tokens that every text gets
                x = x.detach().requires_grad_()
                trace.constants.append(x)
            if not tracked(x):
                leaving.append(None)
            else:
                x, leave = closed_map(trace, x, closed)
                leaving.append(leave)
            return (x, *args[1:])

        return enter

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leave = leaving.pop()
        output = output if leave is None else leave(output)
        trace.suspended = False
        return output

    with ExitStack() as stack:
        for module, closed in closed_modules(model, trace.maps).items():
            stack.callback(module.register_forward_pre_hook(before(closed)).remove)
            stack.callback(module.register_forward_hook(after).remove)
        yield


def closed_map(trace: Trace, x: Tensor, closed: Closed) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Lemma 4.1 for a map that is known by what it does, see `holdfast.attribution.rules.linear_map`.

    Returns
    -------
    Tensor
        What the module is to be given for x.
    callable
        Makes of its output what the model is to be given.
    """
    maps, ledger, wanted = trace.maps, trace.ledger, trace.maps.wants(closed.weight)
    rows = samples_of_rows(trace, "linear", x, [closed.weight])
    given: list[tuple[Tensor, float]] = []  # of the output, on the way back: Lambda, and W x * Lambda

    def of_input(lam_x: Tensor, x: Tensor) -> tuple[Tensor]:
        lam, passed = given.pop()
        if wanted:
            assert closed.weight is not None
            maps.weight(closed.weight, x, lam, True, None, rows, lam_x)
        if ledger is not None:
            through = relevance(x, lam_x)
            if not closed.exact:
                _check_way_back(closed, passed - through, float((x * lam_x).abs().sum()))
                ledger.absorb("rounding of quantised inputs", passed - through)
                passed = through
            ledger.take(through * maps.factor, 0.0)
            ledger.maps += passed * maps.factor * wanted
            ledger.maps_expected += through * maps.factor * wanted
        return (lam_x * trace.path,)

    def leave(y: Tensor) -> Tensor:
        value = y.detach().clone() if ledger is not None else None

        def of_output(lam: Tensor) -> tuple[Tensor]:
            passed = 0.0
            if ledger is not None and value is not None:
                of_bias = 0.0 if closed.bias is None else relevance(closed.bias, lam)
                ledger.take(0.0, of_bias)
                passed = relevance(value, lam) - of_bias
            given.append((lam, passed))
            return (lam,)

        output = Ruled.apply(lambda y: (y, ()), of_output, y)
        follow(maps, "linear", torch.nn.functional.linear, (x,), {}, output)
        return output

    # of a copy: bitsandbytes' 8 bits take the largest inputs out of it in place, and put them back
    return Ruled.apply(lambda x: (x if closed.exact else x.clone(), (x,)), of_input, x), leave


def _check_way_back(closed: Closed, lost: float, gross: float) -> None:
    """See that the gradient of a quantised layer is that of what it computes, but for rounding."""
    if not abs(lost) <= ROUNDED * gross:
        raise ModelError(
            f"{closed.name}: what this quantised layer sends back is not the gradient of what it computes: "
            f"{lost:.3g} of the relevance is lost in it, of {gross:.3g}. Nothing that is trained or rated "
            "through it can be right; use another quantisation, or other versions of what makes it."
        )
