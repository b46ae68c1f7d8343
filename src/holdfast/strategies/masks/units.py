"""Output units of linear maps: which of them a mask holds, and masks by the size of their outputs (MIGU)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast import world
from holdfast.errors import ConfigError
from holdfast.hold.attach import Handle, hook, unwrap
from holdfast.hold.mask import Mask
from holdfast.models import linear_modules
from holdfast.names import canonical_name, layer_of


@dataclass(frozen=True)
class LinearMap:
    """A linear map that is trained, as the rows of its output.

    Attributes
    ----------
    source : nn.Module
        The module whose output rates the units: the map itself; of LoRA's B the whole adapted layer, whose
        output units B's are, because B's own output is zero until it has been trained.
    parameters : dict of str to Parameter
        Canonical name to its trained weight and bias.
    out_dim : int
        The weight's output dimension: 0, in transformers' Conv1D 1.
    """

    source: nn.Module
    parameters: dict[str, nn.Parameter]
    out_dim: int

    def spread(self, unit_O: Tensor, parameter: Tensor) -> Tensor:
        """One value a unit, shaped so that it broadcasts over the weight or the bias."""
        return unit_O if parameter.dim() == 1 or self.out_dim == 1 else unit_O[:, None]


def linear_maps(model: nn.Module) -> list[LinearMap]:
    """All linear maps in the transformer blocks with a trained weight or bias; LoRA's factors are such.

    The output head is left out: its units are tokens, and its weight is often the embedding's.

    Raises
    ------
    ConfigError
        There are none.
    """
    modules = dict(model.named_modules())
    found = []
    for name, module in linear_modules(model):
        if layer_of(f"{name}.") is None:
            continue
        own = {canonical_name(f"{name}.{n}"): p for n, p in module.named_parameters(recurse=False)}
        own = {n: p for n, p in own.items() if p.requires_grad}
        if own:
            layer, factor, _ = name.rpartition(".lora_B.")
            found.append(
                LinearMap(modules[layer] if factor else module, own, int(not isinstance(module, nn.Linear)))
            )
    if not found:
        raise ConfigError("strategy: masks are made for linear maps in blocks, and this model trains none.")
    return found


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(world.local(parameter.grad).any())


def lowest(score: Tensor, share: float) -> Tensor:
    """True for the `share` of all values that are lowest, and for what ties with the highest of these."""
    count = round(share * score.numel())
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    exact = score.flatten().to(torch.promote_types(score.dtype, torch.float32))  # 16 bits can't be sorted
    return score <= exact.kthvalue(count).values.to(score)


class OutputMask:
    """Lets each optimizer step change the output units with the largest outputs only (MIGU).

    A unit's size is |h_i| / Σ_j |h_j|, averaged over all tokens of the step's micro-batches. Before the step
    the gradients of the `masked` share of each linear map's units, those of the smallest size, are set to
    zero: rows of the weight, and the bias.

    Parameters
    ----------
    masked : float
        Share of units that take no gradient, in [0, 1).

    Notes
    -----
    Padding doesn't count, where an output is as long as the input or the answer. Nothing is carried from a
    step to the next. Memory: one float32 value an output unit.
    """

    def __init__(self, masked: float) -> None:
        self.masked = masked
        self._counted: list[Tensor] = []  # True at real tokens: of the input, of the answer
        self._sizes: dict[int, Tensor] = {}  # by module: sum of its units' sizes
        self._trained: list[nn.Parameter] = []

    def watch(self, batch: Mapping[str, Any]) -> None:
        """Before each micro-batch: which positions hold tokens."""
        if torch.is_grad_enabled() and not any(map(_has_gradient, self._trained)):
            self._sizes.clear()  # the first of a step; the one before may have been passed over (GradScaler)
        self._counted = [
            batch[key] != off for key, off in (("attention_mask", 0), ("labels", -100)) if key in batch
        ]

    def _take(self, source: nn.Module, _: Any, output: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        size = output.detach().float().abs()
        size = size / size.sum(-1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)
        real = [mask for mask in self._counted if mask.shape == size.shape[:-1]]
        if real:
            size = size[torch.stack(real).any(0)]
        total = size.reshape(-1, size.shape[-1]).sum(0)
        self._sizes[id(source)] = self._sizes.get(id(source), 0) + total

    def held(self, linear: LinearMap) -> Tensor | None:
        """Which of a map's units (O,) take no gradient in this step; None if it took no part."""
        size = self._sizes.get(id(linear.source))
        return None if size is None else lowest(size, self.masked)

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Handle:
        """Watch the model's outputs and mask every step, until the handle is removed."""
        maps = linear_maps(model)
        sources = {id(m.source): m.source for m in maps}
        self._trained = [p for linear in maps for p in linear.parameters.values()]
        watches = [source.register_forward_hook(self._take).remove for source in sources.values()]

        def mask() -> None:
            self._unite(list(sources))
            for linear, parameter, held in self._gradients(maps):
                Mask([linear.spread(held, parameter)]).reduce_([parameter.grad])
            self._sizes.clear()

        handle = hook(unwrap(optimizer), mask, needs_gradients="migu")
        handle.removers += watches
        return handle

    def _unite(self, sources: list[int]) -> None:
        """Add up what all processes have seen; `sources` are the modules, in the model's order."""
        if world.size() == 1:
            return
        sizes = world.union(
            {str(n): len(self._sizes[key]) for n, key in enumerate(sources) if key in self._sizes}
        )
        for number, size in sizes.items():
            self._sizes.setdefault(sources[int(number)], torch.zeros(size))
        world.add_up(self._sizes[sources[int(number)]] for number in sizes)

    def _gradients(self, maps: list[LinearMap]) -> Iterator[tuple[LinearMap, nn.Parameter, Tensor]]:
        for linear in maps:
            held = self.held(linear)
            for parameter in linear.parameters.values():
                if held is not None and parameter.grad is not None:
                    yield linear, parameter, held
