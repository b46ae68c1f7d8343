"""A run through random kills, and with damaged files: it ends as if nothing was, or names what is wrong."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from learning_data import SHORT, TOY, data_sets
from processes import Ended, holdfast
from tiny_runs import tiny_run

# Where a process dies: before one of the first so many calls of a function.
MOMENTS: dict[str, tuple[str, int]] = {
    "step": ("holdfast.training.bridge.completion_loss", 40),
    "save": ("os.replace", 60),
    "commit": ("os.rename", 3),
    "checkpoint": ("holdfast.training.steps.seal_checkpoint", 4),
    "evaluation": ("holdfast.evaluation.answers.collate_prompts", 10),
    "attribution": ("holdfast.attribution.passes.initial_lambda", 6),
    "generation": ("holdfast.evaluation.writing.greedy", 4),
}
OF_TIME = re.compile(r"seconds|date|time$|started|_at$|versions?$|environment|git|host|^learned$")


def written(output: Path) -> Path:
    """The configuration of a run that attributes, writes old rows and replays them; a few seconds."""
    values = tiny_run(output, replay={"memory": {"sampling": "generated", "count": 6}})
    values["tasks"] = {**values["tasks"], "order": ["head", "copy"]}
    # a logged loss is the mean since the last, or since the checkpoint that was gone on from
    steps = {"checkpoint_steps": 5, "log_steps": 5}
    values["training"] = {"epochs": 6, "batch_size": 8, "learning_rate": 3e-3, **steps}
    values["strategy"] = {"name": "attribution", "importance": {"name": "inputs", "samples": 16}}
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(values))
    return file


def contents(run: Path) -> dict[str, Any]:
    """Every file of a run, without what tells times, and the temporary one that a kill in writing leaves."""
    found: dict[str, Any] = {}
    for file in sorted(p for p in run.rglob("*") if p.is_file() and p.suffix != ".tmp"):
        name = str(file.relative_to(run))
        if file.suffix == ".safetensors":
            found[name] = {key: tensor.tolist() for key, tensor in load_file(file).items()}
        elif file.name == "manifest.json":
            found[name] = sorted(json.loads(file.read_text()))
        elif file.suffix == ".json" and name != "environment.json":  # that tells of each start
            found[name] = _timeless(json.loads(file.read_text()))
        elif file.suffix == ".jsonl":
            found[name] = file.read_text()
        elif file.suffix != ".yaml":  # has its own folder in it
            found[name] = None
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if not OF_TIME.search(key)}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def soaked(folder: Path, kills: int, seed: int = 0, tell: Any = None) -> Counter[str]:
    """Kill runs at random until so many kills are done, and let each end: it must be as one that lived.

    Returns
    -------
    Counter
        Kills by moment; `anywhere` is after random seconds, from outside.

    Raises
    ------
    AssertionError
        A run failed, or ended as another.
    """
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / "whole"
    lived, seconds = _run(written(whole), folder)
    assert lived.code == 0, lived.err
    expected, killed, run = contents(whole), Counter[str](), folder / "killed"
    while True:
        done = killed.total() >= kills
        moment = None if done else draw.choice([*MOMENTS, "anywhere"])
        ended, _ = _run(written(run), folder, moment, draw, seconds)
        if ended.code == -signal.SIGKILL:
            killed[str(moment)] += 1
            if tell is not None:
                tell(killed)
            continue
        assert ended.code == 0, (moment, ended.err)
        _same(contents(run), expected)
        killed["report"] += _report(run, folder)
        shutil.rmtree(run)
        if done:
            return killed


def _run(
    config: Path, cwd: Path, moment: str | None = None, draw: Any = None, seconds: float = 0.0
) -> tuple[Ended, float]:
    """How the run ended, and after what time."""
    die = after = None
    if moment == "anywhere":
        after = draw.uniform(0.3, max(seconds, 1))
    elif moment is not None:
        function, calls = MOMENTS[moment]
        die = (function, draw.randint(1, calls))
    start = time.monotonic()
    return holdfast("run", config, cwd=cwd, die=die, after=after), time.monotonic() - start


def _report(run: Path, cwd: Path) -> int:
    """Kill a report while it is written: there is none, and the next is whole."""
    page = cwd / "report.html"
    page.unlink(missing_ok=True)
    ended = holdfast("report", run, "--out", page, cwd=cwd, die=("os.replace", 1))
    assert ended.code == -signal.SIGKILL, ended.err
    assert not page.exists()
    ended = holdfast("report", run, "--out", page, cwd=cwd)
    assert ended.code == 0, ended.err
    assert page.read_text().rstrip().endswith("</html>")
    return 1


def _same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    other = [name for name, value in expected.items() if found[name] != value]
    assert not other, other


# The same of a month of ``holdfast learn``, of six steps.
OF_A_MONTH: dict[str, tuple[str, int]] = {
    "step": ("holdfast.training.bridge.completion_loss", 6),
    "save": ("os.replace", 12),
    "commit": ("os.rename", 1),
    "checkpoint": ("holdfast.training.steps.seal_checkpoint", 3),
    "evaluation": ("holdfast.learner.testing.evaluate_encoded", 2),
    "attribution": ("holdfast.attribution.passes.initial_lambda", 2),
}


def months(
    folder: Path, count: int, kills: int, seed: int = 0, tell: Any = None
) -> tuple[Counter[str], list[int], list[int]]:
    """``holdfast learn`` month after month, each call in a process of its own, with so many kills on the way.

    Each month's data set is learned into two folders: in one nothing is killed. What a killed call leaves,
    the same call goes on from, and after each month both folders must have the same.

    Returns
    -------
    kills : Counter
        By moment.
    memory, disk : list of int
        Bytes after each month: the most that the call had, and what the tensors in the folder take.

    Raises
    ------
    AssertionError
        A call failed, or the folders differ.
    """
    draw, killed = random.Random(seed), Counter[str]()
    memory: list[int] = []
    disk: list[int] = []
    seconds = 1.0
    whole, torn = folder / "whole", folder / "killed"
    for number in range(count):
        name = f"month{number:03}"
        data_sets(folder, name)

        def learn(skills: Path, die: Any = None, after: float | None = None, data: str = name) -> Ended:
            new = [*TOY, "strategy.importance.samples=8"] if not skills.exists() else []
            how = ["--skills", skills, *SHORT, "keep=last", *new]
            return holdfast("learn", f"{data}.jsonl", *how, cwd=folder, die=die, after=after)

        start = time.monotonic()
        lived = learn(whole)
        seconds = time.monotonic() - start
        assert lived.code == 0, lived.err
        due = round(kills * (number + 1) / count)
        while killed.total() < due:
            moment = draw.choice([*OF_A_MONTH, "anywhere"])
            if moment == "anywhere":
                ended = learn(torn, after=draw.uniform(0.3, max(seconds, 1)))
            else:
                function, calls = OF_A_MONTH[moment]
                ended = learn(torn, die=(function, draw.randint(1, calls)))
            assert ended.code in (0, -signal.SIGKILL), (name, moment, ended.err)
            if ended.code == 0:
                break  # it lived through that moment, and has learned the month
            killed[moment] += 1
        ended = learn(torn)
        assert ended.code == 0, (name, ended.err)
        _same(contents(torn), contents(whole))
        memory.append(lived.most)
        disk.append(sum(p.stat().st_size for p in whole.rglob("*.safetensors")))
        if tell is not None:
            tell(f"{name}: {dict(killed)}, {memory[-1] / 1e6:.1f} MB, {disk[-1]} bytes of tensors")
    return killed, memory, disk


DAMAGES = ("truncated", "flipped", "deleted", "another's")
_ASKED = "holdfast.learner.testing.evaluate_encoded"  # once a test set, when a task is trained and rated


def _run_to(place: Path, seed: int, die: bool = False) -> Ended:
    """To the end, or until the second task is trained; the base and the first were asked two sets each."""
    config = written(place)
    config.write_text(config.read_text().replace("seed: 0", f"seed: {seed}"))
    return holdfast("run", config, cwd=place.parent, die=(_ASKED, 5) if die else None)


def _learn_to(place: Path, seed: int, die: bool = False) -> Ended:
    """The same of a folder of skills, whose first task is learned if nothing is there."""
    data_sets(place.parent, "may", "june")
    how = ["--skills", place, *SHORT, "strategy.importance.name=inputs", "strategy.importance.samples=8"]
    how += ["replay.memory.count=4"]
    new = [*how, *TOY, f"seed={seed}"]
    ended = Ended(0, "", "")
    if not (place / "tasks/01-may").exists() and not (place / "tasks/02-june.partial").exists():
        ended = holdfast("learn", "may.jsonl", *new, cwd=place.parent)
    if ended.code == 0:
        ended = holdfast(
            "learn", "june.jsonl", *how[:2], *SHORT, cwd=place.parent, die=(_ASKED, 1) if die else None
        )
    return ended


KINDS: dict[str, Callable[..., Ended]] = {"run": _run_to, "skills": _learn_to}


def damaged(
    folder: Path, kind: str = "run", files: Sequence[str] | None = None, tell: Any = None
) -> dict[str, str]:
    """Damage each file of what was killed in its second task, in each way, and start it again.

    Parameters
    ----------
    kind : str
        A run directory (`run`), or a folder of `holdfast learn` (`skills`).

    Returns
    -------
    dict
        By damage and file: `as if nothing had been`, or the line in which the command says what is wrong.

    Raises
    ------
    AssertionError
        It ended as another, or failed without naming the file or its folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    to, place = KINDS[kind], folder / "here"
    ended = to(folder / "whole", 0)
    assert ended.code == 0, ended.err
    for seed, name in enumerate(("begun", "other")):
        ended = to(folder / name, seed, die=True)
        assert ended.code == -signal.SIGKILL, ended.err
    begun, expected, found = folder / "begun", contents(folder / "whole"), {}
    names = [str(p.relative_to(begun)) for p in sorted(begun.rglob("*")) if p.is_file()]
    for name in names if files is None else files:
        for how in DAMAGES:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(begun, place)
            if not damage(place / name, how, folder / "other" / name):
                continue
            ended = to(place, 0)
            if ended.code == 0:
                _same(contents(place), expected)
                became = "as if nothing had been"
            else:
                assert ended.code == 2, (how, name, ended.err)
                assert "Traceback" not in ended.err, (how, name, ended.err)
                told = " ".join(ended.err.split())
                assert Path(name).name in told or f"{place}" in told, (how, name, told)
                became = told[told.index("error:") :][:160]
            found[f"{how} {name}"] = became
            if tell is not None:
                tell(f"{how} {name}: {became}")
    return found


def damage(file: Path, how: str, other: Path) -> bool:
    """Whether the file is another now; `other` is what may take its place."""
    before = file.read_bytes()
    if how == "deleted":
        file.unlink()
        return True
    if how == "another's":
        if not other.is_file():
            return False
        file.write_bytes(other.read_bytes())
    elif how == "truncated":
        file.write_bytes(before[: len(before) // 2])
    else:
        middle = len(before) // 2
        turned = bytes(byte ^ 255 for byte in before[middle : middle + 1])
        file.write_bytes(before[:middle] + turned + before[middle + 1 :])
    return file.read_bytes() != before
