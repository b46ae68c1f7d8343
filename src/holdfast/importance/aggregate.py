"""Folds: how per-sample relevance maps become one importance for each weight (A, eqs. 10 and 11)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from holdfast import world
from holdfast.resume import State

# Of eq. 10; A does not state its value. It is above the rounding noise of a tensor without
# relevance (the keys' bias, to which softmax is blind), which eq. 10 would otherwise blow up to 1.
EPSILON = 1e-8
SENT = 2**22  # elements of which the processes exchange their K largest at once


def _chunk(device: torch.device) -> int:
    """Elements worked on at once: they fit a CPU's caches, and are worth a GPU's while to start on."""
    return 2**16 if device.type == "cpu" else 2**24


def _working_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class _TopState:
    """What is held of one tensor: (K, N) slots, of which the first rows are filled.

    Until a sample comes for which there is no slot, the slots hold raw values, and `scales` what eq. 10
    multiplies their logarithms by; normalising them at the very end saves a pass over them.
    """

    slots: Tensor
    shape: torch.Size
    scales: list[float] = field(default_factory=list)
    merged: bool = False


def _signed_log(value: Tensor, out: Tensor) -> Tensor:
    """sign(R) log(1 + |R|), the numerator of eq. 10; `out` is other memory than `value`."""
    return torch.copysign(torch.abs(value, out=out).log1p_(), value, out=out)


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
        self._means: dict[str, Tensor] = {}

    def update(self, name: str, weight: Tensor, grad_S: Tensor) -> None:
        """Take maps of samples, see `holdfast.attribution.Fold`."""
        dtype = _working_type(grad_S.dtype)
        state = self._states.get(name)
        if state is None:
            slots = torch.empty((self.k, weight.numel()), dtype=dtype, device=weight.device)
            state = self._states[name] = _TopState(slots, weight.shape)
        weight_N = weight.reshape(-1).to(dtype)
        for grad in grad_S:
            grad_N, filled = grad.reshape(-1).to(dtype), len(state.scales)
            value_N = state.slots[filled] if filled < self.k else grad_N
            if not self.per_weight:
                torch.mul(grad_N, weight_N, out=value_N)
            elif filled < self.k:
                value_N.copy_(grad_N)
            low, high = torch.aminmax(value_N)
            scale = 1.0 / (math.log1p(max(-low.item(), high.item())) + EPSILON)
            if filled < self.k:
                state.scales.append(scale)
            else:
                self._merge(state, value_N, scale)

    def _merge(self, state: _TopState, value_N: Tensor, scale: float) -> None:
        """Keep the K largest of the K in the slots and one more."""
        self._normalise(state)
        chunk = _chunk(value_N.device)
        for start in range(0, value_N.numel(), chunk):
            value = value_N[start : start + chunk]
            carried, spare = _signed_log(value, torch.empty_like(value)).mul_(scale), torch.empty_like(value)
            for slot in state.slots[:, start : start + chunk]:  # keep the larger, carry the smaller on
                torch.minimum(slot, carried, out=spare)
                torch.maximum(slot, carried, out=slot)
                carried, spare = spare, carried

    def _normalise(self, state: _TopState) -> None:
        """Bring raw values in the slots to eq. 10."""
        if not state.merged:
            state.merged = True
            for slot_N, slot_scale in zip(state.slots, state.scales, strict=False):
                for slot in slot_N.split(_chunk(slot_N.device)):
                    slot.copy_(_signed_log(slot, torch.empty_like(slot)).mul_(slot_scale))

    def state(self) -> State:
        """What is folded so far; the tensors are the fold's own memory."""
        filled = {name: held.slots[: len(held.scales)] for name, held in self._states.items()}
        values = {name: [held.scales, held.merged] for name, held in self._states.items()}
        return {**filled, **self._means}, {**values, **dict.fromkeys(self._means)}

    def load_state(
        self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], weights: Mapping[str, Tensor]
    ) -> None:
        """Take back what `state` gave; `weights` are the current ones by name."""
        self._means = {name: tensors[name] for name, held in values.items() if held is None}
        for name, (scales, merged) in ((n, held) for n, held in values.items() if held is not None):
            filled_KN, weight = tensors[name], weights[name]
            slots = torch.empty((self.k, weight.numel()), dtype=filled_KN.dtype, device=weight.device)
            slots[: len(filled_KN)] = filled_KN
            self._states[name] = _TopState(slots, weight.shape, scales, merged)

    def unite(self, weights: Mapping[str, Tensor]) -> None:
        """Keep the K largest of what all processes have folded."""
        counts = {name: len(state.scales) for name, state in self._states.items()}
        dtypes = world.union({name: state.slots.dtype for name, state in self._states.items()})
        of_all = world.gather(counts)
        for name, dtype in dtypes.items():
            weight, state = weights[name], self._states.get(name)
            if state is None:
                slots = torch.empty((self.k, weight.numel()), dtype=dtype, device=weight.device)
                state = self._states[name] = _TopState(slots, weight.shape)
            self._normalise(state)
            state.slots[len(state.scales) :] = float("-inf")
            for start in range(0, weight.numel(), SENT):
                part = state.slots[:, start : start + SENT]
                part.copy_(world.stacked(part).flatten(0, 1).topk(self.k, dim=0).values)
            state.scales = [1.0] * min(self.k, sum(found.get(name, 0) for found in of_all))

    def finish(self) -> None:
        """Reduce what is held to the means; memory falls from K tensors to one."""
        for name in list(self._states):
            state = self._states.pop(name)
            mean_N, count = torch.zeros_like(state.slots[0]), len(state.scales)
            chunk = _chunk(mean_N.device)
            scratch = torch.empty_like(mean_N[:chunk])
            for start in range(0, mean_N.numel(), chunk):
                mean = mean_N[start : start + chunk]
                for slot_N, scale in zip(state.slots, state.scales, strict=False):
                    slot = slot_N[start : start + chunk]
                    if state.merged:
                        mean.add_(slot, alpha=1 / count)
                    else:
                        mean.add_(_signed_log(slot, scratch[: len(slot)]), alpha=scale / count)
            self._means[name] = mean_N.to(torch.float32).view(state.shape)

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

    def state(self) -> State:
        """What is folded so far; the tensors are the fold's own memory."""
        sums = {name: s[0] for name, s in self._sums.items()}
        values = {name: s[2] for name, s in self._sums.items()}
        return {**sums, **self._means}, {**values, **dict.fromkeys(self._means)}

    def load_state(
        self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], weights: Mapping[str, Tensor]
    ) -> None:
        """Take back what `state` gave; `weights` are the current ones by name."""
        for name, count in values.items():
            weight = weights[name]
            if count is None:
                self._means[name] = tensors[name].to(weight.device, copy=True)
                continue
            self._sums[name] = (tensors[name].to(weight.device, copy=True), weight, count)

    def unite(self, weights: Mapping[str, Tensor]) -> None:
        """Add up what all processes have folded."""
        of_all = world.gather({name: count for name, (_, _, count) in self._sums.items()})
        for name in sorted({name for found in of_all for name in found}):
            total, weight = self._sums[name][:2] if name in self._sums else (None, weights[name])
            if total is None:
                total = torch.zeros_like(weight, dtype=_working_type(weight.dtype))
            self._sums[name] = (total, weight, sum(found.get(name, 0) for found in of_all))
            world.add_up([total])

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
        self.state, self.load_state = self._fold.state, self._fold.load_state
        self.unite = self._fold.unite


class SquareMean:
    """Mean over samples of R squared, or of (R / w) squared with `per_weight`: the Fisher of gradients."""

    bytes_per_element = 4

    def __init__(self, per_weight: bool = False) -> None:
        self._fold = _MeanFold(2, per_weight)
        self.update, self.finish, self.result = self._fold.update, self._fold.finish, self._fold.result
        self.state, self.load_state = self._fold.state, self._fold.load_state
        self.unite = self._fold.unite
