"""A hundred tasks: neither memory nor the weights on disk grow with their number."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from pathlib import Path

import pytest
import torch

from holdfast.learner import Learner
from holdfast.tasks import toy_tokenizer
from learning_data import rows_of, same, weights_in
from tiny_models import tiny_model

TRAINING = {"max_steps": 8, "batch_size": 8, "learning_rate": 1e-3, "checkpoint_steps": 100}


def resident() -> int:
    """Bytes of memory of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def bytes_of(folder: Path) -> tuple[int, int]:
    """Of tensors, and of all else."""
    sizes = {p: p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    tensors = sum(size for p, size in sizes.items() if p.suffix == ".safetensors")
    return tensors, sum(sizes.values()) - tensors


@pytest.mark.slow
def test_a_hundred_tasks_take_no_more_memory_and_disk_than_ten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strategy = {"name": "attribution", "importance": {"name": "inputs", "samples": 8}}
    folder = tmp_path / "s"
    sections = {"training": TRAINING, "keep": "last"}
    learner = Learner(tiny_model("llama"), toy_tokenizer(), strategy, folder=folder, **sections)
    memory, disk, seconds = [], [], []
    for number in range(100):
        name, start = f"task{number}", time.perf_counter()
        with learner.task(name, rows_of(name, 16), rows_of(f"{name} test", 1) if number < 5 else ()) as stage:
            stage.train()
        seconds.append(time.perf_counter() - start)
        memory.append(resident())
        disk.append(bytes_of(folder))
    with capsys.disabled():
        for what, values in (("resident", memory), ("disk", disk), ("seconds", seconds)):
            shown = [values[i] if what != "seconds" else round(values[i], 2) for i in (1, 9, 19, 49, 99)]
            print(f"\n{what} after 2, 10, 20, 50, 100 tasks: {shown}")
    assert len({tensors for tensors, _ in disk[1:]}) == 1
    assert disk[-1][1] - disk[9][1] < 90 * 20_000, "a task leaves more than its records"
    assert memory[-1] - memory[9] < 4e6, "a task leaves something in memory"
    assert statistics.median(seconds[-10:]) < 1.5 * statistics.median(seconds[5:15])
    learner.close()
    again = Learner.load(folder, tiny_model("llama"), toy_tokenizer())
    assert len(again.learned) == 100
    last = weights_in(folder / "tasks" / "100-task99")
    assert same(last, {n: p.detach() for n, p in again.model.named_parameters() if n in last})
    assert all(torch.isfinite(p).all() for p in again.model.parameters())
