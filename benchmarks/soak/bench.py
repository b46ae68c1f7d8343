"""Does a run survive? Fifty random SIGKILLs, every file damaged in four ways, and years of `holdfast learn`.

    python benchmarks/soak/bench.py [--kills 50] [--months 100] [--seed 0] [--only kills|damage|months]

A tiny run (two toy tasks, default hold by inputs, a memory that the model writes) is killed at random: at
a step, while a file is put in its place, while a stage is committed, at a checkpoint, in evaluation,
attribution, generation, a report, or after random seconds wherever it is; then the same command goes on.
Every run that ends must have what one that was never killed has, file by file. Then a run that died in
its second task, and a folder of `holdfast learn`, gets each of its files truncated, a byte flipped, deleted,
or replaced by another run's: the same command must end with the same files, or name what is wrong. Last,
a hundred data sets are learned month after month by `holdfast learn`, each call a process, with twice as many
kills asked for: after each month the folder must have what one has in which nothing was killed.

The last line is one JSON object. It stops at the first run that ends as another.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))  # run as a file; the tests have the short form
from soak import KINDS, damaged, months, soaked


def main() -> None:
    """Run, write result.json beside this file, and print it as the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--months", type=int, default=100)
    parser.add_argument("--only", choices=["kills", "damage", "months"])
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    start = time.perf_counter()
    killed: Counter[str] = Counter()
    told: dict[str, str] = {}
    of_months: dict[str, object] = {}

    def tell(what: object) -> None:
        print(what, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        if options.only in (None, "kills"):
            killed = soaked(Path(folder) / "kills", options.kills, options.seed, tell)
        if options.only in (None, "damage"):
            for kind in KINDS:
                of_kind = damaged(Path(folder) / kind, kind, tell=tell)
                told |= {f"{kind}: {what}": became for what, became in of_kind.items()}
        if options.only in (None, "months"):
            place = Path(folder) / "months"
            place.mkdir()
            died, memory, disk = months(place, options.months, 2 * options.months, options.seed, tell)
            of_months = {
                "count": options.months,
                "kills": dict(sorted(died.items())),
                "total": died.total(),
                "memory_MB": [round(memory[i] / 1e6, 1) for i in (1, len(memory) // 2, -1)],
                "tensors_bytes": [disk[i] for i in (1, len(disk) // 2, -1)],
            }
    result = {
        "kills": dict(sorted(killed.items())),
        "total": killed.total(),
        "damages": len(told),
        "refused": sum(became.startswith("error") for became in told.values()),
        "months": of_months,
        "seconds": round(time.perf_counter() - start),
    }
    if options.only is None:
        Path(__file__).with_name("result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
