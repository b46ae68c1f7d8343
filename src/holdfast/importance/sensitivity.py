"""Sensitivity along the training trajectory (K, section IV-C and Algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from holdfast.config import Options
from holdfast.importance.sample_squares import SampleSquares

_CHUNK = 2**20  # weights worked on at once: the intermediate results stay in the cache


class SensitivityOptions(Options):
    """How much a weight matters to the loss, observed at every optimizer step."""

    order: Literal["first", "second", "second-batch", "gradient"] = Field(
        "first",
        description="first: eq. 8; second: eq. 9, from gradients of single samples; second-batch: eq. 9 with "
        "the batch's gradient in both terms (the authors' code); gradient: its magnitude alone (table IV)",
    )
    smoothing: bool = Field(True, description="eqs. 10 to 12; off: the last step's sensitivity (table IV)")
    alpha1: float = Field(
        0.85,
        gt=0,
        lt=1,
        description="of the smoothed sensitivity, eq. 10; at 0 eq. 11 is zero, and with it every score",
    )
    alpha2: float = Field(0.85, ge=0, lt=1, description="of its uncertainty, eq. 11")

    @model_validator(mode="after")
    def _only_what_applies(self) -> SensitivityOptions:
        if not self.smoothing:
            self.refuse_ignored(("alpha1", "alpha2"), "with `smoothing: false`")
        return self


def sensitivity_options(value: Any) -> Any:
    """Accept the order alone (``sensitivity: gradient``)."""
    return {"order": value} if isinstance(value, str) else value


class Sensitivity:
    """s(w) of every trained weight, updated once per optimizer step (K, eqs. 8 to 12).

    Parameters
    ----------
    model : nn.Module
    parameters : mapping of str to Parameter
        Canonical name to what is trained.
    options : SensitivityOptions

    Notes
    -----
    Memory: two float32 values a weight with smoothing, one without; one more for ``second``.
    Where the paper and its code differ this follows the paper: it looks before the optimizer's step, at the
    unclipped gradient, from the first step on; the code looks after the step at the clipped one, from the
    second step on.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], options: SensitivityOptions
    ) -> None:
        self.options, self.parameters = options, dict(parameters)
        self._mean = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
        self._spread = (
            {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
            if options.smoothing
            else {}
        )
        self.squares = SampleSquares(model, parameters) if options.order == "second" else None

    def watch(self, batch: Mapping[str, Any]) -> None:
        """Before each micro-batch's forward pass; what is only evaluated doesn't count."""
        if self.squares is not None and torch.is_grad_enabled():
            self.squares.begin(batch["labels"])

    def attach(self) -> None:
        """Put the hooks on the model again, after `remove`."""
        if self.squares is not None:
            self.squares.attach()

    def remove(self) -> None:
        """Take the hooks off the model."""
        if self.squares is not None:
            self.squares.remove()

    @torch.no_grad()
    def observe(self, scale: float = 1.0) -> None:
        """Take in the gradient of one optimizer step, accumulated and unclipped.

        One that is not finite is passed over, as a GradScaler passes over its step.

        Parameters
        ----------
        scale : float
            ``scale * p.grad`` is the gradient of the loss.
        """
        if not self._is_finite():
            if self.squares is not None:
                self.squares.discard()
            return
        squares = self.squares.finish(scale) if self.squares is not None else {}
        for names in self._groups():
            now = self._now(names, scale, squares)
            mean = [self._mean[n] for n in names]
            if not self.options.smoothing:
                torch._foreach_copy_(mean, now)
                continue
            torch._foreach_lerp_(mean, now, 1 - self.options.alpha1)
            torch._foreach_sub_(now, mean)
            torch._foreach_abs_(now)
            torch._foreach_lerp_([self._spread[n] for n in names], now, 1 - self.options.alpha2)

    def _is_finite(self) -> bool:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        where: dict[torch.device, list[Tensor]] = {g.device: [] for g in gradients}
        for gradient in gradients:
            where[gradient.device].append(gradient.isfinite().all())
        return all(bool(torch.stack(found).all()) for found in where.values())

    def _groups(self) -> Iterator[list[str]]:
        names: list[str] = []
        size = 0
        for name, parameter in self.parameters.items():
            if names and size + parameter.numel() > _CHUNK:
                yield names
                names, size = [], 0
            names.append(name)
            size += parameter.numel()
        if names:
            yield names

    def _now(self, names: list[str], scale: float, squares: Mapping[str, Tensor]) -> list[Tensor]:
        """I(w) of this step, eqs. 8 and 9; zero where a weight took no part in it."""
        weights = [self.parameters[n].detach().float() for n in names]
        gradients = [
            torch.zeros_like(w) if (g := self.parameters[n].grad) is None else g.float()
            for n, w in zip(names, weights, strict=True)
        ]
        if self.options.order == "gradient":
            value = torch._foreach_abs(gradients)
            if scale != 1.0:
                torch._foreach_mul_(value, scale)
            return list(value)
        value = torch._foreach_mul(weights, gradients)
        if scale != 1.0:
            torch._foreach_mul_(value, scale)
        if self.options.order == "second-batch":
            torch._foreach_addcmul_(value, list(torch._foreach_mul(value, -0.5)), list(value))
        elif self.options.order == "second":
            curvature = torch._foreach_mul(weights, weights)
            of_samples = [squares[n].to(w.device) for n, w in zip(names, weights, strict=True)]
            torch._foreach_addcmul_(value, list(curvature), of_samples, -0.5)
        torch._foreach_abs_(value)
        return list(value)

    def result(self) -> dict[str, Tensor]:
        """s(w) by canonical name, float32: smoothed sensitivity times uncertainty (eq. 12)."""
        if not self.options.smoothing:
            return dict(self._mean)
        return {name: mean * self._spread[name] for name, mean in self._mean.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """What a training that was killed needs to go on."""
        state = {f"mean:{name}": value for name, value in self._mean.items()}
        return state | {f"spread:{name}": value for name, value in self._spread.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        for key, value in state.items():
            kind, _, name = key.partition(":")
            (self._mean if kind == "mean" else self._spread)[name].copy_(value)
