"""Attribution against one plain forward and backward pass of the same tokens.

    python benchmarks/attribution/bench.py

Llama with 12 M block parameters (hidden 384, 6 blocks), 8 sequences of 128 tokens, one thread, float32. The
two are timed alternately in one process; `ratio` is median wall time over median wall time, and
`ratio_processor_time` the same of processor time, which other work on the machine disturbs less. Attribution:
A's eqs. 10 and 11 in full (signed logarithm, tensor maximum, the K = 8 largest of each element), and the
conservation check, which every first batch has. Plain: logits of all tokens, their cross-entropy, gradients
of the block weights.

Floor. Both do the same products: 2 x 12 M x 1024 tokens forward, as many for Lambda and for the weight maps,
74 GFLOP in all. On top of it attribution folds 8 x 12 M = 96 M relevances. Each is written once by its matrix
product, and read and written once by the fold (it must know the largest before it can normalise): 3 x 4 bytes
of memory traffic where caches don't help, 1.15 GB, plus one logarithm each. At 10 GB/s and 1 ns a logarithm
that is 0.2 s, on top of 1.0 to 1.5 s for the products.

`ratio_streaming` is the same with K = 8 and 32 sequences in 4 batches against 4 plain passes: from the ninth
sample on, every relevance is merged into 8 sorted values in memory (another 2 x 32 bytes each).
`ratio_later_batch` is of the three batches after the first. What a call does once is a large part of `ratio`:
a comparison of a sample in a batch with the sample alone (three more samples), and the sums of the
conservation check.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from holdfast.attribution import AttributionOptions, attribute_batches
from holdfast.importance.aggregate import TopKMean
from holdfast.models import block_parameters
from holdfast.tasks.encode import IGNORED, Encoded, collate

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file
from shapes import llama

ROUNDS, SEQUENCES, TOKENS, ANSWER, K = 7, 8, 128, 8, 8


def rows(count: int) -> list[Encoded]:
    """Random sequences whose last tokens are the answer."""
    ids = torch.randint(3, 512, (count, TOKENS), generator=torch.Generator().manual_seed(1)).tolist()
    return [Encoded(row[:-ANSWER], row[-ANSWER:]) for row in ids]


def plain(model: LlamaForCausalLM, batches: list[dict[str, Tensor]], weights: list[Tensor]) -> None:
    """One forward and backward pass a batch, with gradients of the block weights."""
    for batch in batches:
        torch.autograd.grad(model(**batch, use_cache=False).loss, weights)


def attribution(model: LlamaForCausalLM, examples: list[Encoded]) -> None:
    """One attribution, folded by eqs. 10 and 11, with the result taken."""
    fold = TopKMean(K)
    options = AttributionOptions(halves="path")
    attribute_batches(
        model, examples, options=options, fold=fold, batch_size=SEQUENCES, pad_id=0, correct_only=False
    )
    fold.result()


def seconds(function: Callable[[], None]) -> tuple[float, float]:
    """Wall time and processor time of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(model: LlamaForCausalLM, count: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Median times of both, measured alternately."""
    examples = rows(count)
    batches = []
    for start in range(0, count, SEQUENCES):
        batch = collate(examples[start : start + SEQUENCES], 0, encoder_decoder=False)
        batch["labels"] = torch.where(batch["labels"] == IGNORED, batch["input_ids"], batch["labels"])
        batches.append(batch)
    weights = list(block_parameters(model).values())
    times: dict[str, list[tuple[float, float]]] = {"plain": [], "attribution": []}
    for turn in range(rounds + 1):
        a = seconds(lambda: plain(model, batches, weights))  # type: ignore[arg-type]
        b = seconds(lambda: attribution(model, examples))
        if turn:  # the first round warms up
            times["plain"].append(a)
            times["attribution"].append(b)
        print(
            f"{count} sequences, round {turn}: plain {a[0]:.3f} s, attribution {b[0]:.3f} s", file=sys.stderr
        )
    return {key: tuple(map(statistics.median, zip(*value, strict=True))) for key, value in times.items()}  # type: ignore[misc]


def main() -> None:
    """Run, write result.json beside this file, and print it as the last line."""
    torch.set_num_threads(1)
    model = llama(384, 6, intermediate=1280, heads=6).eval()  # 12.4 M parameters in the blocks
    one, streaming = compare(model, SEQUENCES, ROUNDS), compare(model, 4 * SEQUENCES, 2)
    later = {kind: streaming[kind][0] - one[kind][0] for kind in one}
    result = {
        "ratio": round(one["attribution"][0] / one["plain"][0], 3),
        "target": 1.3,
        "ratio_processor_time": round(one["attribution"][1] / one["plain"][1], 3),
        "plain_seconds": round(one["plain"][0], 3),
        "attribution_seconds": round(one["attribution"][0], 3),
        "ratio_streaming": round(streaming["attribution"][0] / streaming["plain"][0], 3),
        "ratio_later_batch": round(later["attribution"] / later["plain"], 3),
        "block_parameters": sum(p.numel() for p in block_parameters(model).values()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    (Path(__file__).parent / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
