"""DeepSpeed's ZeRO as an optimizer of whole rows, which mechanisms work on as on any other's weights.

ZeRO has flat pieces of weights, cut wherever in a row that is (`holdfast.hold.stages`), and steps one tensor
of them after another. A mechanism needs whole rows (a change is multiplied by a basis of inputs) and all
weights at once. So each process works on the rows that begin in its piece; what is missing of the last one
comes from the processes after it. Where pieces end with rows, as ZeRO-3's do in models of the usual sizes,
nothing is sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast import world
from holdfast.hold.stages import stage_of
from holdfast.pieces import Piece

_STEPS = "_holdfast_steps"  # on ZeRO's optimizer: the one `Steps` that all who attach share


class Part:
    """The rows of one weight that this process works on, as a plain tensor beside ZeRO's own memory.

    Attributes
    ----------
    rows : Tensor
        (own rows, ...), in the precision in which ZeRO steps; ``rows.grad`` has the gradient.
    """

    def __init__(self, shape: torch.Size, pieces: Sequence[Piece], place: Callable[[], Tensor]) -> None:
        self._place = place  # this process's piece in ZeRO's flat tensor, padding included
        self._pieces = pieces
        self._own = pieces[world.rank()]
        first, behind = self._own.rows
        flat = place()
        self.rows = torch.zeros(behind - first, *shape[1:], device=flat.device, dtype=flat.dtype)
        self.sent = self._own.row if any(piece.lacking for piece in self._pieces) else 0

    @property
    def weight(self) -> Tensor:
        """This process's values of the weight, in ZeRO's memory."""
        return self._place()[: self._own.length]

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
    """All that ZeRO steps one after another as one torch optimizer, whose `step` is theirs.

    Its parameter groups hold the model's parameters and, from before each step, what DeepSpeed's own
    optimizer has beside them (``lr``). Hooks on its step find the rows of `part` filled, with their
    gradients, and what they write there goes back.

    Parameters
    ----------
    zero : DeepSpeedZeroOptimizer or DeepSpeedZeroOptimizer_Stage3

    Raises
    ------
    ConfigError
        See `holdfast.hold.stages.stage_of`.
    """

    def __init__(self, zero: Any) -> None:
        self._stage = stage_of(zero)
        self._zero = zero
        groups: list[dict[str, Any]] = [
            {**_beside(group), "params": []} for group in zero.optimizer.param_groups
        ]
        self._at = {}
        for group, parameter, at in self._stage.members():
            groups[group]["params"].append(parameter)
            self._at[id(parameter)] = at
        super().__init__(groups, dict(zero.optimizer.defaults))
        self._parts: dict[int, Part] = {}
        self._holders: Counter[int] = Counter()  # of each part: who holds, and has not let go yet
        self._ready: list[tuple[int, Tensor | None]] = []
        self._step_one = zero._optimizer_step
        zero._optimizer_step = self._collect

    def part(self, parameter: nn.Parameter) -> Tensor:
        """The rows of a parameter that this process works on; all processes must ask for the same."""
        part = self._parts.get(id(parameter))
        if part is None:
            number, offset, length = at = self._at[id(parameter)]
            pieces, flats = self._stage.pieces(parameter, at), self._stage.flats
            part = Part(
                world.shape(parameter), pieces, lambda: flats[number].detach().narrow(0, offset, length)
            )
            self._take([(part, part.rows, part.weight)])
            self._parts[id(parameter)] = part
            world.cut_up(parameter, pieces)
        self._holders[id(parameter)] += 1
        return part.rows

    def release(self, parameters: Iterable[Tensor]) -> None:
        """Free the rows of parameters that nobody holds any more."""
        for parameter in parameters:
            self._holders[id(parameter)] -= 1
            if not self._holders[id(parameter)]:
                del self._parts[id(parameter)]
                world.cut_up(parameter, None)

    def follow(self) -> None:
        """Take over what DeepSpeed's own groups say of rates."""
        for group, theirs in zip(self.param_groups, self._zero.optimizer.param_groups, strict=True):
            group.update(_beside(theirs))

    def _keep_in_checkpoints(self) -> None:
        """What a mechanism keeps in a parameter group goes where DeepSpeed saves its groups."""
        for group, theirs in zip(self.param_groups, self._zero.optimizer.param_groups, strict=True):
            theirs.update({key: value for key, value in group.items() if key.startswith("holdfast_")})

    def drop(self, prefix: str) -> None:
        """Take what a mechanism kept under keys of this beginning out of both."""
        for group in (*self.param_groups, *self._zero.optimizer.param_groups):
            for key in [key for key in group if key.startswith(prefix)]:
                del group[key]

    def _collect(self, number: int) -> None:
        """In place of ZeRO's step of one flat tensor: wait for the last, then step all."""
        flat = self._stage.flats
        self._ready.append((number, flat[number].grad))
        if number < len(flat) - 1:
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
        for number, _ in self._ready[:-1]:
            self._stage.publish(number)
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
        for key, part in self._parts.items():
            number, offset, _ = self._at[key]
            gradient, rows = self._stage.flats[number].grad, part.rows.grad
            assert rows is not None
            assert gradient is not None
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
    """A whole weight in the precision in which ZeRO steps it; all processes must ask."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = safe_get_full_fp32_param(parameter)
    return world.whole(parameter) if found is None else found


def steps_of(optimizer: Any) -> Steps | None:
    """The steps of ZeRO's optimizer, always the same object; None of what is no optimizer of DeepSpeed's.

    Raises
    ------
    ConfigError
        It is one of DeepSpeed's that no hold reaches.
    """
    if not type(optimizer).__module__.startswith("deepspeed.") or isinstance(optimizer, Optimizer):
        return None  # FusedAdam and its like, without ZeRO, are torch optimizers
    world.start()  # a script's own processes
    found: Steps | None = getattr(optimizer, _STEPS, None)
    if found is None:
        found = Steps(optimizer)
        setattr(optimizer, _STEPS, found)
    found.follow()
    return found
