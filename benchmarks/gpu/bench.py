"""What holding costs on a GPU: on the shapes of Llama-3.2-1B and 3B, bfloat16, sequences of 512 tokens.

    python benchmarks/gpu/bench.py [--shapes 1b 3b] [--out benchmarks/gpu/result.json]

Random weights of the real shapes, batches of 8 sequences of 512 tokens. Each figure is a median over rounds
in which the sides take turns (a held step comes after the free ones), between two synchronisations of the
device:

* `plain`: forward and backward of two batches' cross-entropy, gradients of the blocks' weights.
* `moments`, `moments_uniform`: second moments of inputs, tokens by relevance and alike, over `plain`.
* `attribution`: by weight, mean of squares (its fold keeps one value a weight), over `plain`.
* `step_by_weight`, `step_by_inputs`: a training step (`plain` and AdamW) with the anchor over one without. By
  inputs in the hold's coordinates; orthonormal bases are drawn, because finding the eigenvectors
  (`eigenvectors`: seconds of one matrix of each size, in float64) is done once a task.
* `peak_gb`: the most memory allocated in each part. `rows_a_second`: greedy answers of 16 tokens, 64 prompts
  of 128 at a time.

The last line printed is the result as one JSON object; `ratio` is `step_by_inputs` at the first shape.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

from holdfast.attribution import AttributionOptions, attribute_batches
from holdfast.hold import Anchor
from holdfast.hold.attach import hook
from holdfast.hold.basis import Whole
from holdfast.hold.inputs import Coordinates, Inputs
from holdfast.importance.aggregate import SquareMean
from holdfast.importance.inputs import InputsOptions, moments_of_inputs
from holdfast.importance.moments import eigenvectors
from holdfast.importance.prior import ImportancePrior
from holdfast.importance.registry import Inputs as Rated
from holdfast.models import block_parameters, input_dims
from holdfast.tasks.encode import Encoded

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file
from shapes import llama, train_blocks_only

ROUNDS, BATCHES, SEQUENCES, TOKENS, ANSWER = 4, 2, 8, 512, 16
SHAPES = {
    "1b": {"hidden": 2048, "blocks": 16, "intermediate": 8192, "heads": 32},
    "3b": {"hidden": 3072, "blocks": 28, "intermediate": 8192, "heads": 24},
    "tiny": {"hidden": 128, "blocks": 2, "intermediate": 256, "heads": 8},
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(shape: str) -> LlamaForCausalLM:
    """The model, in evaluation mode (there is no dropout), its blocks' matrices alone trained."""
    vocabulary = 512 if shape == "tiny" else 128_256
    with torch.device(DEVICE):
        model = llama(**SHAPES[shape], key_value_heads=8, vocabulary=vocabulary).to(torch.bfloat16)
    return train_blocks_only(model).eval()


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def in_turns(parts: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds, and peak gigabytes, of each part; one round before counts for nothing."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    peak = dict.fromkeys(parts, 0.0)
    for number in range(rounds + 1):
        for name, part in parts.items():
            if DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            synchronize()
            start = time.perf_counter()
            part()
            synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
            if DEVICE.type == "cuda":
                peak[name] = max(peak[name], torch.cuda.max_memory_allocated() / 1e9)
    return {name: statistics.median(times) for name, times in seconds.items()}, peak


def measure(shape: str) -> dict[str, Any]:
    """All figures of one shape."""
    model = build(shape)
    weights = block_parameters(model)
    generator = torch.Generator().manual_seed(1)
    count = BATCHES * SEQUENCES
    ids_BT = torch.randint(3, model.config.vocab_size, (count, TOKENS), generator=generator)
    batch_BT = ids_BT[:SEQUENCES].to(DEVICE)
    rows = [Encoded(ids[:-ANSWER].tolist(), ids[-ANSWER:].tolist()) for ids in ids_BT]

    def plain() -> None:
        model(input_ids=batch_BT, labels=batch_BT).loss.backward()

    def plain_batches() -> None:
        for _ in range(BATCHES):
            plain()
            model.zero_grad()

    def moments(weighting: str) -> Callable[[], None]:
        every = {"correct_only": False} if weighting == "relevance" else {}
        options = InputsOptions(weighting=weighting, samples=count, batch_size=SEQUENCES, **every)
        return lambda: moments_of_inputs(Rated(model, rows, weights, pad_id=0), options)

    def attribution() -> None:
        rules = AttributionOptions(rules="attnlrp", halves="none", target="all", of="logit")
        fold = SquareMean(per_weight=True)
        attribute_batches(
            model,
            rows,
            options=rules,
            fold=fold,
            parameters=weights,
            batch_size=SEQUENCES,
            pad_id=0,
            correct_only=False,
        )

    result: dict[str, Any] = {"weights": sum(p.numel() for p in weights.values())}
    parts = {
        "plain": plain_batches,
        "moments": moments("relevance"),
        "moments_uniform": moments("uniform"),
        "attribution": attribution,
    }
    seconds, peak = in_turns(parts, ROUNDS)
    result["seconds"], result["peak_gb"] = dict(seconds), dict(peak)
    for name in list(parts)[1:]:
        result[name] = seconds[name] / seconds["plain"]
    result |= steps(model, weights, plain, result)
    result["rows_a_second"] = generation(model, ids_BT)
    return result


def steps(
    model: nn.Module, weights: dict[str, nn.Parameter], plain: Callable[[], None], result: dict[str, Any]
) -> dict[str, float]:
    """Ratios of held training steps to plain ones."""
    found: dict[str, float] = {}
    for name, hold in (("step_by_weight", by_weight), ("step_by_inputs", by_inputs)):
        optimizer = torch.optim.AdamW(weights.values(), lr=1e-5)

        def step(optimizer: torch.optim.Optimizer = optimizer) -> None:
            plain()
            optimizer.step()
            optimizer.zero_grad()

        free = {"plain_step": step}
        seconds, peak = in_turns(free, ROUNDS)
        attached = hold(model, weights, optimizer)
        held, held_peak = in_turns({name: step}, ROUNDS)
        attached()
        found[name] = held[name] / seconds["plain_step"]
        result["seconds"] |= {"plain_step": seconds["plain_step"], **held}
        result["peak_gb"] |= {"plain_step": peak["plain_step"], **held_peak}
        del optimizer, step, free, attached
        gc.collect()
    return found


def by_weight(
    model: nn.Module, weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> Callable[[], None]:
    """Attach an anchor of a prior by weight; what is returned takes it off."""
    prior = ImportancePrior(
        {n: torch.rand(p.shape, device=p.device, dtype=p.dtype) for n, p in weights.items()}
    )
    return Anchor(prior, strength=600).attach(model, optimizer).remove


def by_inputs(
    model: nn.Module, weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> Callable[[], None]:
    """Let the optimizer step in coordinates of random bases, and pull; what is returned ends it."""
    dims = input_dims(model)
    bases: dict[int, torch.Tensor] = {}
    rows: list[torch.Tensor] = []
    for name, p in weights.items():
        size = p.shape[dims[name]]
        if size not in bases:
            bases[size] = torch.linalg.qr(torch.randn(size, size, device=p.device)).Q
        rows.append(bases[size].clone())  # each map has its own in use
    shares = [torch.rand(len(u), device=u.device) for u in rows]
    operator = Inputs(shares, [Whole(u) for u in rows], [dims[name] for name in weights])
    references = [p.detach().clone() for p in weights.values()]
    coordinates = Coordinates(list(weights.values()), references, operator)

    def leave() -> None:
        coordinates.stepped()
        coordinates.leave(operator.passed(1e-3))

    return hook(optimizer, coordinates.enter, leave, "the bench").remove


def generation(model: Any, ids_BT: torch.Tensor, batch: int = 64) -> float:
    """Greedy answers a second."""
    ids = ids_BT.reshape(-1)[: batch * 128].reshape(-1, 128)
    if len(ids) < batch:
        ids = ids.repeat(batch, 1)[:batch]
    ids = ids.to(DEVICE)
    seconds, _ = in_turns(
        {
            "generate": lambda: model.generate(
                ids, max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0
            )
        },
        3,
    )
    return len(ids) / seconds["generate"]


def main() -> None:
    """Measure, write the result, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["1b", "3b"])
    parser.add_argument("--eigenvectors", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("result.json"))
    arguments = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "gpu", "torch": torch.__version__}
    result["device"] = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    for shape in arguments.shapes:
        result[shape] = measure(shape)
        result["ratio"] = result[arguments.shapes[0]]["step_by_inputs"]
        print(shape, json.dumps(result[shape]), flush=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    if arguments.eigenvectors:
        result["eigenvectors"] = {}
        for size in (2048, 3072, 8192) if DEVICE.type == "cuda" else (512,):
            half = torch.randn(size, size)
            synchronize()
            start = time.perf_counter()
            eigenvectors(half @ half.t())
            synchronize()
            result["eigenvectors"][size] = time.perf_counter() - start
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
