"""Do two tasks use the same inputs? A's figure 1 in the space of inputs, of finished runs.

    python benchmarks/evidence/overlap.py RUN FIRST...

RUN learned several tasks one after another; each FIRST is a run of the same base and seed in another order,
whose first task is one of them. What a run's first task left is the prior of a model of that task alone (A's
single-task setting); the priors of RUN's later tasks are of the model that went on. For each pair of tasks of
which both are known: the overlap of the leading tenth of each map's directions (0.1 by chance) and the
correlation of the second moments (0 by chance), mean over blocks. The result goes into results/overlap.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from holdfast import ImportancePrior
from holdfast.importance.agreement import agreement

RESULTS = Path(__file__).parent / "results" / "overlap.json"


def priors(run: Path) -> dict[str, ImportancePrior]:
    """Of each task, in the order learned."""
    stages = sorted((run / "tasks").iterdir())
    return {stage.name.partition("-")[2]: ImportancePrior.load(stage / "prior") for stage in stages}


def compare(first: ImportancePrior, second: ImportancePrior) -> dict[str, float]:
    """Mean over blocks."""
    found = agreement(first, second).values()
    parts = {"overlap": [a.overlap for a in found], "correlation": [a.correlation for a in found]}
    return {name: round(sum(values) / len(values), 3) for name, values in parts.items()}


def main() -> None:
    """Compare, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("firsts", type=Path, nargs="*", metavar="FIRST")
    arguments = parser.parse_args()
    sequential = priors(arguments.run)
    alone = dict([next(iter(priors(run).items())) for run in (arguments.run, *arguments.firsts)])
    rows = []
    for a, b in itertools.combinations(sequential, 2):
        pair: dict[str, object] = {"tasks": [a, b], "sequential": compare(sequential[a], sequential[b])}
        if a in alone and b in alone:
            pair["single_task"] = compare(alone[a], alone[b])
        rows.append(pair)
        print(json.dumps(pair), flush=True)
    for name in alone:
        if name != next(iter(sequential)):
            same = {
                "tasks": [name, name],
                "single_task_and_sequential": compare(alone[name], sequential[name]),
            }
            rows.append(same)
            print(json.dumps(same), flush=True)
    RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
