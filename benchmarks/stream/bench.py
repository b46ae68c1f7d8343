"""What does a whole run cost? Five toy tasks by the default strategy against the same run without a hold.

    python benchmarks/stream/bench.py [--rounds 3]

A toy Llama (hidden 128, 4 blocks) learns five string tasks, 500 rows and 4 epochs each, one thread. In
each round every run is made once, one after another within one process; processor time is compared, which
other work disturbs less. `ratio` is the median over rounds of the default's seconds (hold by inputs, 128
samples a task) over sequential training's. `ratio_generated` is the same of replay whose 100 rows a task
the model writes itself over replay of 100 kept rows a task: as many rows are trained on, and the model
learns its prompts too, in order to write them.

Floor. A step has 32 rows of about 20 tokens, T = 640, and maps have I = 190 inputs on average: the
two rotations of the hold's coordinates are 2 I / 3 T = 0.20 of the maps' products, once a step. Samples: 128
of 2,000 that are trained on, at 0.85 of a pass each, 0.05. With the 500 tokens a row that are usual, both
are 25 times less.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from holdfast.config import validate
from holdfast.runner import RunConfig, run

RUNS: dict[str, Any] = {
    "sequential": {"name": "sequential"},
    "default": {"name": "attribution"},
    "kept rows": {"name": "replay", "memory": {"count": 100}, "ratio": 0.4},
    "generated rows": {"name": "replay", "memory": {"sampling": "generated", "count": 100}, "ratio": 0.4},
}


def seconds(strategy: Any, folder: Path) -> float:
    """Of processor time, of one run."""
    values = {
        "output": str(folder),
        "threads": 1,
        "model": {"toy": True, "hidden": 128, "layers": 4},
        "tasks": {
            "source": "toy",
            "order": ["copy", "next", "head", "swap", "flip"],
            "train_rows": 500,
            "test_rows": 50,
        },
        "training": {"epochs": 4, "batch_size": 32, "learning_rate": 2e-3},
        "evaluation": {"scope": "needed", "zero_shot": False},
        "strategy": strategy,
    }
    start = time.process_time()
    run(validate(RunConfig, values, source="benchmark"))
    return time.process_time() - start


def main() -> None:
    """Run, write result.json beside this file, and print it as the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    times: dict[str, list[float]] = {name: [] for name in RUNS}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            for name, strategy in RUNS.items():
                times[name].append(seconds(strategy, Path(folder) / f"{turn} {name}"))
                print(f"round {turn}: {name} {times[name][-1]:.1f} s", file=sys.stderr)

    def ratio(name: str, other: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times[name], times[other], strict=True)), 3)

    result = {
        "ratio": ratio("default", "sequential"),
        "target": 1.25,
        "ratio_generated": ratio("generated rows", "kept rows"),
        "target_generated": 1.3,
        "seconds": {name: [round(t, 1) for t in took] for name, took in times.items()},
    }
    (Path(__file__).parent / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
