"""The mean of a prior by layer and module, read one tensor at a time."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import DataError
from holdfast.models import layer_of, module_of


@dataclass(frozen=True)
class ImportanceMap:
    """Rows are blocks, columns are modules.

    Attributes
    ----------
    layers, modules : list of str
        Names of the rows (from the input up) and of the columns (in the model's order).
    means : list of list of float or None
        Mean of |prior| over the weights of each module; None where a block has no such module.
    """

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
    from safetensors import SafetensorError, safe_open

    totals: dict[tuple[str, int, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    try:
        with safe_open(path, framework="pt") as tensors:
            names = tensors.keys()  # the handle can't be iterated
            for name in names:
                layer = layer_of(name)
                if layer is None:
                    continue
                tensor = tensors.get_tensor(name)
                cell = totals[_stack(name), layer, module_of(name)]
                cell[0] += tensor.abs().double().sum().item()
                cell[1] += tensor.numel()
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path}: not readable as safetensors ({error}). It may be torn: compute the prior again."
        ) from error
    return _arrange({key: total / max(count, 1.0) for key, (total, count) in totals.items()})


def _arrange(means: dict[tuple[str, int, str], float]) -> ImportanceMap:
    rows = sorted({(stack, layer) for stack, layer, _ in means}, key=lambda r: (r[0] != "encoder", r))
    modules = sorted({module for _, _, module in means}, key=_place)
    several = len({stack for stack, _ in rows}) > 1
    return ImportanceMap(
        layers=[f"{stack} {layer}" if several else str(layer) for stack, layer in rows],
        modules=modules,
        means=[[means.get((*row, module)) for module in modules] for row in rows],
    )


def _stack(name: str) -> str:
    return next((part for part in name.split(".") if part in ("encoder", "decoder")), "")


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


def _place(module: str) -> tuple[int, int, str]:
    parts = module.lower().split(".")
    feed_forward = any(key in module.lower() for key in ("mlp", "fc", "feed", "dense_h", "densereludense"))
    leaf = next((part for part in reversed(parts) if not part.startswith("lora")), module)
    steps = [
        i for i, key in enumerate(_FLOW) if leaf == key or leaf.startswith(f"{key}_") or leaf == f"c_{key}"
    ]
    return int(feed_forward), min(steps, default=len(_FLOW)), module
