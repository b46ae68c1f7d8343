"""lm-eval: a tiny task of one's own on a tiny model, before and after; what is said where it is missing."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from holdfast import Learner
from holdfast.cli import app
from holdfast.config import validate
from holdfast.errors import ConfigError
from holdfast.evaluation.harness import HarnessOptions, courses
from holdfast.learner.asked import behind
from holdfast.learner.config import LearnerEvaluationOptions
from holdfast.learner.skills import read_skills
from holdfast.records import HarnessAnswers
from holdfast.report import write_report
from holdfast.runner import RunConfig, run
from holdfast.runner.table import harness_table
from holdfast.tasks import toy_tokenizer
from tiny_models import tiny_model
from tiny_runs import tiny_run

TOKENIZER = toy_tokenizer()
there = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval isn't installed (pip install -c constraints.txt 'holdfast[harness]')",
)
QUESTIONS = [{"question": f"{i}+1=", "choices": ["a", "b", "ab"], "answer": i % 3} for i in range(9)]
TASK = """task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one task file and its questions; data sets are cached below it too."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "harness-tasks"
    folder.mkdir()
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "tiny_choice.yaml").write_text(TASK.format(data=data))
    return folder


def by_hand(model: Any) -> float:
    """Share of questions whose right choice has the highest log-probability."""
    right = 0
    for row in QUESTIONS:
        scores = []
        for choice in row["choices"]:  # type: ignore[attr-defined]
            # lm-eval tells where the choice begins by the tokens of the question alone
            question = TOKENIZER(row["question"]).input_ids
            whole = TOKENIZER(f"{row['question']}{choice}").input_ids
            log_p = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            place = range(len(question), len(whole))
            scores.append(sum(log_p[i - 1, whole[i]].item() for i in place))
        right += max(range(3), key=scores.__getitem__) == row["answer"]
    return right / len(QUESTIONS)


@there
@pytest.mark.parametrize("kind", ["llama", "llama-lora"])
def test_scores_are_those_of_the_likeliest_choices_and_nothing_is_disturbed(kind: str, tasks: Path) -> None:
    from holdfast.evaluation.harness import HarnessOptions, run_harness

    model, options = tiny_model(kind), HarnessOptions(tasks=("tiny_choice",), include_path=str(tasks))
    before = torch.get_rng_state(), random.getstate()
    found = run_harness(model, TOKENIZER, options)
    assert found["tiny_choice"]["acc,none"] == pytest.approx(by_hand(model))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    few = run_harness(model, TOKENIZER, options.model_copy(update={"limit": 1}))
    assert few["tiny_choice"]["acc,none"] in (0.0, 1.0)


@there
def test_a_run_asks_before_and_after_each_task_and_shows_it(tasks: Path, tmp_path: Path) -> None:
    harness = {"tasks": ["tiny_choice"], "include_path": str(tasks)}
    values = tiny_run(tmp_path / "run", evaluation={"harness": harness, "zero_shot": False})
    values["tasks"] = {**values["tasks"], "order": ["copy", "flip"]}
    metrics = run(validate(RunConfig, values, "test"))
    scores = metrics["harness"]["tiny_choice acc"]
    assert len(scores) == 3
    assert all(0 <= score <= 1 for score in scores)
    assert metrics["seconds"]["harness"] > 0
    first = json.loads((tmp_path / "run/tasks/01-copy/metrics.json").read_text())
    assert first["harness_before"]["tiny_choice"]["acc,none"] == scores[0]
    page = write_report([tmp_path / "run"], tmp_path / "report.html", None).read_text()
    assert "tiny_choice acc" in page


@there
def test_the_command_asks_the_base_and_the_model_as_it_stands(tasks: Path, tmp_path: Path) -> None:
    values = tiny_run(tmp_path / "run", evaluation={"zero_shot": False})
    values["tasks"] = {**values["tasks"], "order": ["copy"]}
    run(validate(RunConfig, values, "test"))
    command = ["harness", str(tmp_path / "run"), "--tasks", "tiny_choice", "--include-path", str(tasks)]
    shown = CliRunner().invoke(app, [*command, "--csv", str(tmp_path / "harness.csv")])
    assert shown.exit_code == 0, shown.output
    found = json.loads((tmp_path / "run/harness.json").read_text())
    from holdfast.models import load_model
    from holdfast.tasks import toy_tokenizer as tokenizer

    config = validate(RunConfig, values, "test")
    base = load_model(config.model, 0, tokenizer)[0]
    assert found["base"]["tiny_choice"]["acc,none"] == pytest.approx(by_hand(base))
    with Learner.load(tmp_path / "run") as learner:
        assert found["now"]["tiny_choice"]["acc,none"] == pytest.approx(by_hand(learner.model))
    assert found["learned"] == ["copy"]
    assert "tiny_choice acc" in shown.output
    assert "tiny_choice acc" in (tmp_path / "harness.csv").read_text()
    assert "tiny_choice acc" in write_report([tmp_path / "run"], tmp_path / "r.html", None).read_text()
    for more in (["--limit", "3"], ["--limit", "3", "--batch-size", "2"]):  # the second in place of the first
        assert CliRunner().invoke(app, [*command, *more]).exit_code == 0
    kept = json.loads((tmp_path / "run/harness.json").read_text())
    assert [answers["options"]["limit"] for answers in (*kept["earlier"], kept)] == [None, 3]
    assert kept["earlier"][0]["now"] == found["now"]
    assert {"tiny_choice acc", "tiny_choice acc (limit 3)"} == set(read_skills(tmp_path / "run").harness)
    (tmp_path / "run/harness.json").write_text("{")
    torn = CliRunner().invoke(app, command)
    assert torn.exit_code == 2
    assert "move it away" in " ".join(torn.output.split())


@there
def test_an_unknown_task_is_told_before_any_training(tasks: Path, tmp_path: Path) -> None:
    harness = {"tasks": ["tiny_chice"], "include_path": str(tasks)}
    values = tiny_run(tmp_path / "run", evaluation={"harness": harness})
    with pytest.raises(ConfigError, match=r"evaluation.harness: no task 'tiny_chice' among .*harness-tasks"):
        run(validate(RunConfig, values, "test"))
    assert not (tmp_path / "run/tasks").exists()


@there
def test_a_tokenizer_without_a_chat_template_is_told_before_anything_is_asked_through_it(
    tasks: Path, tmp_path: Path
) -> None:
    from holdfast.runner.findings import check

    harness = {"tasks": ["tiny_choice"], "include_path": str(tasks), "chat": True}
    values = tiny_run(tmp_path / "run", evaluation={"harness": harness})
    with pytest.raises(ConfigError, match=r"evaluation.harness.chat: .*no chat template .*--chat"):
        run(validate(RunConfig, values, "test"))
    assert not (tmp_path / "run/tasks").exists()
    assert not (tmp_path / "run/zero_shot").exists()
    assert any("no chat template" in p for p in check(validate(RunConfig, values, "test")).problems)
    training = {"max_steps": 1}
    with (
        Learner(
            tiny_model("llama"), TOKENIZER, "sequential", folder=tmp_path / "s", training=training
        ) as learner,
        learner.task("may", [{"prompt": "a", "completion": "b"}]) as stage,
    ):
        stage.train()
    command = ["harness", str(tmp_path / "s"), "--tasks", "tiny_choice", "--include-path", str(tasks)]
    shown = CliRunner().invoke(app, [*command, "--chat"])
    assert shown.exit_code == 2
    assert "no chat template" in " ".join(shown.output.split())
    assert not (tmp_path / "s/harness.json").exists()


def test_where_it_is_missing_the_error_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "lm_eval" else find(n, *a))
    values = tiny_run(tmp_path / "run", evaluation={"harness": ["arc_easy"]})
    with pytest.raises(ConfigError, match=r"lm-eval isn't installed.*pip install 'holdfast\[harness\]'"):
        run(validate(RunConfig, values, "test"))
    assert not (tmp_path / "run/tasks").exists()
    assert not (tmp_path / "run/zero_shot").exists()
    from holdfast.runner.findings import check

    assert any("lm-eval isn't installed" in p for p in check(validate(RunConfig, values, "test")).problems)
    shown = CliRunner().invoke(app, ["harness", str(tmp_path), "--tasks", "arc_easy"])
    assert shown.exit_code == 2


@pytest.mark.parametrize("name", ["prog-prompt", "l2p", "lora-moe", "lora-routed"])
def test_a_strategy_whose_answers_no_plain_model_gives_is_refused(name: str, tmp_path: Path) -> None:
    values = tiny_run(tmp_path / "run", evaluation={"harness": ["arc_easy"]}, strategy=name)
    values["model"] = {**values["model"], "lora": {"r": 4}} if "lora" in name else values["model"]
    with pytest.raises(ConfigError, match=rf"under strategy '{name}' answers come from more than a "):
        run(validate(RunConfig, values, "test"))


def test_a_list_of_names_stands_for_the_section() -> None:
    options = validate(LearnerEvaluationOptions, {"harness": ["arc_easy"]}, "test")
    assert options.harness is not None
    assert options.harness.tasks == ("arc_easy",)
    with pytest.raises(ConfigError, match=r"harness: .*at least 1"):
        validate(LearnerEvaluationOptions, {"harness": []}, "test")


def test_what_lm_eval_said_is_kept_until_the_same_is_asked_in_the_same_way() -> None:
    def said(*tasks: str, learned: str = "may", **options: Any) -> HarnessAnswers:
        now = {task: {"acc,none": 0.5} for task in tasks}
        return HarnessAnswers(now=now, learned=[learned], options={"tasks": list(tasks), **options})

    kept = said("a")
    for more in (
        said("b", limit=5, chat=False),
        said("a", chat=True),
        said("c", learned="june"),
        said("b", "d", limit=5),
        said("a", batch_size=2),
    ):
        kept = behind(kept, more)
    assert [list(answers.now) for answers in kept.every] == [["a"], ["c"], ["b", "d"], ["a"]]
    assert [bool(answers.options.get("chat")) for answers in kept.every] == [True, False, False, False]
    of_old = HarnessAnswers(now={"a": {"acc,none": 0.5}}, learned=["may"])
    assert len(behind(of_old, said("b")).every) == 2
    assert len(behind(of_old, said("a")).every) == 1


@pytest.mark.parametrize(
    ("later", "asked", "told"),
    [
        ({"tasks": ["a"]}, [], {"a acc": [0.0, 1.0, 2.0]}),
        (
            {"tasks": ["a", "b"], "batch_size": 2},
            ["b"],
            {"a acc": [0.0, 1.0, 2.0], "b acc (first asked before june)": [None, 1.0, 2.0]},
        ),
        (
            {"tasks": ["a"], "limit": 5},
            ["a"],
            {"a acc": [0.0, 1.0, None], "a acc (first asked before june, limit 5)": [None, 1.0, 2.0]},
        ),
    ],
)
def test_a_stage_asks_before_it_what_the_last_one_was_not_asked_in_the_same_way(
    later: dict[str, Any],
    asked: list[str],
    told: dict[str, list[float | None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from holdfast.learner import askable, harness

    learned = 0
    calls: list[list[str]] = []

    def answer(model: Any, tokenizer: Any, options: HarnessOptions) -> Any:
        calls.append(list(options.tasks))
        return {task: {"acc,none": float(learned)} for task in options.tasks}

    monkeypatch.setattr(harness, "run_harness", answer)
    monkeypatch.setattr(askable, "check_harness", lambda *a: None)
    for name, options in (("may", {"tasks": ["a"]}), ("june", later)):
        with (
            Learner(
                tiny_model("llama"),
                TOKENIZER,
                "sequential",
                folder=tmp_path / "s",
                training={"max_steps": 1},
                evaluation={"harness": options},
            ) as learner,
            learner.task(name, [{"prompt": name, "completion": "b"}]) as stage,
        ):
            stage.train()
            learned += 1
    assert calls == [["a"], ["a"], *([asked] if asked else []), later["tasks"]]
    known = read_skills(tmp_path / "s")
    assert known.harness == told
    shown = harness_table(known.harness).csv()
    assert all(name in shown for name in told)


def test_courses_leave_standard_errors_out_and_gaps_open() -> None:
    after = {"t": {"acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 0.2}}
    assert courses([None, after]) == {"t acc": [None, 0.5], "t f1,strict": [None, 0.2]}
