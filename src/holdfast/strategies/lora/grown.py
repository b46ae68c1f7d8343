"""Growing LoRA by a block of ranks a task, with the earlier ranks exactly as they were."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from holdfast import world
from holdfast.hold.attach import Bound, Handle, chunks_of, groups_of, hook, unwrap
from holdfast.hold.cost import Cost, trained_bytes
from holdfast.hold.mask import Mask
from holdfast.models.adapters import NAME, grow, lora_factors, lora_layers, rank_of
from holdfast.records import AdapterRanks


class Grown:
    """The model's LoRA as frozen ranks, and new ones behind them.

    While attached, the new ranks are trained as a second LoRA beside a frozen first one would be: in the
    forward pass the frozen ranks are constants, so that they have no gradient, and clipping and whatever else
    looks at one meets the new ranks alone; and what an optimizer does to the frozen ones all the same (weight
    decay) is undone after each step, bit for bit. The new ranks' steps are those of a LoRA by itself for
    optimizers that treat each entry by itself (SGD, AdamW); Adafactor's clipping of its update averages over
    the frozen ranks too, so it clips less. Kernels that don't call LoRA's own linear layers give the frozen
    ranks gradients, which are then clipped along.

    Memory: a copy of the factors, and the optimizer's states for the frozen ranks.

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
        """Hold the frozen ranks of the model, or of a copy of it, until the handle is removed.

        With none it does nothing. Of weights that are cut up over processes each holds its part.
        """
        if not self.frozen:
            return Handle()
        inner, frozen = unwrap(optimizer), torch.arange(self.rank) < self.frozen
        group_of, bound, ranks = groups_of(inner), [], {}
        factors: list[tuple[nn.Linear, Tensor]] = []
        for name, layer in lora_layers(model).items():
            for part, of_factor in (("lora_A", frozen[:, None]), ("lora_B", frozen[None, :])):
                linear = getattr(layer, part)[NAME]
                if not linear.weight.requires_grad:  # a strategy may freeze one of the two as a whole
                    continue
                factors.append((linear, of_factor))
                if id(linear.weight) in group_of:
                    bound.append(Bound(f"{name}.{part}", linear.weight, group_of[id(linear.weight)]))
                    ranks[id(linear.weight)] = of_factor
        chunks = chunks_of(bound, inner)
        kept = [[part.detach().clone() for part in chunk.parameters] for chunk in chunks]
        masks = [
            Mask([world.like(ranks[id(p)].to(p.device).expand(world.shape(p)), p) for p in chunk.owners])
            for chunk in chunks
        ]

        def put_back() -> None:
            for mask, chunk, before in zip(masks, chunks, kept, strict=True):
                mask.blend_(chunk.parameters, before)

        handle = hook(inner, after=put_back)
        handle.removers += [remove for chunk in chunks for remove in chunk.removers]
        for linear, of_factor in factors:  # now that nothing is refused any more
            handle.removers.append(partial(_put_forward, linear, linear.__dict__.get("forward")))
            linear.__dict__["forward"] = partial(_constant, linear, of_factor)
        return handle

    def summary(self, overlap: float | None = None) -> AdapterRanks:
        """The adapter's rank, how many of its ranks are frozen, and how far the others overlap with them."""
        return AdapterRanks(rank=self.rank, frozen=self.frozen, overlap=overlap)


def _constant(linear: nn.Linear, frozen: Tensor, x: Tensor) -> Tensor:
    """What a factor's layer computes, its frozen ranks as constants."""
    weight = linear.weight
    return F.linear(x, torch.where(frozen.to(weight.device), weight.detach(), weight), linear.bias)


def _put_forward(linear: nn.Linear, before: Callable[..., Tensor] | None) -> None:
    """Give a layer the forward of its class, or the one that somebody had put there."""
    del linear.__dict__["forward"]
    if before is not None:
        linear.__dict__["forward"] = before


def grown_cost(model: nn.Module, times: int) -> Cost:
    """Of growing by the model's rank so many times: weights, gradients, AdamW's states, and the copy."""
    return Cost("LoRA of later tasks (with gradients, optimizer, a copy)", 5 * times * trained_bytes(model))
