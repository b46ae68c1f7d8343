"""holdfast's sequential run against the same training as a bare Trainer script: whole processes, alternating.

Both load a Llama of base-4m's shapes (random weights, 8,192-token embedding), train its block matrices on two
tasks of 320 rows of about 128 tokens for 2 epochs, and save the model after each task. holdfast also writes
checkpoints that a resume needs, digests, and tests 8 rows a task; that is the overhead that is measured. It
computes logits at completion positions only, which the bare script, like most, doesn't.

    python benchmarks/overhead/bench.py [--rounds 3] [--threads 2]

The last line is one JSON object; ``ratio`` is the median of holdfast's seconds over the bare script's, pair
by pair. The floor is 1: the same arithmetic.
"""

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # run as a file
CONFIG = """
model: {{path: "{model}", trainable: blocks}}
tasks: {{source: jsonl, path: "{data}", order: [a, b]}}
template: {{prompt: "{{bos}}{{prompt}}"}}
training: {{epochs: 2, batch_size: 16, learning_rate: 1e-3}}
strategy: sequential
evaluation: {{scope: needed, zero_shot: false, max_new_tokens: 4}}
threads: {threads}
"""


def prepare(folder: Path) -> tuple[Path, Path]:
    from shapes import base_4m_shapes

    from holdfast.tasks import toy_tokenizer

    tokenizer = toy_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    base_4m_shapes(max_position_embeddings=1024, **special).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rng = random.Random(0)
    for task in "ab":
        (folder / "data" / task).mkdir(parents=True)
        for part, count in (("train", 320), ("test", 8)):
            with (folder / "data" / task / f"{part}.jsonl").open("w") as file:
                for _ in range(count):
                    text = "".join(rng.choices("abcdefgh", k=rng.randint(110, 128)))
                    file.write(json.dumps({"prompt": text, "completion": text[: 2 + (task == "b")]}) + "\n")
    return folder / "model", folder / "data"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    pairs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = prepare(folder)
        config = folder / "run.yaml"
        config.write_text(CONFIG.format(model=model, data=data, threads=args.threads))
        ours = [sys.executable, "-m", "holdfast", "run", str(config), f"output={folder / 'ours'}"]
        bare = [
            sys.executable,
            str(HERE / "bare.py"),
            str(model),
            str(data),
            str(folder / "bare"),
            str(args.threads),
        ]
        for number in range(args.rounds + 1):
            seconds = []
            for command, out in ((ours, "ours"), (bare, "bare")):
                shutil.rmtree(folder / out, ignore_errors=True)
                started = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                seconds.append(time.perf_counter() - started)
            if number:  # the first pair warms the disk cache
                pairs.append(seconds)
                print(
                    f"round {number}: holdfast {seconds[0]:.1f} s, bare Trainer {seconds[1]:.1f} s",
                    flush=True,
                )
    result = {
        "ratio": round(statistics.median(a / b for a, b in pairs), 4),
        "holdfast_seconds": [round(a, 2) for a, _ in pairs],
        "bare_seconds": [round(b, 2) for _, b in pairs],
        "threads": args.threads,
    }
    (HERE / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
