"""A network small enough to check a mechanism by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holdfast.importance.prior import ImportancePrior


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def graded(model: nn.Module, low: float = -0.2, high: float = 1.2) -> ImportancePrior:
    """Values on both sides of [0, 1]."""
    generator = torch.Generator().manual_seed(1)
    return ImportancePrior(
        {
            n: low + (high - low) * torch.rand(p.shape, generator=generator)
            for n, p in model.named_parameters()
        }
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def backward(model: nn.Module, seed: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64).to(next(model.parameters()).dtype)
    model.zero_grad()
    model(x).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
