"""What does a held step cost? Training steps under an anchor against the same steps without.

    python benchmarks/hold/bench.py [--steps 16]

Two shapes, random weights, float32, one thread: base-4m's (16 x 128 tokens a step), and hidden 512 in 4
blocks (8 x 128). AdamW moves the linear maps of the blocks. Each way of holding has a model and an
optimizer of its own; all take their steps in turn within one process, and each is compared with the plain
one beside it: the median (of `every 8` the mean).

Floor of a whole step, W weights of maps with I inputs and T tokens a step; plain 6 W T and what head and
attention take. By weight 16 bytes a weight. By inputs 4 W I more: in its coordinates at each step, on the
weights at each n-th. So a hold in its coordinates costs 2 I / 3 T of the maps' part of a step: little where T
is thousands, as in training on GPUs, and much at the second shape (0.51). `floor` counts products alone.

`ratio` is by inputs in its coordinates (the default), base-4m's shapes. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from holdfast.hold import Anchor
from holdfast.importance.prior import ImportancePrior
from holdfast.models import block_parameters, input_dims

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file
from shapes import base_4m_shapes, llama, train_blocks_only

HOLDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "by weight": {"strength": 600},
    "by inputs": {"strength": 100},
    "by inputs, on the weights": {"strength": 100, "coordinates": "weights"},
    "by inputs, on the weights, every 8": {"strength": 100, "coordinates": "weights", "every": 8},
}


def prior_for(model: LlamaForCausalLM, hold: str) -> ImportancePrior:
    """Random: what it is costs the same."""
    weights, dims = block_parameters(model), input_dims(model)
    draw = torch.Generator().manual_seed(1)
    if "inputs" not in hold:
        return ImportancePrior({n: torch.rand(p.shape, generator=draw) for n, p in weights.items()})
    factors = {n: torch.randn((p.shape[dims[n]],) * 2, generator=draw) for n, p in weights.items()}
    return ImportancePrior({n: f @ f.t() / len(f) for n, f in factors.items()}, {"kind": "inputs"})


def stepper(model: LlamaForCausalLM, hold: str, ids: torch.Tensor) -> Callable[[], None]:
    """One training step of a model under a hold."""
    train_blocks_only(model)
    optimizer = torch.optim.AdamW(block_parameters(model).values(), lr=1e-4)
    if HOLDS[hold]:
        Anchor(prior_for(model, hold), **HOLDS[hold]).attach(model, optimizer)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def floors(model: LlamaForCausalLM, tokens: int) -> dict[str, float]:
    """Products of a whole step under each hold / of a plain one."""
    maps, dims = block_parameters(model), input_dims(model)
    weights = sum(p.numel() for p in maps.values())
    weighed = sum(p.numel() * p.shape[dims[n]] for n, p in maps.items())
    plain = 6 * (weights + model.lm_head.weight.numel()) * tokens
    extra = {"by inputs": 4.0, "by inputs, on the weights": 4, "by inputs, on the weights, every 8": 4 / 8}
    return {hold: round(1 + extra.get(hold, 0) * weighed / plain, 3) for hold in HOLDS}


def compare(build: Callable[[], LlamaForCausalLM], sequences: int, steps: int) -> dict[str, dict[str, float]]:
    """Median seconds of a step under each hold, its ratio to a plain one, and the floor of that."""
    model = build()
    size = (sequences, 128)
    ids = torch.randint(model.config.vocab_size, size, generator=torch.Generator().manual_seed(2))
    ways = {hold: stepper(build(), hold, ids) for hold in HOLDS}
    times: dict[str, list[float]] = {hold: [] for hold in HOLDS}
    order = list(HOLDS)
    for turn in range(steps + 2):
        order = order[1:] + order[:1]
        for hold in order:
            start = time.perf_counter()
            ways[hold]()
            if turn >= 2:
                times[hold].append(time.perf_counter() - start)
    found = {}
    for hold, floor in floors(model, ids.numel()).items():
        beside = [a / b for a, b in zip(times[hold], times["plain"], strict=True)]
        middle = statistics.mean if "every" in hold else statistics.median  # one step in eight is longer
        found[hold] = {
            "ratio": round(middle(beside), 3),
            "floor": floor,
            "seconds": round(statistics.median(times[hold]), 4),
        }
        print(hold, found[hold], file=sys.stderr)
    return found


def main() -> None:
    """Run, write result.json beside this file, and print it as the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=16, help="measured steps of each kind, a multiple of 8")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    of = {
        "base-4m, 2048 tokens": compare(base_4m_shapes, 16, steps),
        "hidden 512, 1024 tokens": compare(lambda: llama(512, 4), 8, steps),
    }
    result = {
        "ratio": of["base-4m, 2048 tokens"]["by inputs"]["ratio"],
        "target": 1.05,
        "of": of,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    (Path(__file__).parent / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
