"""Growing LoRA by a block of ranks a task, with the earlier ranks exactly as they were."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.adapters import grow, lora_factors, rank_of
from holdfast.hold.attach import Handle, hook, unwrap
from holdfast.hold.cost import Cost, trained_bytes
from holdfast.hold.mask import Mask
from holdfast.records import AdapterRanks


class Grown:
    """The model's LoRA as frozen ranks, and new ones behind them.

    While attached, the new ranks are trained as a second LoRA beside a frozen first one would be: a gradient
    is set to zero in the frozen ranks before it is added to ``.grad``, so that clipping and whatever else
    looks at it meets the new ranks alone; and what an optimizer does to the frozen ones all the same (weight
    decay) is undone after each step, bit for bit. The new ranks' steps are those of a LoRA by itself for
    optimizers that treat each entry by itself (SGD, AdamW); Adafactor's clipping of its update averages over
    the frozen ranks too, so it clips less.

    Memory: a copy of the factors. The frozen ranks' gradients are computed, and the optimizer keeps
    states for them.

    Parameters
    ----------
    model : nn.Module
        With a LoRA adapter.
    frozen : int
        The number of ranks, from the first on, that stay as they are.
    """

    def __init__(self, model: nn.Module, frozen: int) -> None:
        self.factors, self.frozen = lora_factors(model), frozen
        self.rank = rank_of(model)

    @classmethod
    def for_task(cls, model: nn.Module, task: int, seed: int) -> Grown:
        """Append the ranks of the task of this number, from 0, as many as each before it has.

        The first task trains what is there.
        """
        if not task:
            return cls(model, 0)
        frozen = rank_of(model)
        grow(model, frozen // task, seed * 1000 + task)
        return cls(model, frozen)

    def old_a(self) -> list[Tensor]:
        """Each layer's frozen rows of A, (frozen, input)."""
        return [a.detach()[: self.frozen] for a, _ in self.factors]

    def old_b(self) -> list[Tensor]:
        """Each layer's frozen columns of B, (output, frozen)."""
        return [b.detach()[:, : self.frozen] for _, b in self.factors]

    def new_a(self) -> list[Tensor]:
        """Each layer's new rows of A, (new, input); differentiable."""
        return [a[self.frozen :] for a, _ in self.factors]

    def new_b(self) -> list[Tensor]:
        """Each layer's new columns of B, (output, new); differentiable."""
        return [b[:, self.frozen :] for _, b in self.factors]

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Handle:
        """Hold the frozen ranks until the handle is removed; with none it does nothing."""
        if not self.frozen:
            return Handle()
        factors = [factor for pair in self.factors for factor in pair]
        frozen = torch.arange(self.rank) < self.frozen
        held = [
            ranks.to(factor.device)
            for pair in self.factors
            for factor, ranks in zip(pair, (frozen[:, None], frozen[None, :]), strict=True)
        ]
        mask, kept = Mask(held), [factor.detach().clone() for factor in factors]

        def reduced(gradient: Tensor, held: Tensor) -> Tensor:
            gradient = gradient.clone()
            Mask([held]).reduce_([gradient])
            return gradient

        handle = hook(unwrap(optimizer), after=lambda: mask.blend_(factors, kept))
        for factor, ranks in zip(factors, held, strict=True):
            if factor.requires_grad:  # a strategy may freeze one of the two as a whole
                handle.removers.append(factor.register_hook(partial(reduced, held=ranks)).remove)
        return handle

    def summary(self, overlap: float | None = None) -> AdapterRanks:
        """The adapter's rank, how many of its ranks are frozen, and how far the others overlap with them."""
        return AdapterRanks(rank=self.rank, frozen=self.frozen, overlap=overlap)


def grown_cost(model: nn.Module, times: int) -> Cost:
    """Of growing by the model's rank so many times: weights, gradients, AdamW's states, and the copy."""
    return Cost("LoRA of later tasks (with gradients, optimizer, a copy)", 5 * times * trained_bytes(model))
