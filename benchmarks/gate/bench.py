"""What does a gate cost? A full training step with the gate on the update against the same step without.

The model is a Llama with the shapes of base-4m (6 layers, hidden 192, 6 heads of which 3 for keys and values,
intermediate 512, vocabulary 8192), randomly initialised; the batch is 16 sequences of 128 tokens; AdamW moves
the linear maps of the blocks. One model takes gated and ungated steps in turn within one process, so both
meet the same machine state; medians are compared.

Floor, in bytes moved per float32 weight: AdamW reads θ, g, m, v and writes θ, m, v: 28. The gate copies θ
before the step (read, write: 8) and blends after it (read θ, θ_old, R̄, write θ: 16): 24 more. So next to an
AdamW that touches memory once (fused), a gated optimizer step takes at least 52/28 = 1.86 times as long where
memory is the limit; torch's default on a CPU makes several passes over the same tensors and hides a part of
that. Forward and backward passes (6 x 2048 tokens floating-point operations a weight) hide the rest: the
whole step has to stay below 1.10.

    python benchmarks/gate/bench.py [--steps 25] [--out benchmarks/gate/result.json]

The last line printed is the result as one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from holdfast.hold import Gate
from holdfast.importance.prior import ImportancePrior
from holdfast.models import block_parameters

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file
from shapes import VOCABULARY, base_4m_shapes, train_blocks_only

TARGET = 1.10


def measure(steps: int, warm_up: int = 3) -> dict[str, float | int | str]:
    """Time `steps` gated and `steps` ungated training steps, in turn."""
    model = train_blocks_only(base_4m_shapes())
    weights = block_parameters(model)
    generator = torch.Generator().manual_seed(1)
    prior = ImportancePrior({n: torch.rand(p.shape, generator=generator) for n, p in weights.items()})
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-4)
    ids = torch.randint(VOCABULARY, (16, 128), generator=generator)
    gate = Gate(prior)
    whole: dict[bool, list[float]] = {False: [], True: []}
    alone: dict[bool, list[float]] = {False: [], True: []}
    for step in range(2 * (steps + warm_up)):
        # gated and ungated alternate, and so does which of a pair comes first
        gated = (step % 2 == 1) != (step // 2 % 2 == 1)
        handle = gate.attach(model, optimizer) if gated else None
        if handle is not None:
            optimizer.step()  # touches the new snapshot's pages; without gradients AdamW does nothing
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        middle = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        optimizer.zero_grad()
        total = time.perf_counter() - start
        if handle is not None:
            handle.remove()
        if step >= 2 * warm_up:
            whole[gated].append(total)
            alone[gated].append(end - middle)
    seconds = {
        f"{name}_{kind}_seconds": round(statistics.median(times[flag]), 5)
        for name, times in (("step", whole), ("optimizer", alone))
        for kind, flag in (("plain", False), ("gated", True))
    }
    return {
        "benchmark": "gate",
        "ratio": round(statistics.median(whole[True]) / statistics.median(whole[False]), 4),
        "target": TARGET,
        "optimizer_ratio": round(statistics.median(alone[True]) / statistics.median(alone[False]), 4),
        "optimizer_ratio_by_bytes": round(52 / 28, 4),
        **seconds,
        "steps": steps,
        "gated_weights": prior.elements,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def main() -> None:
    """Measure, write the result, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=25, help="measured steps of each kind")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("result.json"))
    arguments = parser.parse_args()
    result = measure(arguments.steps)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
