"""General ability of finished runs: instructions that no task of theirs taught, before and after.

    python benchmarks/evidence/general_text.py RUN... [--data FOLDER] [--rows 20] [--out FILE]

Each folder of `--data` (default ../shared/benchmarks/superni) is a task of instructions with answers; the
first test rows of each are asked of the base and of what each run made of it, framed as the run frames its
own. `nll` is the mean −ln p of the true answers' tokens (nats, each token alike), `rouge_l` the mean score of
greedy answers of at most 64 tokens, 0 to 100. A base that several runs share is asked once. The last line
printed is the result as one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

import torch

from holdfast.evaluation.evaluate import EvaluationOptions, evaluate_task
from holdfast.learner import Learner
from holdfast.tasks import Task, build_stream
from holdfast.tasks.jsonl import JsonlSource

LONGEST = 64


def read(data: Path, rows: int) -> list[Task]:
    """The tasks, with so many test rows each."""
    return list(build_stream(JsonlSource(path=data, test_rows=rows, train_rows=1, bad_rows="skip")))


def ask(model: object, learner: Learner, tasks: list[Task]) -> dict[str, float]:
    """Mean −ln p of the true answers' tokens, and ROUGE-L of the model's own."""
    options = EvaluationOptions(max_new_tokens=LONGEST)
    joint = Task("all", tasks[0].train, tuple(row for task in tasks for row in task.test))
    found = {}
    for metric in ("perplexity", "rouge_l"):
        task = dataclasses.replace(joint, metric=metric)
        found[metric] = evaluate_task(model, learner.tokenizer, task, learner.encoder, options=options).score
    return {
        "nll": round(-math.log(found["perplexity"] / 100), 4),
        "rouge_l": round(found["rouge_l"], 2),
    }


def main() -> None:
    """Ask, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--data", type=Path, default=Path("../shared/benchmarks/superni"))
    parser.add_argument("--rows", type=int, default=20, help="test rows of each task")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    tasks = read(arguments.data, arguments.rows)
    bases: dict[str, dict[str, float]] = {}
    result: dict[str, object] = {"rows": sum(len(task.test) for task in tasks), "bases": bases, "runs": {}}
    for folder in arguments.runs:
        with Learner.load(folder) as learner:
            if torch.cuda.is_available():
                learner.model.cuda()
            path = str(learner.config.model.path)
            if path not in bases:
                with learner.state.base.answering(learner.model) as base:
                    bases[path] = ask(base, learner, tasks)
                learner.state.base.free()
            result["runs"][str(folder)] = ask(learner.route(), learner, tasks)
            print(folder, bases[path], result["runs"][str(folder)], flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
