"""The gradient of a row's true logits by all that is trained."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from holdfast.attribution.targets import initial_lambda, make_batch
from holdfast.importance.prior import trained_parameters
from holdfast.tasks.encode import Encoded


def logit_gradient(
    model: nn.Module, row: Encoded, pad_id: int, target: Literal["all", "first"]
) -> dict[str, Tensor]:
    """Canonical name to the gradient of one row's true logit, by everything that is trained."""
    weights = trained_parameters(model)
    device = next(iter(weights.values())).device
    batch = make_batch(model, [row], pad_id, device, "left")
    with torch.enable_grad():
        logits = model(**batch.inputs).logits
    lam = initial_lambda(logits.detach(), batch.answer_ST, target=target, of="logit")
    found = torch.autograd.grad(logits, list(weights.values()), lam, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(weights.items(), found, strict=True)
    }
