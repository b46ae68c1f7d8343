"""The processes of one launch: who writes, what is shared out, gathered, summed, and placed like a parameter.

``accelerate launch`` and ``torchrun`` start several processes that all run the same program. Each calls what
is here at the same point, or the others wait. Without a launcher there is one process, and every function
returns at once what it means for one.

This is the only file that names accelerate, DTensor and torch.distributed.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from holdfast.errors import ConfigError, HoldfastError, ProcessLostError
from holdfast.pieces import Piece

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
Engine = Literal["FSDP2", "ZeRO-1", "ZeRO-2", "ZeRO-3"]

_CHUNK = 2**24  # values summed at once: bounds the float64 copy to 128 MiB
_ALLOWED = "Allowed: DDP, FSDP2 and ZeRO stages 1 to 3 (configs/accelerate)."
_ZERO: dict[str, Engine] = {"1": "ZeRO-1", "2": "ZeRO-2", "3": "ZeRO-3"}  # by DeepSpeed's stage
_CUT = "_holdfast_cut"  # on a parameter: see `cut_up`
_rank, _size = 0, 1
_peers: list[tuple[str, int]] = []  # host and process id of each rank


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE") or 1) > 1


def start() -> None:
    """Join the other processes, if a launcher started any; a second call does nothing.

    Without a GPU they talk over gloo. A process group that is there already (of a script of your own) is used
    as it is.
    """
    if _size == 1 and launched():
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
        join()


def join() -> None:
    """Join the other processes, if somebody has brought them together already; else do nothing."""
    global _rank, _size, _peers
    import torch.distributed as dist

    if _size == 1 and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        _rank, _size = dist.get_rank(), dist.get_world_size()
        _peers = gather((socket.gethostname(), os.getpid()))


def engine() -> Engine | None:
    """What cuts up over the processes what is trained; None where each steps whole weights.

    Raises
    ------
    ConfigError
        The launcher chose FSDP1, or DeepSpeed without ZeRO.
    """
    if _said("ACCELERATE_USE_DEEPSPEED"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "unknown (of TrainingArguments alone)")
        config = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if config not in ("none", "None", ""):
            stage = str(json.loads(Path(config).read_text()).get("zero_optimization", {}).get("stage", 0))
        if stage in _ZERO:
            return _ZERO[stage]
        raise ConfigError(f"the launcher chose DeepSpeed ZeRO stage {stage}. {_ALLOWED}")
    if _said("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION") == "2":
            return "FSDP2"
        raise ConfigError(f"the launcher chose FSDP1 (fsdp_version: 1). {_ALLOWED}")
    return None


def by_deepspeed() -> bool:
    """Whether that is DeepSpeed's ZeRO."""
    return engine() in _ZERO.values()


def _said(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true")


def size() -> int:
    """How many processes there are."""
    return _size


def rank() -> int:
    """The number of this one, from 0."""
    return _rank


def leads() -> bool:
    """Whether this is rank 0, the only one that writes and speaks."""
    return _rank == 0


def barrier() -> None:
    """Wait until all are here."""
    if _size > 1:
        gather(None)


def gather(value: T) -> list[T]:
    """What each process gives (anything that can be pickled), in the order of their ranks."""
    if _size == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * _size
    with named_losses():
        dist.all_gather_object(found, value)
    return found


def first(work: Callable[[], T]) -> T:
    """Let rank 0 do something; all get what it returns, or raise the error that it met."""
    if _size == 1:
        return work()
    import torch.distributed as dist

    told: list[Any] = [None]
    if leads():
        try:
            told = [(True, work())]
        except Exception as error:
            told = [(False, error if _survives(error) else HoldfastError(f"{type(error).__name__}: {error}"))]
    with named_losses():
        dist.broadcast_object_list(told, src=0)
    done, result = told[0]
    if done:
        return result
    raise result


def _survives(error: Exception) -> bool:
    """Whether an error is itself when it arrives at another process."""
    try:
        return str(pickle.loads(pickle.dumps(error))) == str(error)
    except Exception:
        return False


def any_of(flag: bool) -> bool:
    """Whether it is true for any process."""
    return flag if _size == 1 else any(gather(flag))


def union(names: Mapping[str, T]) -> dict[str, T]:
    """What any process has, by name, in the order of the names; of several the lowest rank's."""
    if _size == 1:
        return dict(names)
    merged: dict[str, T] = {}
    for part in reversed(gather(dict(names))):
        merged.update(part)
    return dict(sorted(merged.items()))


def part(items: Sequence[T]) -> Sequence[T]:
    """This process's share of what can be done in any order: each `size`-th item."""
    return items if _size == 1 else items[_rank::_size]


def part_of_batch(rows: Sequence[T]) -> Sequence[T]:
    """This process's rows of a training batch; all of them where there are fewer rows than processes.

    A gradient is averaged over processes, so a batch that each sees whole counts as if it was seen once.
    """
    return rows if len(rows) < _size else part(rows)


def expect_every_gradient(accelerator: Any) -> None:
    """Let DDP wait for the gradient of every trained weight, whatever the forward pass has used.

    transformers lets it look for weights that the forward pass leaves out, which count as done from then on:
    a gradient that comes in another way is an error there.
    """
    handler = getattr(accelerator, "ddp_handler", None)
    if handler is not None:
        handler.find_unused_parameters = False


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place, summed in float64.

    All processes must give tensors of the same shapes in the same order; dtypes may differ.
    """
    if _size == 1:
        return
    import torch
    import torch.distributed as dist

    for tensor in tensors:
        flat_N = tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1)
        for start in range(0, flat_N.numel(), _CHUNK):
            piece = flat_N[start : start + _CHUNK]
            sums = piece.to(device=_device(), dtype=torch.float64)
            with named_losses():
                dist.all_reduce(sums)
            piece.copy_(sums)
        if not tensor.is_contiguous():
            tensor.copy_(flat_N.view(tensor.shape))


def agree(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by that of rank 0, in place: results may differ by their last bits."""
    if _size == 1:
        return
    import torch.distributed as dist

    for tensor in tensors:
        sent = tensor.to(_device()).contiguous()
        with named_losses():
            dist.broadcast(sent, src=0)
        tensor.copy_(sent)


def stacked(tensor: Tensor) -> Tensor:
    """A tensor of each process, of the same shape and dtype everywhere, in the order of ranks."""
    if _size == 1:
        return tensor[None]
    import torch
    import torch.distributed as dist

    mine = tensor.to(_device()).contiguous()
    found = [torch.empty_like(mine) for _ in range(_size)]
    with named_losses():
        dist.all_gather(found, mine)
    return torch.stack(found).to(tensor.device)


def _device() -> Any:
    """Where tensors must be to be sent."""
    import torch
    import torch.distributed as dist

    if "gloo" in str(dist.get_backend()):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def named_losses() -> Iterator[None]:
    """Where a process is gone, say which: what waits for it fails with an error of the network only.

    Raises
    ------
    ProcessLostError
        Instead of a RuntimeError of the communication, where another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if _size == 1 or isinstance(error, NotImplementedError):
            raise
        gone = _gone()
        if not gone:
            raise
        raise ProcessLostError(
            f"rank {_rank}: lost {', '.join(gone)}: it ended or was killed. If no error of its own stands "
            "above, look for the kernel's out-of-memory killer. Nothing finished is lost: the same command "
            "continues."
        ) from error


def _gone(patience: float = 3.0) -> list[str]:
    """The ranks on this machine whose process has ended; sockets close a little before that."""
    here = socket.gethostname()
    until = time.monotonic() + patience
    while True:
        gone = [
            f"rank {number} (process {process} on {host})"
            for number, (host, process) in enumerate(_peers)
            if host == here and not _runs(process)
        ]
        if gone or time.monotonic() > until:
            return gone
        time.sleep(0.05)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    try:  # a zombie answers too, until its parent looks
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return True


def whole_batches(loader: Any) -> Any:
    """Let each process draw the batches that one process would draw, from a loader that accelerate prepared.

    accelerate gives each process batches of its own, so that their number and what they hold depends on how
    many there are. Here all draw the same, and the collator takes its part (`part_of_batch`).
    """
    if _size > 1:
        sampler = loader.batch_sampler
        sampler.num_processes, sampler.process_index, sampler.even_batches = 1, 0, False
    return loader


def steps_at_once(scheduler: Any) -> int:
    """How many steps a learning rate's scheduler makes at one of the optimizer.

    accelerate's wrapper makes one for each process, where each process has batches of its own.
    """
    if not getattr(scheduler, "step_with_optimizer", False) or scheduler.split_batches:
        return 1
    from accelerate.state import AcceleratorState

    return int(AcceleratorState().num_processes)


def named_error(text: str) -> str:
    """A message with the rank that it comes from; ranks other than 0 let rank 0 speak first.

    Where all meet the same error, rank 0 tells it and the launcher ends the others meanwhile.
    """
    if _size == 1:
        return text
    if not leads():
        time.sleep(1.0)
    return text if text.startswith("rank ") else f"rank {_rank}: {text}"


def is_sharded(tensor: Any) -> bool:
    """Whether each process has a part of a tensor: a DTensor (FSDP2), or a parameter under ZeRO-3."""
    return _is_dtensor(tensor) or in_pieces(tensor)


def in_pieces(parameter: Any) -> bool:
    """Whether it is a parameter under DeepSpeed's ZeRO-3: flat pieces, of which `holdfast.pieces` tells."""
    return hasattr(parameter, "ds_id")


def holds_parts(parameters: Iterable[Any]) -> bool:
    """Whether each process has only a part of some of these (FSDP2, ZeRO-3)."""
    return any(is_sharded(parameter) or in_pieces(parameter) for parameter in parameters)


def cut_up(parameter: Any, pieces: Sequence[Piece] | None) -> None:
    """Say which piece of a whole parameter each process steps (ZeRO-1, ZeRO-2); with None that it is over."""
    if pieces is not None:
        setattr(parameter, _CUT, pieces)
    elif hasattr(parameter, _CUT):
        delattr(parameter, _CUT)


def _cut(parameter: Any) -> Sequence[Piece] | None:
    """The piece that each process steps under ZeRO; None of what is stepped otherwise."""
    if in_pieces(parameter):
        return [Piece.of(parameter.ds_shape, number, _size) for number in range(_size)]
    found: Sequence[Piece] | None = getattr(parameter, _CUT, None)
    return found


def is_stepped_in_parts(parameter: Any) -> bool:
    """Whether each process steps a part of a parameter: `local` is that part, and sums go over all."""
    return is_sharded(parameter) or _cut(parameter) is not None


def _is_dtensor(tensor: Any) -> bool:
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def is_sharded_along(tensor: Any, dim: int) -> bool:
    """Whether each process has a part of this dimension of a DTensor."""
    return _is_dtensor(tensor) and any(placement.is_shard(dim) for placement in tensor.placements)


def shape(parameter: Any) -> torch.Size:
    """The shape of a whole parameter, wherever its parts are."""
    found: torch.Size = parameter.ds_shape if in_pieces(parameter) else parameter.shape
    return found


def like(value: Tensor, parameter: Any) -> Tensor:
    """A whole tensor, the same in each process, placed as a parameter of its shape is: its part here.

    Under ZeRO the part is of whole rows, those that begin in this process's piece.
    """
    if (pieces := _cut(parameter)) is not None:
        first, behind = pieces[_rank].rows
        return value[first:behind]
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None).to_local()


def local(parameter: Any) -> Tensor:
    """This process's part of a parameter as a plain tensor; of a plain one the tensor itself.

    It shares the parameter's memory, but under ZeRO-3, where it is a copy of whole rows and all must ask.
    """
    if _cut(parameter) is not None:
        return like(whole(parameter).detach(), parameter)
    found: Tensor = parameter.detach().to_local() if is_sharded(parameter) else parameter
    return found


def whole(tensor: Any) -> Tensor:
    """A tensor with the parts of all processes; of a plain one the tensor itself."""
    if in_pieces(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            copied: Tensor = tensor.detach().clone()
        return copied
    found: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return found
