"""How DeepSpeed's optimizers have what they step: flat float32 tensors, and of a weight a piece a process.

ZeRO-3 cuts every weight into equal pieces, one a process, in sub-groups of weights. ZeRO-1 and ZeRO-2 put all
weights of a parameter group one behind another and cut the whole: of a weight a process may have nothing.

The only file that knows DeepSpeed's optimizers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from holdfast import world
from holdfast.errors import ConfigError
from holdfast.pieces import Piece

At = tuple[int, int, int]  # number of a flat tensor, offset in it, length


class Stage(Protocol):
    """What differs from stage to stage.

    Attributes
    ----------
    flats : list of Tensor
        What this process steps, in the order in which DeepSpeed steps it.
    """

    flats: list[Tensor]

    def members(self) -> Iterator[tuple[int, nn.Parameter, At]]:
        """Each parameter with the number of its parameter group, and where this process has its piece."""
        ...

    def pieces(self, parameter: nn.Parameter, at: At) -> Sequence[Piece]:
        """What each process steps of it."""
        ...

    def publish(self, number: int) -> None:
        """Give the model what a flat tensor has now: DeepSpeed has gone past it, with what it had before."""
        ...


class StageThree:
    """ZeRO-3's, a ``DeepSpeedZeroOptimizer_Stage3``."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self.flats: list[Tensor] = zero.fp32_partitioned_groups_flat

    def members(self) -> Iterator[tuple[int, nn.Parameter, At]]:
        zero = self._zero
        for number, parameters in enumerate(zero.fp16_groups):
            for parameter in parameters:
                yield (
                    zero.sub_group_to_group_id[number],
                    parameter,
                    tuple(zero.grad_position[zero.get_param_id(parameter)]),
                )

    def pieces(self, parameter: nn.Parameter, at: At) -> Sequence[Piece]:
        shape, size = world.shape(parameter), world.size()
        if at[2] * size - shape.numel() not in range(size):
            raise ConfigError(
                f"attach: DeepSpeed cuts a weight of shape {tuple(shape)} into pieces of {at[2]} values, "
                f"which are not {size} equal ones. Leave out what splits weights otherwise (MiCS, sequence "
                "or tensor parallelism)."
            )
        return [Piece.of(shape, rank, size) for rank in range(size)]

    def publish(self, number: int) -> None:
        self._zero._reassign_or_swap_out_partitioned_parameters(number)


class StageTwo:
    """ZeRO-1's and ZeRO-2's, a ``DeepSpeedZeroOptimizer``."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self.flats: list[Tensor] = zero.single_partition_of_fp32_groups
        padded: list[list[int]] | None = getattr(zero, "round_robin_bit16_offsets", None)  # since 0.19
        self._starts: dict[int, tuple[int, int]] = {}  # of a parameter: its group, where it begins there
        for group, parameters in enumerate(zero.round_robin_bit16_groups):
            sizes = [parameter.numel() for parameter in parameters]
            starts = [0, *itertools.accumulate(sizes)][:-1] if padded is None else padded[group]
            for parameter, start in zip(parameters, starts, strict=True):
                self._starts[id(parameter)] = group, start

    def members(self) -> Iterator[tuple[int, nn.Parameter, At]]:
        for group, parameters in enumerate(self._zero.round_robin_bit16_groups):
            before = world.rank() * len(self.flats[group])  # values of the processes before this one
            for parameter in parameters:
                own = self._piece(parameter, world.rank())
                offset = self._starts[id(parameter)][1] + own.start - before
                yield group, parameter, (group, offset if own.length else 0, own.length)

    def pieces(self, parameter: nn.Parameter, at: At) -> Sequence[Piece]:
        return [self._piece(parameter, rank) for rank in range(world.size())]

    def _piece(self, parameter: nn.Parameter, rank: int) -> Piece:
        group, start = self._starts[id(parameter)]
        length = len(self.flats[group])
        return Piece.between(parameter.shape, rank * length - start, (rank + 1) * length - start)

    def publish(self, number: int) -> None:
        shown = self._zero.parallel_partitioned_bit16_groups[number][world.rank()]
        shown.data.copy_(self.flats[number].data)


def stage_of(zero: Any) -> Stage:
    """How an optimizer of DeepSpeed's cuts weights.

    Raises
    ------
    ConfigError
        It is none of ZeRO's; or what it steps lives on NVMe, is stepped beside the training (ZenFlow), or is
        shared by some of the processes alone (experts, tensor parallelism).
    """
    for option, where in (("swap_optimizer", "offload_optimizer: nvme"), ("zenflow", "zenflow")):
        if getattr(zero, option, False):
            raise ConfigError(
                f"attach: DeepSpeed's '{where}' steps where no hold reaches. Use offload_optimizer: cpu, "
                "or none."
            )
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return StageThree(zero)
    if not hasattr(zero, "single_partition_of_fp32_groups"):
        raise ConfigError(
            f"attach: DeepSpeed's {type(zero).__name__} keeps the weights that it steps where no hold "
            "reaches. Use ZeRO stage 1, 2 or 3 (configs/accelerate/zero3.yaml), FSDP2 or DDP."
        )
    if any(count != world.size() for count in zero.partition_count):
        raise ConfigError(
            f"attach: DeepSpeed cuts weights up over {list(zero.partition_count)} processes, not over all "
            f"{world.size()}. Leave out what shares them otherwise (expert or tensor parallelism)."
        )
    return StageTwo(zero)
