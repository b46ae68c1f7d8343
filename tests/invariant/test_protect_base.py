"""Task 0 is the base: held by rows of its own, through runs, ``learn`` and scripts, killed anywhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from holdfast import Learner
from holdfast.config import validate
from holdfast.errors import ConfigError, DataError, RunDirectoryError
from holdfast.learner import LearnerConfig
from holdfast.learner.skills import read_skills, undo
from holdfast.progress import Progress
from holdfast.runner import RunConfig, run
from holdfast.runner.findings import check
from holdfast.runner.learn import learn_data
from holdfast.runner.table import skills_table
from holdfast.strategies import STRATEGIES
from holdfast.tasks import toy_tokenizer
from kills import Killed, kill_when
from learning_data import SHORT, mostly_slow, rows_of, same
from learning_data import write_rows as write_data
from strategy_runs import needs_lora, options_of
from tiny_models import tiny_model
from tiny_runs import tiny_run

BASE = {"rows": 6, "tokens": 24}
INPUTS = {"name": "attribution", "importance": {"name": "inputs", "samples": 8}}
REPLAY = {"memory": {"sampling": "generated", "count": 6}}
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)


def config_of(output: Path, strategy: Any, **sections: Any) -> RunConfig:
    values = tiny_run(output, strategy=strategy, **{"protect_base": BASE, **sections})
    values["tasks"] = {**values["tasks"], "order": ["copy", "flip"]}
    values["evaluation"] = {"zero_shot": False, "max_new_tokens": 2}
    values["training"] = {"max_steps": 3, "batch_size": 8, "learning_rate": 3e-3, "checkpoint_steps": 2}
    values["training"] |= sections.get("training", {})
    values["model"] = {"toy": True, "hidden": 16, "layers": 1}
    values["strategy"] = strategy if isinstance(strategy, dict) else {"name": strategy}
    if needs_lora(values["strategy"]["name"]):
        values["model"]["lora"] = {"r": 4}
    return validate(RunConfig, values, source="test")


def outcome(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix == ".safetensors":
            found |= {f"{name}/{key}": value for key, value in load_file(file).items()}
        elif file.name in ("strategy.json", "replay.json", "memory.jsonl", "memory.json"):
            found[name] = re.sub(r'"seconds": [0-9.e-]+', "", file.read_text())
    return found


def equal(ours: dict[str, Any], others: dict[str, Any]) -> bool:
    return ours.keys() == others.keys() and all(
        torch.equal(value, others[key]) if isinstance(value, torch.Tensor) else value == others[key]
        for key, value in ours.items()
    )


@pytest.mark.parametrize(
    ("strategy", "sections", "where", "call"),
    [
        (INPUTS, {}, "holdfast.evaluation.writing.log_likelihoods", 2),  # while the base writes
        (INPUTS, {"replay": REPLAY}, "holdfast.learner.state.write_json", 2),  # ended, and not committed
        pytest.param(INPUTS, {}, "os.rename", 1, marks=pytest.mark.slow),
        ({"name": "ewc", "fisher": {"samples": 8}}, {}, "holdfast.training.bridge.completion_loss", 3),
        pytest.param(
            {"name": "inf-lora", "samples": 8},
            {},
            "holdfast.training.bridge.completion_loss",
            3,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"name": "replay", **REPLAY},
            {},
            "holdfast.training.bridge.completion_loss",
            3,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_killed_anywhere_ends_bit_identical(
    strategy: Any, sections: Any, where: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config_of(tmp_path / "whole", strategy, **sections))
    broken = config_of(tmp_path / "broken", strategy, **sections)
    with monkeypatch.context() as patch:
        kill_when(patch, where, call)
        with pytest.raises(Killed):
            run(broken)
    run(broken)
    whole = outcome(tmp_path / "whole")
    assert equal(outcome(tmp_path / "broken"), whole)
    assert json.loads((tmp_path / "whole" / "base" / "memory.json").read_text())["kept"] > 0


def test_what_the_base_wrote_before_a_kill_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = config_of(tmp_path / "broken", INPUTS)
    with monkeypatch.context() as patch:
        kill_when(patch, "holdfast.evaluation.writing.log_likelihoods", 2)
        with pytest.raises(Killed):
            run(broken)
    with monkeypatch.context() as patch:  # INPUTS keeps no memory: nothing else is written
        for name in ("_draw", "greedy"):
            kill_when(patch, f"holdfast.evaluation.writing.{name}", 1)
        run(broken)
    assert not list((tmp_path / "broken").rglob("written-*.jsonl")), "it serves to go on, and goes"


def learner_of(strategy: Any, folder: Path | None = None, **sections: Any) -> Learner:
    values = {"training": {"max_steps": 4, "batch_size": 8, "learning_rate": 3e-3}, "protect_base": BASE}
    base = lambda: tiny_model("llama")  # noqa: E731
    return Learner(
        tiny_model("llama"),
        toy_tokenizer(),
        strategy,
        folder=folder,
        base_model=base,
        **{**values, **sections},
    )


def learn(learner: Learner, name: str = "may") -> None:
    with learner.task(name, rows_of(name, 24), rows_of(f"{name} test", 4)) as stage:
        stage.train()


def test_the_strategy_sees_a_task_that_was_ended_before_the_first(tmp_path: Path) -> None:
    told: list[tuple[str, str, int, bool]] = []
    learner = learner_of("lwf", tmp_path / "skills")
    for verb in ("begin", "end"):
        original = getattr(learner.state.strategy, verb)

        def spy(context: Any, stage: Any, verb: str = verb, original: Any = original) -> None:
            told.append((verb, stage.name, stage.index, stage.first))
            original(context, stage)

        setattr(learner.state.strategy, verb, spy)
    learn(learner)
    assert told == [
        ("begin", "base", 0, True),
        ("end", "base", 0, True),
        ("begin", "may", 1, False),
        ("end", "may", 1, False),
    ]
    assert learner.learned == ["may"]
    assert (tmp_path / "skills" / "tasks" / "01-may").is_dir()
    learner.close()


def test_the_first_task_moves_the_base_less_and_a_learner_begun_again_goes_on_alike(tmp_path: Path) -> None:
    """The hold is on at the first step, and is the same whether it was made in this process or another."""
    kls = []
    for protected in (None, BASE):
        learner = learner_of(
            {**INPUTS, "mechanism": {"name": "anchor", "strength": 50}},
            protect_base=protected,
            evaluation={"general": True, "general_rows": 16},
            training={"max_steps": 30, "batch_size": 8, "learning_rate": 3e-3},
        )
        learn(learner)
        kls.append(learner.kl_to_base().kl)
    assert kls[1] < 0.7 * kls[0], kls
    whole = learner_of(INPUTS, tmp_path / "whole")
    learn(whole)
    begun = learner_of(INPUTS, tmp_path / "again")
    begun.base_task.end(None)
    begun.close()
    again = learner_of(INPUTS, tmp_path / "again")
    assert not again.base_task.due
    learn(again)
    weights = [dict(learner.model.state_dict()) for learner in (whole, again)]
    assert same(*weights)


def test_a_generated_memory_replays_the_bases_rows_and_strategies_that_hold_nothing_too() -> None:
    learner = learner_of("sequential", replay=REPLAY)
    with learner.task("may", rows_of("may", 24)) as stage:
        old = [row for row in stage.examples if row.raw]
        stage.train()
    assert len(old) == 16, "0.4 of 40 rows"
    assert learner.state.replay is not None
    assert sum(task == "base" for task, _ in learner.state.replay.memory.rows) == 6


def test_learn_holds_a_chat_model_by_itself_and_shows_it(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = CHAT
    training = {"max_steps": 60, "batch_size": 8, "learning_rate": 1e-2, "lm_weight": 1.0}
    chatty = Learner(tiny_model("llama"), tokenizer, "sequential", training=training, template={"chat": True})
    with chatty.task(
        "chats", [{"prompt": row["prompt"][4:8], "completion": "ab"} for row in rows_of("may")]
    ) as s:
        s.train()
    folder = chatty.export(tmp_path / "model")
    data = write_data(tmp_path / "may.jsonl", rows_of("may"))
    small = ["protect_base.rows=4", "protect_base.tokens=40", "protect_base.writing.tries=20"]

    def learned(skills: str, *more: str, **flags: Any) -> Any:
        return learn_data(
            data,
            tmp_path / skills,
            model=str(folder),
            assignments=[*SHORT, "strategy.importance.samples=8", *more],
            progress=Progress(quiet=True),
            **flags,
        )

    known = learned("chat", *small)
    assert known.base is not None
    assert [skill.name for skill in known.skills] == ["may"]
    assert skills_table(known).rows[0][:2] == ("base", known.base.learned[:10])
    assert known.record()["base"]["train_rows"] == known.base.train_rows
    rows = [
        json.loads(line) for line in (tmp_path / "chat" / "base" / "memory.jsonl").read_text().splitlines()
    ]
    assert rows
    assert all(row["prompt"][0]["role"] == "user" for row in rows), "its own user turns"
    assert learned("off", protect_base=False).base is None
    assert learned("memory", "replay.memory=generated").base is None
    general = tmp_path / "general.txt"
    general.write_text("abc de\n\nfed cba\n\nhgf ab\n")
    given = learned("given", general=general)
    assert given.base is not None
    assert given.base.train_rows == 3
    with pytest.raises(ConfigError, match="decided before the first task"):
        learned("given", protect_base=False)
    assert undo(tmp_path / "chat") == "may"
    assert not (tmp_path / "chat" / "base").exists(), "another configuration may begin here"


def test_what_cannot_be_held_or_read_is_told_before_training(tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"strategy": "sequential"}, "`strategy: sequential`, which holds nothing that it did not train"),
        ({"strategy": {"name": "attribution", "prior_from": "single_task"}}, "prior_from: single_task"),
        ({"strategy": "ewc", "protect_base": {"general": "x", "writing": {}}}, "rows of a file"),
    ]
    for values, told in wrong:
        with pytest.raises(ConfigError, match=told):
            validate(LearnerConfig, {"protect_base": True, **values}, "test")
    with pytest.raises(DataError, match=r"protect_base\.general: data: no '.*nothing\.jsonl'"):
        learner_of("ewc", protect_base={"general": str(tmp_path / "nothing.jsonl")})
    problems = check(config_of(tmp_path / "run", "ewc", protect_base={"general": "no.jsonl"})).problems
    assert any(problem.startswith("protect_base.general: ") for problem in problems)
    learner = learner_of("ewc", protect_base={"rows": 2, "tokens": 2, "writing": {"cut": "left out"}})
    with pytest.raises(ConfigError, match="the model writes nothing that can be used"):
        learn(learner)
    with pytest.raises(ConfigError, match="that is the base itself"):
        learn(learner_of("ewc"), "base")


def test_a_torn_base_is_made_again_only_before_anything_was_learned(tmp_path: Path) -> None:
    for learned in (False, True):
        folder = tmp_path / str(learned)
        learner = learner_of("ewc", folder)
        if learned:
            learn(learner)
        else:
            learner.base_task.end(None)
        learner.close()
        (folder / "base" / "strategy.json").write_text("{}")
        if learned:
            with pytest.raises(RunDirectoryError, match="Bring the folder back"):
                learner_of("ewc", folder)
            continue
        again = learner_of("ewc", folder)
        assert again.base_task.due
        again.close()
        assert read_skills(folder).base is None


ENDING = sorted(name for name, method in STRATEGIES.items() if method.ends_untrained)


@pytest.mark.parametrize("name", mostly_slow(ENDING, "ogd", "inf-lora"))
def test_every_strategy_that_says_so_ends_a_task_that_nobody_trained(name: str, tmp_path: Path) -> None:
    config = config_of(tmp_path / name, options_of(name), training={"max_steps": 1, "batch_size": 4})
    assert run(config)["finished"]
    assert (tmp_path / name / "base" / "strategy.json").is_file()


def test_a_rating_of_zeros_holds_nothing_and_is_told_before_training(tmp_path: Path) -> None:
    """One LoRA for all tasks is new here and passes on no relevance; Fisher information of its B is there."""
    from holdfast.models import LoraOptions, add_lora

    def learner(strategy: Any) -> Learner:
        model = add_lora(tiny_model("llama"), LoraOptions(r=4), 0)
        return Learner(model, toy_tokenizer(), strategy, protect_base=BASE, training={"max_steps": 1})

    with pytest.raises(ConfigError, match=r"made zeros alone, .*importance=fisher"):
        learn(learner({**INPUTS, "merge_lora": "none"}))
    held = learner({"name": "attribution", "importance": {"name": "fisher", "samples": 4}})
    learn(held)
    assert held.base_task.told


def test_rows_of_the_base_that_don_t_end_are_held_as_far_as_they_go(tmp_path: Path) -> None:
    with learner_of("ewc", protect_base={"rows": 4, "tokens": 4}, folder=tmp_path / "s") as learner:
        with learner.task("may", rows_of("may", 4)) as stage:
            stage.train()
        counts = json.loads((tmp_path / "s" / "base" / "memory.json").read_text())
        assert counts["unfinished"] == 0
        assert 0 < counts["cut"] <= counts["kept"]


def test_the_time_that_the_base_takes_is_part_of_the_whole(tmp_path: Path) -> None:
    seconds = run(config_of(tmp_path / "run", "ewc"))["seconds"]
    about = json.loads((tmp_path / "run" / "base" / "task.json").read_text())
    assert seconds["base"] == about["seconds"]
    assert seconds["total"] == pytest.approx(sum(s for phase, s in seconds.items() if phase != "total"))
    assert "base" not in run(config_of(tmp_path / "without", "ewc", protect_base=None))["seconds"]
