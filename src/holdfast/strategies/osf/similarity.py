"""How much each transformer block leaves its input as it is: OSF's importance of layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from holdfast import world
from holdfast.attribution.targets import pass_through
from holdfast.names import block_path
from holdfast.tasks.encode import Encoded


def importance_of_blocks(
    model: Any, blocks: Collection[str], rows: Sequence[Encoded], pad_id: int
) -> dict[str, float]:
    """I of each block: the cosine of what goes in and what comes out, mean over tokens, scaled to mean 1.

    Rows go through the model one by one, prompt and answer, so there is no padding to be told apart.

    Parameters
    ----------
    blocks : collection of str
        Their module paths.
    """

    def measured() -> dict[str, float]:
        sums: dict[str, list[Tensor]] = defaultdict(list)

        def take(path: str, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output if isinstance(output, Tensor) else output[0]
            sums[path].append(
                nn.functional.cosine_similarity(before.float(), after.float(), dim=-1).flatten()
            )

        hooks = [
            model.get_submodule(path).register_forward_hook(partial(take, path), with_kwargs=True)
            for path in blocks
        ]
        pass_through(model, rows, pad_id, hooks)
        means = {path: float(torch.cat(sums[path]).mean()) for path in blocks}
        mean = sum(means.values()) / len(means)
        return {path: value / mean for path, value in means.items()}

    found: dict[str, float] = world.first(measured)  # ranks must not differ by rounding
    return found


def share_of(importance: dict[str, float], least: float, target: float) -> Callable[[str], float]:
    """Of a map's name the preserved share, mrr + I (trr − mrr), at most all of it and at least none."""
    return lambda name: min(max(least + importance[block_path(name)] * (target - least), 0.0), 1.0)
