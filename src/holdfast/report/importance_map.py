"""The mean of a prior by layer and module, read one tensor at a time."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import DataError
from holdfast.importance.moments import diagonal
from holdfast.importance.prior import Kind
from holdfast.importance.stored import Unpacking
from holdfast.names import Block, block_of, module_of, order_of


@dataclass(frozen=True)
class ImportanceMap:
    """Rows are blocks, columns are modules.

    Attributes
    ----------
    blocks : list of Block
        The rows, from the input up.
    layers, modules : list of str
        Names of the rows and of the columns (in the model's order).
    means : list of list of float or None
        Mean of |prior| over the weights of each module; None where a block has no such module. Of a prior by
        inputs the mean eigenvalue of its matrix: the mean square of a relevant input.
    """

    blocks: list[Block]
    layers: list[str]
    modules: list[str]
    means: list[list[float | None]]


def importance_map(path: Path) -> ImportanceMap:
    """Average ``prior.safetensors`` by layer and module; memory holds one tensor at a time.

    Weights outside the blocks form no row. An encoder's and a decoder's blocks are told apart.

    Raises
    ------
    DataError
        The file isn't readable as safetensors (torn, or of another format).
    """
    totals: dict[tuple[Block, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    by_weight = kind_of(path) == "weights"
    with open_prior(path) as tensors:
        for name in tensors.keys():  # noqa: SIM118 - it is no mapping
            block = block_of(name)
            if block is None:
                continue
            tensor = tensors.get_tensor(name)
            tensor = tensor if by_weight else diagonal(tensor)
            cell = totals[block, module_of(name)]
            cell[0] += tensor.abs().double().sum().item()
            cell[1] += tensor.numel()
    return _arrange({key: total / max(count, 1.0) for key, (total, count) in totals.items()})


def kind_of(path: Path) -> Kind:
    """Whether a ``prior.safetensors`` is by weight or by inputs, by the record beside it."""
    try:
        recorded = json.loads(path.with_name("prior.json").read_text()).get("kind")
    except (OSError, ValueError, AttributeError):
        recorded = None  # no record: as all priors were before there was another kind
    return "inputs" if recorded == "inputs" else "weights"


@contextmanager
def open_prior(path: Path) -> Iterator[Unpacking]:
    """The tensors of a ``prior.safetensors``, read when asked for.

    Raises
    ------
    DataError
        The file isn't readable as safetensors (torn, or of another format).
    """
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path}: not readable as safetensors ({error}). It may be torn: compute the prior again."
        ) from error
    with opened as tensors:
        yield Unpacking(tensors)


def block_labels(blocks: Iterable[Block]) -> dict[Block, str]:
    """What blocks are called, from the input up: "3", or "encoder 3" where a model has both stacks."""
    ordered = sorted(set(blocks), key=order_of)
    several = len({stack for stack, _ in ordered}) > 1
    return {block: f"{block[0]} {block[1]}" if several else str(block[1]) for block in ordered}


def _arrange(means: dict[tuple[Block, str], float]) -> ImportanceMap:
    rows = block_labels(block for block, _ in means)
    modules = sorted({module for _, module in means}, key=place_of)
    return ImportanceMap(
        blocks=list(rows),
        layers=list(rows.values()),
        modules=modules,
        means=[[means.get((row, module)) for module in modules] for row in rows],
    )


# safetensors sorts by name; people think of a block in the order in which data flows through it
_FLOW = (
    "q",
    "k",
    "v",
    "qkv",
    "query",
    "attn",
    "o",
    "out",
    "gate",
    "up",
    "fc1",
    "fc_in",
    "wi",
    "c_fc",
    "h_to_4h",
)


def place_of(module: str) -> tuple[int, int, str]:
    """Sorts the modules of a block by when data reaches them."""
    parts = module.lower().split(".")
    feed_forward = any(key in module.lower() for key in ("mlp", "fc", "feed", "dense_h", "densereludense"))
    leaf = next((part for part in reversed(parts) if not part.startswith("lora")), module)
    steps = [
        i for i, key in enumerate(_FLOW) if leaf == key or leaf.startswith(f"{key}_") or leaf == f"c_{key}"
    ]
    return int(feed_forward), min(steps, default=len(_FLOW)), module
