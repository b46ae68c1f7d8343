"""What holds for every registered strategy: three tasks, two architectures, a kill, and true declarations."""

from __future__ import annotations

import importlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from holdfast.config import Options, validate
from holdfast.importance import ImportancePrior
from holdfast.models import ModelOptions, is_encoder_decoder, load_model
from holdfast.runner import RunConfig, run
from holdfast.strategies import build_strategy
from holdfast.tasks import toy_suite
from holdfast.tasks.task import Example, TaskStream
from holdfast.training.bridge import Bridge
from kills import Killed, dying
from strategy_runs import METHODS, needs_lora, options_of
from tiny_runs import tiny_run
from tiny_t5 import write_tiny_t5

runner = importlib.import_module("holdfast.runner.loop")
learner = importlib.import_module("holdfast.learner.learner")
testing = importlib.import_module("holdfast.learner.testing")
TASKS = ["copy", "flip", "head"]
KINDS = ["causal", "encoder-decoder"]


# a task: 2 epochs of 3 batches, and a checkpoint in the middle of the second
STEPS = 6
SAVED = 4


@dataclass(frozen=True)
class Finished:
    """A run's directory, what an answer takes after each stage (first: before any), and what was read again.

    Attributes
    ----------
    operations : list of int
        Multiplications of a forward pass.
    read_again : list of str
        Tasks whose training rows were read in a stage of other tasks.
    """

    folder: Path
    operations: list[int]
    read_again: list[str]

    @property
    def stages(self) -> list[Path]:
        return sorted((self.folder / "tasks").iterdir())


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def config_of(t5: Path) -> Callable[..., RunConfig]:
    """The configuration of a run of 3 × `STEPS`; with LoRA for the methods that are made for it."""

    def make(name: str, kind: str, output: Path, **training: Any) -> RunConfig:
        training = {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, **training}
        values = tiny_run(output, strategy=options_of(name), training=training)
        values["tasks"] = {**values["tasks"], "train_rows": 4 * STEPS}
        assert values["tasks"]["order"] == TASKS
        if kind == "encoder-decoder":
            values |= {"model": {"path": str(t5)}, "template": {"prompt": "{prompt}{eos}"}}
        if "writing" in options_of(name):  # what has learned next to nothing goes on to the limit
            values["template"] = {
                **values.get("template", {}),
                "max_prompt_tokens": 16,
                "max_completion_tokens": 8,
            }
        if needs_lora(name):
            values["model"] = {**values["model"], "lora": {"r": 4}}
        return validate(RunConfig, values, source="test")

    return make


@pytest.fixture(scope="module")
def finished(config_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Finished]:
    """An uninterrupted run, made once for each strategy and architecture."""
    made: dict[tuple[str, str], Finished] = {}

    def make(name: str, kind: str) -> Finished:
        if (name, kind) not in made:
            folder = tmp_path_factory.mktemp("run") / "run"
            with pytest.MonkeyPatch.context() as patch:
                # a method that knows the task may answer early ones more cheaply: the dearest is meant
                tasks = len(TASKS) if METHODS[name].needs_task_identity else 1
                counted, read_again = count_operations(patch, len(TASKS) // tasks), guard(patch)
                run(config_of(name, kind, folder))
            rounds = [counted[i : i + tasks] for i in range(0, len(counted), tasks)]
            made[name, kind] = Finished(folder, [max(costs) for costs in rounds], read_again)
        return made[name, kind]

    return make


def count_operations(patch: pytest.MonkeyPatch, each: int) -> list[int]:
    """Count the multiplications of one forward pass of each `each`-th model that is asked."""
    original, asked, counted = testing.evaluate_encoded, itertools.count(), []

    def counting(model: Any, *args: Any, **kwargs: Any) -> Any:
        if next(asked) % each:
            return original(model, *args, **kwargs)
        ids = torch.full((1, 12), 5)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if is_encoder_decoder(model):
            batch["decoder_input_ids"] = ids[:, :3]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**batch)
        counted.append(counter.get_total_flops())
        return original(model, *args, **kwargs)

    patch.setattr(testing, "evaluate_encoded", counting)
    return counted


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "model").glob("*.safetensors")))


def state_in(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / "strategy.safetensors"
    return load_file(file) if file.exists() else {}


def values_in(folder: Path) -> dict[str, Any]:
    """Without the time that something took."""
    values = json.loads((folder / "strategy.json").read_text())
    return {key: value for key, value in values.items() if key != "seconds"}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_strategy_learns_a_stream_and_leaves_a_whole_run_directory(
    name: str, kind: str, finished: Any, config_of: Any
) -> None:
    folder = finished(name, kind).folder
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["finished"]
    assert metrics["strategy"] == METHODS[name].name
    assert metrics["tasks"] == TASKS
    assert metrics["knows_task"] is METHODS[name].needs_task_identity
    assert metrics["rehearses"] is not METHODS[name].rehearsal_free
    assert len(metrics["matrix"]) == 4
    assert None not in metrics["matrix"][0] + metrics["matrix"][-1]
    assert metrics["ap"] is not None
    stages = build_strategy(METHODS[name].Options()).stages(toy_suite(TASKS, 4, 4))
    for number, stage in enumerate(stages, start=1):
        part = folder / "tasks" / f"{number:02d}-{stage.name}"
        steps = STEPS * len(stage.tasks) if METHODS[name].strategy.trains else 0
        more = not METHODS[name].rehearsal_free or METHODS[name].writes
        assert json.loads((part / "training.json").read_text())["steps"] == steps or more
        assert {p.stem for p in part.glob("predictions/*.jsonl")} == set(TASKS)
        if (part / "model" / "adapter_config.json").exists() and kind == "causal":
            continue  # the toy model is made on the spot, so its adapters have no base in a folder
        again, _ = load_model(ModelOptions(path=str(part / "model")))
        if number == len(stages):
            assert sum(p.numel() for p in again.parameters()) == metrics["parameters"]
        if (part / "prior").exists():
            ImportancePrior.load(part / "prior").check_fits(again)


@pytest.mark.parametrize("kind", ["causal", pytest.param("encoder-decoder", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [n for n in sorted(METHODS) if METHODS[n].strategy.trains])
def test_strategy_killed_in_the_middle_ends_bit_identical(
    name: str, kind: str, finished: Any, config_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, config = finished(name, kind), config_of(name, kind, tmp_path / "broken", checkpoint_steps=SAVED)
    with monkeypatch.context() as patch:
        # in the second task (of joint training: in its second epoch), after a checkpoint
        patch.setattr(Bridge, "training_step", dying(Bridge.training_step, STEPS + SAVED + 1))
        with pytest.raises(Killed):
            run(config)
    assert list((tmp_path / "broken").rglob("checkpoint-*")), "there was something to go on from"
    assert not (tmp_path / "broken" / "tasks" / whole.stages[-1].name).exists()
    run(config)
    for stage in whole.stages:
        again = tmp_path / "broken" / "tasks" / stage.name
        assert same(weights_in(stage), weights_in(again))
        assert same(state_in(stage), state_in(again))
        assert values_in(stage) == values_in(again)
        for file in stage.glob("predictions/*.jsonl"):
            assert file.read_text() == (again / "predictions" / file.name).read_text()
    matrices = [
        json.loads((f / "metrics.json").read_text())["matrix"] for f in (whole.folder, tmp_path / "broken")
    ]
    assert matrices[0] == matrices[1]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_strategys_state_survives_a_round_trip(name: str, finished: Any) -> None:
    folder = finished(name, "causal").stages[-1]
    tensors, values = state_in(folder), json.loads((folder / "strategy.json").read_text())
    strategy = build_strategy(validate(METHODS[name].Options, options_of(name), source="test"))
    strategy.load_state_dict(tensors, values)
    tensors_again, values_again = strategy.state_dict()
    assert same(tensors, dict(tensors_again))
    assert values_again == values


# what strategies declare


@pytest.mark.parametrize("name", sorted(METHODS))
def test_strategy_declares_what_a_user_must_know(name: str) -> None:
    cls = METHODS[name]
    assert name.startswith(cls.name)
    assert len(cls.summary) > 10
    assert cls.paper
    assert cls.__doc__
    assert {cls.state, cls.inference} <= {"none", "constant", "per task"}
    assert issubclass(cls.Options, Options)
    assert build_strategy(cls.Options()).options == cls.Options(), "every option has a default"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_declared_state_is_what_is_kept_between_tasks(name: str, kind: str, finished: Any) -> None:
    stages, declared = finished(name, kind).stages, METHODS[name].state
    models = [sum(t.nbytes for t in weights_in(stage).values()) for stage in stages]
    kept = [sum(t.nbytes for t in state_in(stage).values()) for stage in stages]
    values = [os.path.getsize(stage / "strategy.json") for stage in stages]
    if declared == "none":
        assert kept == [0] * len(stages)
        assert all(json.loads((stage / "strategy.json").read_text()) == {} for stage in stages)
        assert len(set(models)) == 1
        return
    sizes = [k + v + m - models[0] for k, v, m in zip(kept, values, models, strict=True)]
    first, second = sizes[1] - sizes[0], sizes[2] - sizes[1]
    if declared == "constant":
        assert sizes[0] > 4, "something is kept"
        assert second < 0.02 * sizes[1], "as much after three tasks as after two"
    else:
        assert declared == "per task"
        assert first > 100
        assert second == pytest.approx(first, rel=0.3), "as much more with the third task as with the second"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_declared_cost_of_an_answer_is_what_it_takes(name: str, kind: str, finished: Any) -> None:
    before, *after = finished(name, kind).operations
    declared = METHODS[name].inference
    if declared == "none":
        assert set(after) == {before}
    elif declared == "constant":
        assert len(set(after)) == 1
        assert after[0] > before
    else:
        assert declared == "per task"
        assert after[0] < after[1] < after[2]


class Guarded(Sequence[Example]):
    """Training rows; while they are closed, each reading is noted in `read_again`."""

    def __init__(self, name: str, rows: Sequence[Example], read_again: list[str]) -> None:
        self.name, self.rows, self.read_again, self.closed = name, rows, read_again, False

    def _read(self) -> Sequence[Example]:
        if self.closed:
            self.read_again.append(self.name)
        return self.rows

    def __len__(self) -> int:
        return len(self._read())

    def __iter__(self) -> Iterator[Example]:
        return iter(self._read())

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        return self._read()[index]


def guard(patch: pytest.MonkeyPatch) -> list[str]:
    """Close the rows of all other tasks whenever a stage begins; the runner has encoded its tests by then.

    Returns
    -------
    list of str
        Fills with the tasks whose rows are read while they are closed.
    """
    stream_of, strategy_of, guarded, read_again = runner.build_stream, learner.build_strategy, [], []

    def build_stream(*args: Any) -> TaskStream:
        stream = stream_of(*args)
        guarded.extend(replace(task, train=Guarded(task.name, task.train, read_again)) for task in stream)
        return replace(stream, tasks=tuple(guarded))

    def build_strategy(options: Any) -> Any:
        strategy = strategy_of(options)
        begin = strategy.begin

        def guarding(context: Any, stage: Any) -> None:
            for task in guarded:
                task.train.closed = task not in stage.tasks
            begin(context, stage)

        strategy.begin = guarding
        return strategy

    patch.setattr(runner, "build_stream", build_stream)
    patch.setattr(learner, "build_strategy", build_strategy)
    return read_again


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [n for n in sorted(METHODS) if METHODS[n].rehearsal_free])
def test_rehearsal_free_strategy_never_reads_an_earlier_tasks_examples(
    name: str, kind: str, finished: Any
) -> None:
    assert not finished(name, kind).read_again


def test_the_guard_sees_a_strategy_that_reads_an_earlier_task(
    config_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_again = guard(monkeypatch)

    first: list[Any] = []

    def peeking(self: Any, context: Any, stage: Any) -> None:
        first.extend(stage.tasks)
        assert all(len(task.train) for task in first)

    monkeypatch.setattr(METHODS["freeze"].strategy, "begin", peeking)
    run(config_of("freeze", "causal", tmp_path / "run"))
    assert set(read_again) == {"copy", "flip"}
