"""What `holdfast.hold.stages` knows of DeepSpeed's ZeRO optimizers, written out for any float type.

The real ones are tested where it is installed (tests/invariant/test_zero.py); they step float32 masters only.
"""

from __future__ import annotations

import itertools
import sys
import types
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from holdfast import world

_AT_ONCE = 3  # parameters of a sub-group
MODULE: Any = types.SimpleNamespace(zero=types.SimpleNamespace(GatheredParameters=nullcontext))  # deepspeed


class Zero3:
    """Steps flat pieces of a model's parameters, one sub-group after another; the parameters stay whole."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.fp16_groups: list[list[nn.Parameter]] = []
        self.fp32_partitioned_groups_flat: list[Tensor] = []
        self.sub_group_to_group_id: dict[int, int] = {}
        self.grad_position: dict[int, list[int]] = {}
        for number, group in enumerate(optimizer.param_groups):
            parameters = group["params"]
            for start in range(0, len(parameters), _AT_ONCE):
                self._add(parameters[start : start + _AT_ONCE], number)
            group["params"] = []

    def _add(self, parameters: list[nn.Parameter], group: int) -> None:
        number, offset, pieces = len(self.fp16_groups), 0, []
        for parameter in parameters:
            parameter.ds_id, parameter.ds_shape = len(self.grad_position), parameter.shape  # type: ignore[attr-defined]
            piece = self._piece(parameter.detach())
            self.grad_position[id(parameter)] = [number, offset, len(piece)]
            offset += len(piece)
            pieces.append(piece)
        self.fp16_groups.append(parameters)
        self.fp32_partitioned_groups_flat.append(torch.cat(pieces).requires_grad_())
        self.sub_group_to_group_id[number] = group

    def get_param_id(self, parameter: nn.Parameter) -> int:
        """The key of `grad_position`."""
        return id(parameter)

    @staticmethod
    def _piece(value: Tensor) -> Tensor:
        flat = value.flatten()
        length = -(-len(flat) // world.size())
        padded = torch.cat([flat, flat.new_zeros(length * world.size() - len(flat))])
        return padded[world.rank() * length :][:length].clone()

    def zero_grad(self) -> None:
        """Of the model's parameters."""
        for group in self.fp16_groups:
            for parameter in group:
                parameter.grad = None

    def step(self) -> None:
        """As ZeRO-3's: gradients of one sub-group, its step, its weights back, its gradients gone."""
        for number, group in enumerate(self.fp16_groups):
            flat = self.fp32_partitioned_groups_flat[number]
            given = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            flat.grad = torch.cat([self._piece(gradient) for gradient in given])
            self._optimizer_step(number)
            self._reassign_or_swap_out_partitioned_parameters(number)
            flat.grad = None

    def _optimizer_step(self, number: int) -> None:
        group = self.optimizer.param_groups[self.sub_group_to_group_id[number]]
        group["params"] = [self.fp32_partitioned_groups_flat[number]]
        self.optimizer.step()
        group["params"] = []

    def _reassign_or_swap_out_partitioned_parameters(self, number: int) -> None:
        flat = self.fp32_partitioned_groups_flat[number].detach()
        for parameter in self.fp16_groups[number]:
            _, offset, length = self.grad_position[id(parameter)]
            whole = world.stacked(flat[offset : offset + length]).flatten()[: parameter.numel()]
            parameter.data.copy_(whole.view(parameter.shape))


class Zero2:
    """Steps a flat part of all weights of a group, wherever each begins and ends; these stay whole."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.round_robin_bit16_groups: list[list[nn.Parameter]] = []
        self.parallel_partitioned_bit16_groups: list[list[Tensor]] = []
        self.single_partition_of_fp32_groups: list[Tensor] = []
        self.partition_count = [world.size()] * len(optimizer.param_groups)
        self._wholes: list[Tensor] = []
        for group in optimizer.param_groups:
            self.round_robin_bit16_groups.append(group["params"])
            whole = self._in_a_row([parameter.detach() for parameter in group["params"]])
            start = 0
            for parameter in group["params"]:
                parameter.data = whole[start : start + parameter.numel()].view(parameter.shape)
                start += parameter.numel()
            self._wholes.append(whole)
            self.parallel_partitioned_bit16_groups.append(list(whole.chunk(world.size())))
            self.single_partition_of_fp32_groups.append(self._own(whole).clone().requires_grad_())
            group["params"] = []

    @staticmethod
    def _in_a_row(values: list[Tensor]) -> Tensor:
        flat = torch.cat([value.flatten() for value in values])
        return torch.cat([flat, flat.new_zeros(-len(flat) % world.size())])

    @staticmethod
    def _own(whole: Tensor) -> Tensor:
        return whole.chunk(world.size())[world.rank()]

    def zero_grad(self) -> None:
        """Of the model's parameters."""
        for parameter in itertools.chain(*self.round_robin_bit16_groups):
            parameter.grad = None

    def step(self) -> None:
        """As ZeRO-2's: gradients of one group, its step, its weights, and when all are done everybody's."""
        for number, group in enumerate(self.round_robin_bit16_groups):
            flat = self.single_partition_of_fp32_groups[number]
            given = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            flat.grad = self._own(self._in_a_row(given)).clone()
            self._optimizer_step(number)
            flat.grad = None
            self.parallel_partitioned_bit16_groups[number][world.rank()].copy_(flat.detach())
        for whole in self._wholes:
            whole.copy_(world.stacked(self._own(whole)).flatten())

    def _optimizer_step(self, number: int) -> None:
        group = self.optimizer.param_groups[number]
        group["params"] = [self.single_partition_of_fp32_groups[number]]
        self.optimizer.step()
        group["params"] = []


Zero2.__module__ = Zero3.__module__ = "deepspeed.stand_in"


def with_zero2(model: Any) -> Any:
    """AdamW of a model under it, in two parameter groups."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    return Zero2(model, torch.optim.AdamW([{"params": others}, {"params": matrices}], lr=1e-3))


def with_zero3(model: Any) -> Any:
    """AdamW of a model under it, in a process that ends afterwards."""
    sys.modules["deepspeed"] = MODULE
    return Zero3(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
