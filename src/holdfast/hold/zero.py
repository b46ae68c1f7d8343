"""DeepSpeed's ZeRO-3 as an optimizer of whole rows, which mechanisms work on as on any other's weights.

ZeRO-3 cuts each weight into flat pieces of equal size, one a process, wherever in a row that is; it keeps
them in one long float32 tensor a sub-group, and steps one sub-group after another. A mechanism needs whole
rows (a change is multiplied by a basis of inputs) and all weights at once. So each process works on the rows
that begin in its piece; what is missing of the last one comes from the processes after it. Where pieces end
with rows, as in models of the usual sizes, nothing is sent.

The only file that knows DeepSpeed's optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast import world
from holdfast.errors import ConfigError
from holdfast.pieces import Piece

_STEPS = "_holdfast_steps"  # on ZeRO's optimizer: the one `Steps` that all who attach share


class Part:
    """The rows of one weight that this process works on, as a plain tensor beside ZeRO's own memory.

    Attributes
    ----------
    rows : Tensor
        (own rows, ...), in the precision in which ZeRO steps; ``rows.grad`` has the gradient.
    """

    def __init__(self, shape: torch.Size, place: Callable[[], Tensor]) -> None:
        self._place = place  # this process's piece in ZeRO's flat tensor, padding included
        self._pieces = [Piece.of(shape, rank, world.size()) for rank in range(world.size())]
        self._own = self._pieces[world.rank()]
        first, behind = self._own.rows
        flat = place()
        if len(flat) * world.size() - shape.numel() not in range(world.size()):
            raise ConfigError(
                f"attach: DeepSpeed cuts a weight of shape {tuple(shape)} into pieces of {len(flat)} values, "
                f"which are not {world.size()} equal ones. Leave out what splits weights otherwise (MiCS, "
                "sequence or tensor parallelism)."
            )
        self.rows = torch.zeros(behind - first, *shape[1:], device=flat.device, dtype=flat.dtype)
        self.sent = self._own.row if any(piece.lacking for piece in self._pieces) else 0

    @property
    def weight(self) -> Tensor:
        """This process's values of the weight, in ZeRO's memory."""
        return self._place()[: self._own.end - self._own.start]

    def head(self, values: Tensor) -> Tensor:
        """(sent,): what the process before needs of a piece's values, and room."""
        given = values.new_zeros(self.sent)
        given[: self._own.head] = values[: self._own.head]
        return given

    def fill(self, rows: Tensor, values: Tensor, heads: Tensor | None) -> None:
        """Rows from the piece's values and, (processes, sent), all heads."""
        flat, own = rows.view(-1), self._own
        flat[: own.body] = values[own.head :]
        missing, rank = own.lacking, world.rank()
        while missing:
            assert heads is not None
            rank += 1
            count = min(self._pieces[rank].head, missing)
            flat[len(flat) - missing :][:count] = heads[rank][:count]
            missing -= count

    def tail(self, rows: Tensor) -> Tensor:
        """(sent,): the end of the last own row, which belongs to the processes behind, and room."""
        given = rows.new_zeros(self.sent)
        if lacking := self._own.lacking:
            given[:lacking] = rows.view(-1)[-lacking:]
        return given

    def empty(self, rows: Tensor, values: Tensor, tails: Tensor | None) -> None:
        """The piece's values from the rows and, (processes, sent), all tails."""
        own = self._own
        values[own.head :] = rows.view(-1)[: own.body]
        if own.head:
            assert tails is not None
            owner = max(rank for rank in range(world.rank()) if self._pieces[rank].lacking)
            offset = own.start - self._pieces[owner].end
            values[: own.head] = tails[owner][offset : offset + own.head]


class Steps(Optimizer):
    """All of ZeRO-3's sub-groups as one torch optimizer, whose `step` is theirs, one after another.

    Its parameter groups hold the model's parameters and, from before each step, what DeepSpeed's own
    optimizer has beside them (``lr``). Hooks on its step find the rows of `part` filled, with their
    gradients, and what they write there goes back.

    Parameters
    ----------
    zero : DeepSpeedZeroOptimizer_Stage3

    Raises
    ------
    ConfigError
        Optimizer or parameters live on NVMe, or ZenFlow steps beside the training.
    """

    def __init__(self, zero: Any) -> None:
        for option, where in (("swap_optimizer", "offload_optimizer: nvme"), ("zenflow", "zenflow")):
            if getattr(zero, option, False):
                raise ConfigError(
                    f"attach: DeepSpeed's '{where}' steps where no hold reaches. Use offload_optimizer: cpu, "
                    "or none."
                )
        self._zero = zero
        groups: list[dict[str, Any]] = [
            {**_beside(group), "params": []} for group in zero.optimizer.param_groups
        ]
        self._at: dict[int, tuple[int, int, int]] = {}  # of a parameter: sub-group, offset, length
        for sub_group, parameters in enumerate(zero.fp16_groups):
            groups[zero.sub_group_to_group_id[sub_group]]["params"] += parameters
            for parameter in parameters:
                self._at[id(parameter)] = zero.grad_position[zero.get_param_id(parameter)]
        super().__init__(groups, dict(zero.optimizer.defaults))
        self._parts: dict[int, Part] = {}
        self._ready: list[tuple[int, Tensor | None]] = []
        self._step_one = zero._optimizer_step
        zero._optimizer_step = self._collect

    def part(self, parameter: nn.Parameter) -> Tensor:
        """The rows of a parameter that this process works on; all processes must ask for the same."""
        part = self._parts.get(id(parameter))
        if part is None:
            sub_group, offset, length = self._at[id(parameter)]
            flat = self._zero.fp32_partitioned_groups_flat
            part = Part(world.shape(parameter), lambda: flat[sub_group].detach().narrow(0, offset, length))
            self._take([(part, part.rows, part.weight)])
            self._parts[id(parameter)] = part
        return part.rows

    def release(self, parameters: Iterable[Tensor]) -> None:
        """Free the rows of parameters that nobody holds any more."""
        for parameter in parameters:
            self._parts.pop(id(parameter), None)

    def follow(self) -> None:
        """Take over what DeepSpeed's own groups say of rates."""
        for group, theirs in zip(self.param_groups, self._zero.optimizer.param_groups, strict=True):
            group.update(_beside(theirs))

    def _keep_in_checkpoints(self) -> None:
        """What a mechanism keeps in a parameter group goes where DeepSpeed saves its groups."""
        for group, theirs in zip(self.param_groups, self._zero.optimizer.param_groups, strict=True):
            theirs.update({key: value for key, value in group.items() if key.startswith("holdfast_")})

    def _collect(self, sub_group: int) -> None:
        """In place of ZeRO's step of one sub-group: wait for the last, then step all."""
        flat = self._zero.fp32_partitioned_groups_flat
        self._ready.append((sub_group, flat[sub_group].grad))
        if sub_group < len(flat) - 1:
            return
        freed = [number for number, _ in self._ready if flat[number].grad is None]
        for number, gradient in self._ready:
            flat[number].grad = gradient
        self.follow()
        for part in self._parts.values():
            part.rows.grad = torch.zeros_like(part.rows)
        self._take(self._weights() + self._gradients())
        self.step()
        self._give(self._weights())
        self._keep_in_checkpoints()
        for number, _ in self._ready[:-1]:  # ZeRO has gone past these, with the weights before the step
            self._zero._reassign_or_swap_out_partitioned_parameters(number)
        for number in freed:
            flat[number].grad = None
        self._ready.clear()
        for part in self._parts.values():
            part.rows.grad = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """What runs between the hooks."""
        self._give(self._weights() + self._gradients())
        for number, _ in self._ready:
            self._step_one(number)
        self._take(self._weights())

    def _weights(self) -> list[tuple[Part, Tensor, Tensor]]:
        return [(part, part.rows, part.weight) for part in self._parts.values()]

    def _gradients(self) -> list[tuple[Part, Tensor, Tensor]]:
        found = []
        flat = self._zero.fp32_partitioned_groups_flat
        for key, part in self._parts.items():
            sub_group, offset, _ = self._at[key]
            gradient, rows = flat[sub_group].grad, part.rows.grad
            assert rows is not None
            found.append((part, rows, gradient.narrow(0, offset, part.weight.numel())))
        return found

    @torch.no_grad()
    def _take(self, moved: list[tuple[Part, Tensor, Tensor]]) -> None:
        """Fill rows from pieces."""
        heads = _exchanged([part.head(values) for part, _, values in moved])
        for (part, rows, values), received in zip(moved, heads, strict=True):
            part.fill(rows, values, received)

    @torch.no_grad()
    def _give(self, moved: list[tuple[Part, Tensor, Tensor]]) -> None:
        """Write rows back into pieces."""
        tails = _exchanged([part.tail(rows) for part, rows, _ in moved])
        for (part, rows, values), received in zip(moved, tails, strict=True):
            part.empty(rows, values, received)


def _beside(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _exchanged(sent: list[Tensor]) -> list[Tensor | None]:
    """What all processes send for each part, (processes, its length), in one message; None where nothing."""
    if not any(len(tensor) for tensor in sent):
        return [None] * len(sent)
    device, dtype = sent[0].device, sent[0].dtype
    whole = world.stacked(torch.cat([tensor.to(device, dtype) for tensor in sent]))
    return list(whole.split([len(tensor) for tensor in sent], dim=1))


def master(parameter: nn.Parameter) -> Tensor:
    """A whole weight in the precision in which ZeRO-3 steps it; all processes must ask."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = safe_get_full_fp32_param(parameter)
    return world.whole(parameter) if found is None else found


def steps_of(optimizer: Any) -> Steps | None:
    """The steps of ZeRO-3's optimizer, always the same object; None of what is no optimizer of DeepSpeed's.

    Raises
    ------
    ConfigError
        It is another optimizer of DeepSpeed's (stages 1 and 2).
    """
    if not type(optimizer).__module__.startswith("deepspeed."):
        return None
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        if isinstance(optimizer, Optimizer):  # FusedAdam and its like, without ZeRO
            return None
        raise ConfigError(
            f"attach: DeepSpeed's {type(optimizer).__name__} keeps the weights that it steps where no hold "
            "reaches. Use ZeRO stage 3 (configs/accelerate/zero3.yaml), FSDP2 or DDP."
        )
    found: Steps | None = getattr(optimizer, _STEPS, None)
    if found is None:
        found = Steps(optimizer)
        setattr(optimizer, _STEPS, found)
    found.follow()
    return found
