"""Squared gradients of single samples, taken from a training step that happens anyway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.attribution.maps import WeightMaps
from holdfast.errors import ConfigError


class _SumOfSquares:
    """A fold (`holdfast.attribution.Fold`) that keeps the sum over samples of squared gradients."""

    bytes_per_element = 4

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.sums = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}

    def update(self, name: str, weight: Tensor, grad_S: Tensor) -> None:
        self.sums[name] += grad_S.float().square_().sum(0)


class SampleSquares:
    """Sum over a step's samples of (gradient of the sample's own loss) squared, for each weight.

    The forward and backward pass of the training are used: a hook on each linear map takes its input and the
    gradient of its output, and the attribution engine's maps make the samples' gradients one layer at a
    time. A sample's own loss is the mean over its answer tokens; the training's loss is the mean over the
    step's tokens, so sample j's part of it is scaled back by (tokens of the step) / (tokens of j).

    Parameters
    ----------
    model : nn.Module
    parameters : mapping of str to Parameter
        Canonical name to weights and biases of linear maps (LoRA's factors are such).

    Raises
    ------
    ConfigError
        One of the parameters belongs to something else than a linear map.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        from transformers.pytorch_utils import Conv1D

        self._fold = _SumOfSquares(parameters)
        self._maps = WeightMaps(model, parameters, self._fold, factor=1.0)
        self._tokens = 0
        self._share_S = torch.ones(0)
        maps = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
        covered = {id(p) for module in maps for p in module.parameters(recurse=False)}
        others = [name for name, p in parameters.items() if id(p) not in covered]
        if others:
            raise ConfigError(
                "strategy.sensitivity: 'second' needs gradients of single samples, which exist for linear "
                f"maps only, not for {', '.join(others[:3])}. Use 'second-batch', or train LoRA or "
                "model.trainable: blocks."
            )
        self._removers = [
            module.register_forward_hook(self._hook(isinstance(module, nn.Linear))).remove
            for module in maps
            if any(map(self._maps.wants, module.parameters(recurse=False)))
        ]

    def begin(self, labels_ST: Tensor) -> None:
        """Start a micro-batch, before its forward pass; `labels_ST` is -100 where nothing is predicted."""
        self._maps.end_batch()  # of the micro-batch before
        counts_S = (labels_ST != -100).sum(1).clamp(min=1)
        self._tokens += int(counts_S.sum())
        self._share_S = 1.0 / counts_S
        self._maps.begin_batch(len(labels_ST), set())

    def _hook(self, out_first: bool) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            x = args[0].detach()
            self._maps.expect(module.weight)
            self._maps.expect(module.bias)

            def take(lam: Tensor) -> None:
                lam_STO = lam.reshape(self._maps.samples, -1, lam.shape[-1])
                lam_STO = lam_STO * self._share_S.to(lam)[:, None, None]
                if self._maps.wants(module.weight):
                    self._maps.weight(module.weight, x, lam_STO, out_first, None)
                if self._maps.wants(module.bias):
                    self._maps.bias(module.bias, lam_STO, None)

            output.register_hook(take)

        return hook

    def finish(self, scale: float = 1.0) -> dict[str, Tensor]:
        """The step's sums by canonical name, float32; what is held is cleared for the next step.

        Parameters
        ----------
        scale : float
            What a gradient has to be multiplied by (the inverse of fp16's loss scale).
        """
        self._maps.end_batch()
        factor = (self._tokens * scale) ** 2
        result = {name: total * factor for name, total in self._fold.sums.items()}
        for total in self._fold.sums.values():
            total.zero_()
        self._tokens = 0
        return result

    def remove(self) -> None:
        """Take the hooks off the model."""
        while self._removers:
            self._removers.pop()()
