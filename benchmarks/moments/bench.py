"""What do the moments of inputs cost? `importance: inputs` against plain passes over the same tokens.

    python benchmarks/moments/bench.py [--quick]

Llama of hidden 512 in 4 blocks and of hidden 1024 in 8, intermediate 8/3 hidden, 512 tokens in the
vocabulary; batches of 8 sequences of 128 tokens, float32, one thread and two. Each batch of the moments is
followed by a plain forward and backward pass of it: logits of all tokens, their cross-entropy, gradients of
the block weights. The ratios are of the medians over batches. The first batch of an importance has two checks
more (a sample alone against the same in a batch, conservation), once for all its samples: `first`.

Floor. Plain: 6 W operations a token for maps of W weights in all. Moments by relevance: 4 W (forward, Lambda)
and I^2 for the half of each symmetric C; with all tokens alike 2 W and I^2. Over a Llama's block, the sum of
I^2 is 1.09 W: 0.85 and 0.52.

`ratio` is by relevance, hidden 512, one thread. The last line printed is the result as one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from holdfast.importance import compute_prior
from holdfast.models import block_parameters
from holdfast.tasks.encode import IGNORED, Encoded, collate

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file
from shapes import llama

SEQUENCES, TOKENS, ANSWER = 8, 128, 8
SHAPES = ((512, 4, 6), (1024, 8, 3))  # hidden, blocks, batches


class InTurn:
    """The progress of an importance: each batch of it is timed, and then a plain pass of the same batch."""

    def __init__(self, model: nn.Module, rows: list[Encoded]) -> None:
        self.model, self.rows = model, rows
        self.weights = list(block_parameters(model).values())
        self.moments: list[float] = []
        self.plain: list[float] = []
        self._since = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        if len(self.moments) == total // SEQUENCES:
            return  # all is told once more at the end
        self.moments.append(time.perf_counter() - self._since)
        batch = collate(self.rows[done - SEQUENCES : done], 0, encoder_decoder=False)
        batch["labels"] = torch.where(batch["labels"] == IGNORED, batch["input_ids"], batch["labels"])
        start = time.perf_counter()
        with torch.enable_grad():
            torch.autograd.grad(self.model(**batch, use_cache=False).loss, self.weights)
        self._since = time.perf_counter()
        self.plain.append(self._since - start)


def compare(hidden: int, blocks: int, batches: int, weighting: str) -> dict[str, float]:
    """Median seconds of a batch of both kinds, and their ratio."""
    ids = torch.randint(3, 512, (batches * SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(1))
    rows = [Encoded(row[:-ANSWER], row[-ANSWER:]) for row in ids.tolist()]
    options: dict[str, Any] = {"name": "inputs", "weighting": weighting, "samples": len(rows)}
    if weighting == "relevance":
        options["correct_only"] = False
    model = llama(hidden, blocks).eval()
    turns = InTurn(
        llama(hidden, blocks).eval(), rows
    )  # a copy: while a model is traced its weights are frozen
    compute_prior(model, rows, options, pad_id=0, progress=turns)
    moments, plain = statistics.median(turns.moments[1:]), statistics.median(turns.plain[1:])
    return {
        "ratio": round(moments / plain, 3),
        "first": round(turns.moments[0] / plain, 2),
        "moments_seconds": round(moments, 3),
        "plain_seconds": round(plain, 3),
    }


def main() -> None:
    """Run, write result.json beside this file, and print it as the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the smaller shape and one thread only")
    quick = parser.parse_args().quick
    found: dict[str, Any] = {}
    for hidden, blocks, batches in SHAPES[: 1 if quick else 2]:
        for threads in (1,) if quick else (1, 2):
            torch.set_num_threads(threads)
            for weighting in ("relevance", "uniform"):
                key = f"{weighting}, hidden {hidden}, {threads} thread{'s' * (threads > 1)}"
                found[key] = compare(hidden, blocks, batches, weighting)
                print(key, found[key], file=sys.stderr)
    result = {
        "ratio": found["relevance, hidden 512, 1 thread"]["ratio"],
        "target": 1.25,
        "ratio_uniform": found["uniform, hidden 512, 1 thread"]["ratio"],
        "target_uniform": 0.6,
        "of": found,
        "torch": torch.__version__,
    }
    if not quick:
        (Path(__file__).parent / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
