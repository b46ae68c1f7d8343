"""Orthogonality of LoRA's skill units (K, eq. 5)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.hold.attach import Handle, add_to_gradients, hook, rests, unwrap


def _gram_terms(factors: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor, bool]]:
    """(factor, its Gram matrix minus the identity, whether units are rows) of each LoRA factor."""
    terms = []
    for name, w in factors.items():
        if ".lora_A" in name or ".lora_embedding_A" in name:
            gram, rows = w.float() @ w.float().T, True
        elif ".lora_B" in name or ".lora_embedding_B" in name:
            gram, rows = w.float().T @ w.float(), False
        else:
            continue
        terms.append((w, gram - torch.eye(len(gram), device=w.device), rows))
    return terms


def orthogonality(factors: Mapping[str, Tensor]) -> Tensor:
    """Sum over all adapters of ‖A Aᵀ − I‖² + ‖Bᵀ B − I‖² (Frobenius), a scalar.

    The paper writes AᵀA with the units as A's columns; PEFT stores them as rows, hence A Aᵀ: both are the
    r x r matrix of the units' inner products. The authors' code has the mean of unsquared norms instead.

    Parameters
    ----------
    factors : mapping of str to Tensor
        Canonical name to parameter; others than LoRA factors are left out.
    """
    return torch.stack([gap.square().sum() for _, gap, _ in _gram_terms(factors)]).sum()


class Orthogonality:
    """Adds λ times the gradient of `orthogonality` once per optimizer step, after clipping.

    So importance is measured on the gradient of the loss alone, and the logged loss is the task's.

    Parameters
    ----------
    factors : mapping of str to Parameter
    strength : float
        λ. The paper names no value.
    """

    def __init__(self, factors: Mapping[str, Tensor], strength: float) -> None:
        self.factors, self.strength = dict(factors), strength

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Handle:
        """Act on every step of this optimizer until the handle is removed."""

        inner = unwrap(optimizer)

        def add() -> None:
            terms = [
                (w, (4 * self.strength * (gap @ w.float() if rows else w.float() @ gap)).to(w))
                for w, gap, rows in _gram_terms(self.factors)
                if not rests(w)
            ]
            add_to_gradients(inner, [w for w, _ in terms], [gradient for _, gradient in terms])

        return hook(inner, add, needs_gradients="orthogonality")
