"""The first task along a stream: its test rows asked of the model after each task of a finished run.

    python benchmarks/evidence/first_task.py RUN... [--task NAME]

With `evaluation.scope: needed` a run asks each task right after it and at the end alone; its folder has the
model after every stage, so the rest can be asked later. One line a run, put into results/first_task.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM

from holdfast.config import validate
from holdfast.evaluation.evaluate import evaluate_task
from holdfast.learner import Learner
from holdfast.runner import RunConfig
from holdfast.tasks import build_stream

RESULTS = Path(__file__).parent / "results" / "first_task.json"


def ask(folder: Path, name: str | None) -> dict[str, Any]:
    """A task's accuracy after each stage, in percent, from its own on."""
    config = validate(RunConfig, yaml.safe_load((folder / "config.yaml").read_text()), str(folder))
    stream = list(build_stream(config.tasks, config.seed))
    task = stream[0] if name is None else next(task for task in stream if task.name == name)
    scores = []
    with Learner.load(folder) as learner:
        for stage in sorted((folder / "tasks").iterdir())[stream.index(task) :]:
            model = AutoModelForCausalLM.from_pretrained(stage / "model").eval()
            found = evaluate_task(model, learner.tokenizer, task, learner.encoder, options=config.evaluation)
            scores.append(round(found.score, 2))
            print(folder.name, stage.name, scores[-1], flush=True)
    label = json.loads((folder / "metrics.json").read_text())["label"]
    return {"row": label, "seed": config.seed, "task": task.name, "scores": scores}


def main() -> None:
    """Ask, merge, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--task", help="another one than the first")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for folder in arguments.runs:
        new = ask(folder, arguments.task)
        kept = [old for old in kept if any(old[k] != new[k] for k in ("row", "seed", "task"))] + [new]
        RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, kept)) + "\n]\n")


if __name__ == "__main__":
    main()
