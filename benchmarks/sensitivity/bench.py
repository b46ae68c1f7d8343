"""What does KIF's localization cost? A training step that is observed against the same step unobserved.

The model is a Llama with the shapes of base-4m (6 layers, hidden 192, 6 heads of which 3 for keys and values,
intermediate 512, vocabulary 8192), randomly initialised; the batch is 16 sequences of 128 tokens of which the
last four are the answer; logits are computed for those alone, as holdfast's training does. Observed and
unobserved steps alternate within one process, and medians are compared.

Two settings, each with the order of sensitivity that its strategy uses:
* ``lora``: rank 8 on all linear maps, `second` (K, eq. 9 with gradients of single samples). Target 1.10.
* ``full``: all matrices of the blocks, `first` (eq. 8). Target 1.25.

Floor: first order reads θ, g, Ī, Ū and writes Ī, Ū once a step: 24 bytes a float32 weight, AdamW 28.
Second order adds the matrix products x^T g of every factor again, sample by sample: for LoRA at rank r about
r / in of what the layer itself costs.

    python benchmarks/sensitivity/bench.py [--steps 25] [--out benchmarks/sensitivity/result.json]

The last line printed is the result as one JSON object; `ratio` is LoRA's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from holdfast.importance.prior import trained_parameters
from holdfast.importance.sensitivity import Sensitivity, SensitivityOptions
from holdfast.models import LoraOptions, add_lora

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file
from shapes import VOCABULARY, base_4m_shapes, train_blocks_only

TARGETS = {"lora": 1.10, "full": 1.25}
ANSWER = 4


def model_of(lora: bool) -> Any:
    """The shapes of base-4m, with adapters or with its blocks trained."""
    if not lora:
        return train_blocks_only(base_4m_shapes())
    return add_lora(base_4m_shapes(), LoraOptions(r=8, target_modules="all-linear")).train()


def measure(lora: bool, order: Any, steps: int, warm_up: int = 3) -> dict[str, float]:
    """Time `steps` observed and `steps` unobserved training steps, in turn."""
    model = model_of(lora)
    weights = trained_parameters(model)
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-4)
    ids = torch.randint(VOCABULARY, (16, 128), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(ids, -100)
    labels[:, -ANSWER:] = ids[:, -ANSWER:]
    options = SensitivityOptions(order=order)
    times: dict[bool, list[float]] = {False: [], True: []}
    for step in range(2 * (steps + warm_up)):
        observed = (step % 2 == 1) != (step // 2 % 2 == 1)
        seen = Sensitivity(model, weights, options) if observed else None
        if seen is not None:
            seen.observe()  # touches its pages
        start = time.perf_counter()
        if seen is not None:
            seen.watch({"labels": labels})
        logits = model(input_ids=ids, logits_to_keep=ANSWER + 1, use_cache=False).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, -ANSWER:].flatten()).backward()
        if seen is not None:
            seen.observe()
        optimizer.step()
        optimizer.zero_grad()
        total = time.perf_counter() - start
        if seen is not None:
            seen.remove()
        if step >= 2 * warm_up:
            times[observed].append(total)
    plain, watched = (statistics.median(times[flag]) for flag in (False, True))
    return {"ratio": round(watched / plain, 4), "plain_seconds": round(plain, 5)}


def main() -> None:
    """Measure, write the result, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=25, help="measured steps of each kind")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("result.json"))
    arguments = parser.parse_args()
    cases = {
        f"{kind}_{order}": measure(kind == "lora", order, arguments.steps)
        for kind in ("lora", "full")
        for order in ("first", "second-batch", "second")
    }
    result = {
        "benchmark": "sensitivity",
        "ratio": cases["lora_second"]["ratio"],
        "target": TARGETS["lora"],
        "full_ratio": cases["full_first"]["ratio"],
        "full_target": TARGETS["full"],
        "cases": cases,
        "steps": arguments.steps,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
