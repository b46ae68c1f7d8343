"""Put finished runs of a grid into results/single_runs.json, each with what moved and the machine.

    python benchmarks/evidence/collect.py GRID RUN...

GRID is the file's name, such as fifteen_base4m.yaml; a RUN is a cell's folder, wherever it was run. A run
that is in the file already is replaced. `holdfast compare GRID` writes a whole grid's results itself; this is
for cells that were run alone.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import yaml

from holdfast.report.moved_figures import moved_and_lost
from holdfast.report.read import RunRecord, read

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "single_runs.json"
KEYS = ("grid", "row", "seed", "rows", "order")


def record(grid: str, folder: Path) -> dict[str, Any]:
    """What is kept of a run: metrics, of which rows, old outputs' movement, and where it ran."""
    run = read(folder)
    assert isinstance(run, RunRecord)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    environment = json.loads((folder / "environment.json").read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    if not metrics["finished"]:
        raise SystemExit(f"{folder}: the run is not finished")
    usual = yaml.safe_load((HERE / grid).read_text())["base"]["tasks"]["order"] == config["tasks"]["order"]
    torch = environment["packages"]["torch"].partition("+")[0]
    return {
        "grid": grid,
        "row": metrics["label"],
        "seed": config["seed"],
        "rows": config["tasks"].get("test_split") or "test",
        "order": "" if usual else " ".join(metrics["tasks"]),
        "device": environment["device"],
        "machine": f"{os.cpu_count()} cores, torch {torch}",
        "moved": [point._asdict() for point in moved_and_lost(run)],
        "metrics": metrics,
    }


def key(entry: dict[str, Any]) -> tuple[Any, ...]:
    """What makes it another run."""
    defaults = {"rows": "test", "order": ""}
    return tuple(entry.get(name, defaults.get(name)) for name in KEYS)


def main() -> None:
    """Read, merge, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    arguments = parser.parse_args()
    kept = {key(entry): entry for entry in json.loads(RESULTS.read_text())}
    for folder in arguments.runs:
        entry = record(arguments.grid, folder)
        kept[key(entry)] = entry
        scores = {name: entry["metrics"][name] for name in ("ap", "bwt", "learning_accuracy")}
        print(entry["row"], entry["seed"], entry["rows"], entry["order"], scores)
    lines = ",\n".join(json.dumps(entry) for entry in kept.values())
    RESULTS.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
