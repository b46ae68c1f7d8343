"""Folds: how per-sample relevance maps become one importance for each weight (A, eqs. 10 and 11)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 2**16  # elements worked on at once: they fit the fastest caches
# Of eq. 10; A does not state its value. It is above the rounding noise of a tensor without
# relevance (the keys' bias, to which softmax is blind), which eq. 10 would otherwise blow up to 1.
EPSILON = 1e-8


def _working_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class _TopState:
    slots: Tensor  # (K, N): the first `count` rows are filled
    count: int = 0


class TopKMean:
    """Mean of the K largest normalised values over samples (A, eqs. 10 and 11).

    Each sample's map of a tensor is brought to sign(R) log(1 + |R|), divided by its largest magnitude in that
    tensor (eq. 10); of the signed results the K largest of each element are averaged (eq. 11). With fewer
    than K samples the mean is over those there are, where eq. 11 literally divides by K.

    Parameters
    ----------
    k : int
        K, at least 1.
    per_weight : bool
        Fold R / w, the LRP gradient, instead of R.
    """

    def __init__(self, k: int, per_weight: bool = False) -> None:
        if k < 1:
            raise ValueError(f"top_k must be at least 1, got {k}")
        self.k, self.per_weight = k, per_weight
        self.bytes_per_element = 4 * k
        self._states: dict[str, _TopState] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._means: dict[str, Tensor] = {}

    def update(self, name: str, weight: Tensor, grad_S: Tensor) -> None:
        """Take maps of samples, see `holdfast.attribution.Fold`."""
        state = self._states.get(name)
        if state is None:
            dtype = _working_type(grad_S.dtype)
            state = _TopState(torch.empty((self.k, weight.numel()), dtype=dtype, device=weight.device))
            self._states[name], self._shapes[name] = state, weight.shape
        weight_N = weight.reshape(-1)
        for grad in grad_S:
            value_N = grad.reshape(-1)
            if not self.per_weight:
                value_N = value_N.mul_(weight_N)
            self._insert(state, value_N)

    def _insert(self, state: _TopState, value_N: Tensor) -> None:
        low, high = torch.aminmax(value_N)
        largest = torch.maximum(-low, high).to(state.slots.dtype)
        scale = 1.0 / (torch.log1p(largest) + EPSILON)
        filled = state.count
        for start in range(0, value_N.numel(), CHUNK):
            value = value_N[start : start + CHUNK].to(state.slots.dtype)
            slots = state.slots[:, start : start + CHUNK]
            target = slots[filled] if filled < self.k else torch.empty_like(value)
            torch.abs(value, out=target).log1p_().mul_(scale)
            torch.copysign(target, value, out=target)
            if filled == self.k:  # keep the larger at each slot, carry the smaller on
                for slot in slots:
                    smaller = torch.minimum(slot, target)
                    torch.maximum(slot, target, out=slot)
                    target = smaller
        state.count = min(filled + 1, self.k)

    def finish(self) -> None:
        """Reduce what is held to the means; memory falls from K tensors to one."""
        for name, state in self._states.items():
            mean = torch.zeros_like(state.slots[0])
            for slot in state.slots[: state.count]:  # faster than a sum over the first dimension
                mean += slot
            mean /= max(state.count, 1)
            self._means[name] = mean.to(torch.float32).view(self._shapes[name])
        self._states.clear()

    def result(self) -> dict[str, Tensor]:
        """Canonical name to importance, float32, of the weight's shape; zeros where nothing arrived."""
        self.finish()
        return self._means


class _MeanFold:
    """A running sum over samples of a function of the LRP gradient; the weight's part comes in at the end."""

    bytes_per_element = 4

    def __init__(self, power: int, per_weight: bool) -> None:
        self.power, self.per_weight = power, per_weight
        self._sums: dict[str, tuple[Tensor, Tensor, int]] = {}
        self._means: dict[str, Tensor] = {}

    def update(self, name: str, weight: Tensor, grad_S: Tensor) -> None:
        """Take maps of samples, see `holdfast.attribution.Fold`."""
        if name not in self._sums:
            total = torch.zeros_like(weight, dtype=_working_type(grad_S.dtype))
            self._sums[name] = (total, weight, 0)
        total, weight, count = self._sums[name]
        for grad in grad_S.to(total.dtype):
            if self.power == 2:
                total.addcmul_(grad, grad)
            else:
                total.add_(grad.abs_())
        self._sums[name] = (total, weight, count + len(grad_S))

    def finish(self) -> None:
        """Turn sums into means: |R| = |w| |R / w|, so the weight's factor is applied once."""
        for name, (total, weight, count) in self._sums.items():
            if not self.per_weight:
                total *= weight.to(total.dtype).abs().pow(self.power)
            self._means[name] = (total / max(count, 1)).to(torch.float32)
        self._sums.clear()

    def result(self) -> dict[str, Tensor]:
        """Canonical name to importance, float32, of the weight's shape; zeros where nothing arrived."""
        self.finish()
        return self._means


class AbsoluteMean:
    """Mean over samples of |R|, or of |R / w| with `per_weight`; of plain gradients |w g| (Taylor) or |g|."""

    bytes_per_element = 4

    def __init__(self, per_weight: bool = False) -> None:
        self._fold = _MeanFold(1, per_weight)
        self.update, self.finish, self.result = self._fold.update, self._fold.finish, self._fold.result


class SquareMean:
    """Mean over samples of R squared, or of (R / w) squared with `per_weight`: the Fisher of gradients."""

    bytes_per_element = 4

    def __init__(self, per_weight: bool = False) -> None:
        self._fold = _MeanFold(2, per_weight)
        self.update, self.finish, self.result = self._fold.update, self._fold.finish, self._fold.result
