"""A mixture of experts: what is held by the inputs of linear maps, and beside them weight by weight.

    python benchmarks/evidence/experts_toy.py [--output runs/evidence/experts-toy] [--seed 0] [--lora]

A Mixtral of 2 layers, width 64, 4 experts, two of them a token, learns three toy tasks together as its base,
then three others one after another (400 rows, 6 epochs at 2e-3). Experts are no linear maps (`experts`: their
share of the blocks' weights). `--lora` trains rank 8 on all linear layers, which in PEFT are experts too, for
8 epochs at 5e-3. About 4 minutes of one core. The last line printed is the result as one JSON object.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from holdfast.config import validate
from holdfast.models import save_model
from holdfast.runner import RunConfig, run
from holdfast.tasks import toy_tokenizer

BASE, STREAM = ["copy", "flip", "next"], ["roll", "most", "lang"]
ROWS: dict[str, Any] = {
    "sequential": "sequential",
    "fisher, every weight": {"name": "attribution", "importance": "fisher"},
    "inputs alone": {"name": "attribution", "others": "none"},
    "inputs, the others by fisher": {"name": "attribution"},
    "inputs, the others by lrp": {"name": "attribution", "others": "lrp"},
    "control: spectrum and others permuted": {"name": "attribution", "control": "permuted"},
}
LORA = {"r": 8, "alpha": 16, "target_modules": "all-linear"}
WEAK = {"name": "anchor", "pull": 5}
LORA_ROWS: dict[str, Any] = {
    name: {**how, "mechanism": WEAK} if isinstance(how, dict) and "importance" not in how else how
    for name, how in ROWS.items()
} | {
    "inputs, pull 24": {"name": "attribution", "mechanism": {"name": "anchor", "pull": 24}},
}


def random_base(folder: Path) -> float:
    """Save a random Mixtral; the share of its blocks' weights that experts have."""
    tokenizer = toy_tokenizer()
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=4,
        initializer_range=0.12,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model = MixtralForCausalLM(config)
    save_model(model, tokenizer, folder)
    sizes = {name: p.numel() for name, p in model.named_parameters() if ".layers." in name and p.dim() > 1}
    return sum(n for name, n in sizes.items() if ".experts." in name) / sum(sizes.values())


def learn(
    output: Path,
    path: Path,
    order: list[str],
    strategy: Any,
    seed: int,
    *,
    epochs: int,
    rate: float = 2e-3,
    lora: Any = None,
) -> dict[str, Any]:
    """One run of the tasks."""
    values = {
        "output": str(output),
        "seed": seed,
        "threads": 1,
        "model": {"path": str(path), "lora": lora},
        "tasks": {"source": "toy", "order": order, "size": 5, "train_rows": 400, "test_rows": 100},
        "training": {"epochs": epochs, "batch_size": 32, "learning_rate": rate},
        "evaluation": {"scope": "needed", "zero_shot": False},
        "strategy": strategy,
    }
    return run(validate(RunConfig, values, source="experts_toy"))


def main() -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/evidence/experts-toy"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*not held")  # what `others: none` is for
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "experts": round(random_base(arguments.output / "random"), 3),
        "seed": arguments.seed,
    }
    joint = arguments.output / "base"
    learn(joint, arguments.output / "random", BASE, "multitask", arguments.seed, epochs=12)
    how: Any = {"epochs": 8, "rate": 5e-3, "lora": LORA} if arguments.lora else {"epochs": 6}
    for number, (name, strategy) in enumerate((LORA_ROWS if arguments.lora else ROWS).items()):
        folder = arguments.output / f"{'lora-' * arguments.lora}{number}"
        base = joint / "tasks" / "01-joint" / "model"
        found = learn(folder, base, STREAM, strategy, arguments.seed, **how)
        result[name] = {key: round(found[key], 1) for key in ("ap", "bwt", "learning_accuracy")}
        print(name, result[name], flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
