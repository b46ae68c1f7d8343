"""A memory that the model writes: through runs and learners, killed anywhere, and without anybody's rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_every_strategy import guard
from transformers import Trainer, TrainingArguments

import holdfast
from holdfast.config import validate
from holdfast.errors import ConfigError, DataError
from holdfast.models import tiny_llama
from holdfast.progress import Progress
from holdfast.runner import RunConfig, run
from holdfast.runner.findings import check
from holdfast.runner.learn import learn_data
from holdfast.tasks import toy_suite, toy_tokenizer
from holdfast.tasks.memory import Rehearsal
from holdfast.tasks.opening import opening_of
from kills import Killed, kill_when
from tiny_runs import tiny_run
from tiny_t5 import write_tiny_t5

COUNT = 12
REPLAY = {"memory": {"sampling": "generated", "count": COUNT}}
TRAINING = {"epochs": 10, "batch_size": 8, "learning_rate": 3e-3, "checkpoint_steps": 15}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-lora": {
        "model": {"toy": True, "hidden": 32, "layers": 2, "lora": {"r": 16}},
        "training": {**TRAINING, "learning_rate": 5e-2},
    },
    "llama-logits": {"replay": {**REPLAY, "targets": "logits"}},
    "t5": {"template": {"prompt": "{prompt}{eos}"}},
}


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_t5(tmp_path_factory.mktemp("t5"))


@dataclass(frozen=True)
class Whole:
    """A run that was never killed, under the guard: its directory is to be read, not written."""

    folder: Path
    metrics: dict[str, Any]
    read_again: list[str]


@pytest.fixture(scope="module")
def whole(t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    """Made once for each kind."""

    @cache
    def make(kind: str) -> Whole:
        folder = tmp_path_factory.mktemp("whole") / "run"
        with pytest.MonkeyPatch.context() as patch:
            read_again = guard(patch)
            return Whole(folder, run(config_of(folder, kind, t5)), read_again)

    return make


def config_of(
    output: Path, kind: str, t5: Path, order: tuple[str, ...] = ("head", "copy"), **sections: Any
) -> RunConfig:
    sections = {"replay": REPLAY, "training": TRAINING, **KINDS[kind], **sections}
    if kind == "t5":
        sections["model"] = {"path": str(t5)}
    values = tiny_run(output, **sections)
    values["tasks"] = {**values["tasks"], "order": list(order)}
    return validate(RunConfig, values, source="test")


def outcome(folder: Path) -> dict[str, Any]:
    """All that a later task goes on from, and what people read; metrics without the times."""
    found: dict[str, Any] = {}
    for part in sorted((folder / "tasks").iterdir()):
        for name in ("memory.jsonl", "memory.json", "replay.json"):
            found[f"{part.name}/{name}"] = (part / name).read_text()
        weights = load_file(next((part / "model").glob("*.safetensors")))
        found |= {f"{part.name}/{name}": tensor.tolist() for name, tensor in weights.items()}
    return {**found, "matrix": json.loads((folder / "metrics.json").read_text())["matrix"]}


@pytest.mark.parametrize(
    ("kind", "where", "call"),
    [
        ("llama-logits", "holdfast.training.soft_targets.divergence", 20),  # in task 2, which replays
        ("llama", "holdfast.evaluation.writing.log_likelihoods", 3),  # while rows of a task are written
        ("llama-lora", "holdfast.learner.remember.write_rows", 2),
        pytest.param("t5", "holdfast.evaluation.writing.greedy", 2, marks=pytest.mark.slow),
        pytest.param("t5", "os.rename", 3, marks=pytest.mark.slow),  # everything written, not committed
        pytest.param("llama-lora", "os.rename", 3, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_writes_the_same_rows_and_ends_bit_identical(
    kind: str, where: str, call: int, whole: Any, t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = config_of(tmp_path / "broken", kind, t5)
    with monkeypatch.context() as patch:
        kill_when(patch, where, call)
        with pytest.raises(Killed):
            run(broken)
    run(broken)
    expected = outcome(whole(kind).folder)
    assert outcome(tmp_path / "broken") == expected
    assert json.loads(expected["01-head/memory.json"])["kept"] > 0, "rows were written and compared"


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_no_row_of_an_earlier_task_is_read_and_none_is_kept(kind: str, whole: Any) -> None:
    assert not whole(kind).read_again
    metrics = whole(kind).metrics
    assert (metrics["rehearses"], metrics["memory"]) == (False, "generated")
    for name, part in (("head", "01-head"), ("copy", "02-copy")):
        (task,) = toy_suite([name], 32, 8, seed=0)
        folder = whole(kind).folder / "tasks" / part
        kept = {json.loads(line)["prompt"] for line in (folder / "memory.jsonl").read_text().splitlines()}
        replayed = json.loads((folder / "replay.json").read_text())["rows"]
        assert kept
        assert kept == {row["prompt"] for row in replayed if row["task"] == name}
        assert not kept & {row.prompt for row in task.train}
        opening = json.loads((folder / "memory.json").read_text())["opening"]
        assert all(row.prompt.startswith(opening.removeprefix("<s>")) for row in task.train)


def test_written_rows_are_mixed_into_what_a_later_task_trains_on(
    t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[list[str]] = []
    original = Rehearsal.mixed

    def spy(self: Rehearsal, new: Any, seed: int) -> Any:
        rows = original(self, new, seed)
        stages.append([str(row.prompt) for row in rows])
        return rows

    monkeypatch.setattr(Rehearsal, "mixed", spy)
    run(config_of(tmp_path / "run", "llama", t5))
    first, second = stages
    assert len(first) == 32
    old = [prompt for prompt in second if prompt.startswith("head ")]
    assert (len(second), len(old)) == (53, 21), "0.4 of the rows are old"
    lines = (tmp_path / "run" / "tasks" / "01-head" / "memory.jsonl").read_text().splitlines()
    assert set(old) == {json.loads(line)["prompt"] for line in lines}


@pytest.mark.parametrize("strategy", [{"name": "kif-m", **REPLAY}, {"name": "ewc", "strength": 10.0}])
def test_generated_memory_serves_strategies_with_a_memory_and_goes_beside_others(
    strategy: dict[str, Any], t5: Path, tmp_path: Path
) -> None:
    own = "memory" in strategy
    config = config_of(tmp_path / "run", "llama", t5, strategy=strategy, replay=None if own else REPLAY)
    assert run(config)["memory"] == "generated"
    assert config.method.endswith("generated memory")
    assert (tmp_path / "run" / "tasks" / "02-copy" / "memory.jsonl").exists()


def test_the_strategy_replay_and_the_section_write_and_learn_the_same(
    whole: Any, t5: Path, tmp_path: Path
) -> None:
    config = config_of(tmp_path, "llama", t5, strategy={"name": "replay", **REPLAY}, replay=None)
    assert run(config)["memory"] == "generated"
    assert config.method.endswith("generated memory")
    parts = [folder / "tasks" / "02-copy" for folder in (whole("llama").folder, tmp_path)]
    for name in ("memory.jsonl", "memory.json"):
        assert len({(part / name).read_text() for part in parts}) == 1
    weights = [load_file(next((part / "model").glob("*.safetensors"))) for part in parts]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_prompts_are_learned_while_a_memory_of_text_is_to_be_written(
    whole: Any, t5: Path, tmp_path: Path
) -> None:
    def weight(folder: Path) -> float:
        return float(json.loads((folder / "tasks/01-head/training.json").read_text())["lm_weight"])

    def of_one_task(name: str, **sections: Any) -> Path:
        run(config_of(tmp_path / name, "llama", t5, ("head",), **sections))
        return tmp_path / name

    assert weight(whole("llama").folder) == 0.25
    assert weight(of_one_task("kept", replay={"memory": {"count": 4}})) == 0.0
    assert weight(of_one_task("chosen", training={**TRAINING, "lm_weight": 0.5})) == 0.5


# what is said before anything is trained


def test_a_template_without_an_end_is_refused_before_training(t5: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{word}", "completion": "x"} for word in ("ab", "cd")]
    learner = holdfast.Learner(
        tiny_llama(toy_tokenizer(), hidden=32, layers=2), toy_tokenizer(), "sequential", replay=REPLAY
    )
    with (
        pytest.raises(DataError, match="no ending in common"),
        learner.task("june", train=rows) as stage,
    ):
        stage.train()
    assert learner.learned == []


@pytest.mark.parametrize("how", ["lamol", "lfpt5", "ssr", {"replay": REPLAY}])
def test_a_later_task_that_cannot_be_written_is_found_before_the_first_is_trained(
    how: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, values = ["may", "june"], {"strategy": "sequential", **how} if isinstance(how, dict) else {}
    prompts = {"may": [f"ask {word}=" for word in ("ab", "cd")], "june": ["ab", "cd"]}
    for task in order:
        (tmp_path / "data" / task).mkdir(parents=True)
        rows = "".join(json.dumps({"prompt": p, "completion": "x"}) + "\n" for p in prompts[task])
        for part in ("train", "test"):
            (tmp_path / "data" / task / f"{part}.jsonl").write_text(rows)
    tasks = {"source": "jsonl", "path": str(tmp_path / "data"), "order": order}
    values = tiny_run(tmp_path / "run", tasks=tasks, **(values or {"strategy": how}))
    config = validate(RunConfig, values, source="test")
    (problem,) = check(config).problems
    assert "task 'june'" in problem
    assert "no ending in common" in problem
    monkeypatch.setattr("holdfast.training.bridge.completion_loss", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(DataError, match=r"'june': .* no ending in common"):
        run(config)


def test_check_counts_the_rows_that_will_be_written(t5: Path, tmp_path: Path) -> None:
    found = dict(check(config_of(tmp_path / "run", "llama", t5)).estimate)
    assert found["optimizer steps"] == "110 (40, 70 by stage)", "53 rows in the second"


@pytest.mark.parametrize(
    ("replay", "message"),
    [
        ({"memory": {"sampling": "generated", "fraction": 0.1}}, "`fraction` doesn't apply to"),
        ({"memory": {"writing": {"top_p": 0.5}}}, "`writing` applies to `sampling: generated` only"),
        ({"memory": {"sampling": "generated", "writing": {"unsure": 1.0}}}, "less than 0"),
        ({"memory": "generate"}, "Did you mean 'generated'"),
    ],
)
def test_wrong_options_are_named(replay: Any, message: str, t5: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, "llama", t5, replay=replay)


def test_the_word_alone_means_a_hundred_rows_in_two_fifths(t5: Path, tmp_path: Path) -> None:
    replay = config_of(tmp_path, "llama", t5, replay={"memory": "generated"}).replay
    assert replay is not None
    assert (replay.memory.written, replay.share) == (100, 0.4)
    kept = config_of(tmp_path, "llama", t5, replay={}).replay
    assert kept is not None
    assert kept.share == 0.2


def test_gradients_of_single_samples_and_learned_prompts_dont_combine(t5: Path, tmp_path: Path) -> None:
    strategy = {"name": "kif-m", "memory": "generated", "sensitivity": "second"}
    with pytest.raises(ConfigError, match="take `first` or `second-batch`, or lm_weight 0"):
        config_of(tmp_path, "llama", t5, strategy=strategy, replay=None)
    training = {**TRAINING, "lm_weight": 0.0}
    assert config_of(tmp_path, "llama", t5, strategy=strategy, replay=None, training=training)


# in scripts, and from the command line


def test_holdfast_learn_writes_and_replays(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer()
    tiny_llama(tokenizer, hidden=32, layers=2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for number, task in enumerate(toy_suite(["head", "copy"], 32, 8)):
        data = tmp_path / f"{task.name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(task)))
        options = [f"replay.memory={{sampling: generated, count: {COUNT}}}"] if number == 0 else []
        skills = learn_data(
            data,
            tmp_path / "skills",
            model=str(tmp_path / "model") if number == 0 else None,
            strategy="sequential" if number == 0 else None,
            assignments=[*options, "training.epochs=10"],
            progress=Progress(quiet=True),
        )
    assert skills.method == "sequential · generated memory"
    rows = json.loads((tmp_path / "skills" / "tasks" / "02-copy" / "replay.json").read_text())["rows"]
    assert {row["task"] for row in rows} == {"head", "copy"}


def learner_of(folder: Path, **sections: Any) -> holdfast.Learner:
    tokenizer = toy_tokenizer()
    sections = {"replay": REPLAY, "training": TRAINING, **sections}
    return holdfast.Learner(
        tiny_llama(tokenizer, hidden=32, layers=2), tokenizer, "sequential", folder=folder, **sections
    )


def rows_of(task: Any) -> list[dict[str, Any]]:
    return [{"prompt": row.prompt, "completion": row.completion} for row in task.train]


def test_a_learner_that_is_loaded_replays_what_was_written_before(tmp_path: Path) -> None:
    first, second = toy_suite(["head", "copy"], 32, 8)
    with learner_of(tmp_path / "skills") as learner:
        with learner.task("head", train=rows_of(first), test=first.test) as stage:
            stage.train()
        wrote = [row.prompt for row in learner.state.replay.memory.examples]  # type: ignore[union-attr]
    again = holdfast.Learner.load(
        tmp_path / "skills", tiny_llama(toy_tokenizer(), hidden=32, layers=2), toy_tokenizer()
    )
    with again, again.task("copy", train=rows_of(second)) as stage:
        assert wrote
        assert set(wrote) <= {row.prompt for row in stage.examples}
        stage.train()


def test_a_trainer_and_a_loop_of_ones_own_learn_prompts_too(tmp_path: Path) -> None:
    (task,) = toy_suite(["head"], 32, 8)
    arguments = {"per_device_train_batch_size": 8, "max_steps": 1, "logging_steps": 1, "report_to": "none"}
    losses = {}
    for weight in (0.0, 1.0):
        learner = learner_of(tmp_path / str(weight), training={**TRAINING, "lm_weight": weight})
        with learner.task("head", train=rows_of(task)) as stage:
            args = TrainingArguments(
                str(tmp_path / f"out{weight}"), learning_rate=1e-9, use_cpu=True, **arguments
            )
            stage.trainer(Trainer, args=args).train()
            trained = stage.record.loss[0][1]
            batch = stage.collate([stage.numbered[i] for i in range(8)])
            outputs = learner.model(**{k: v for k, v in batch.items() if k != "row_ids"})
            losses[weight] = (trained, float(stage.loss(batch, outputs, torch.tensor(0.0)).detach()))
    assert losses[0.0][1] == 0.0
    assert losses[1.0][1] > 1.0
    assert losses[1.0][0] - losses[0.0][0] == pytest.approx(losses[1.0][1], rel=0.2)  # other rows, untrained


def test_a_data_set_of_ones_own_would_lack_the_written_rows(tmp_path: Path) -> None:
    (task,) = toy_suite(["head"], 32, 8)
    learner = learner_of(tmp_path / "skills")
    with (
        pytest.raises(ConfigError, match="which this train_dataset lacks"),
        learner.task("head", train=rows_of(task)) as stage,
    ):
        stage.trainer(Trainer, train_dataset=[1])


def test_a_chat_model_writes_user_turns_that_it_never_learned(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>{% endif %}"
    )
    (task,) = toy_suite(["head"], 32, 8)
    rows = [
        {"messages": [{"role": "user", "content": r.prompt}, {"role": "assistant", "content": r.completion}]}
        for r in task.train
    ]
    learner = holdfast.Learner(
        tiny_llama(tokenizer, hidden=32, layers=2),
        tokenizer,
        "sequential",
        folder=tmp_path / "skills",
        replay={"memory": {"sampling": "generated", "count": 4, "writing": {"tries": 50}}},
        training={**TRAINING, "lm_weight": 0.5},  # so tiny a model never saw a user
    )
    with learner.task("head", train=rows) as stage:
        stage.train()
    memory = learner.state.replay.memory.examples  # type: ignore[union-attr]
    assert memory
    for row in memory:
        (turn,) = row.prompt
        assert turn["role"] == "user"
        assert turn["content"].startswith("head ")
    opening = opening_of(memory, learner.encoder, "head")
    assert opening.system == ()
    unlearned = holdfast.Learner(
        tiny_llama(tokenizer, hidden=32, layers=2), tokenizer, "sequential", replay=REPLAY, training=TRAINING
    )
    with unlearned.task("head", train=rows) as stage:
        assert stage.options.lm_weight == 0.0, "an instruct model knows how a user's turn looks"
        stage.train()
