"""What a user's rows lose on the way is told before training, whatever the rows are."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from holdfast.config import validate
from holdfast.errors import ConfigError, DataError
from holdfast.evaluation.audit import Audit, audit
from holdfast.evaluation.evaluate import EvaluationOptions
from holdfast.learner import Learner
from holdfast.models import digest
from holdfast.report import write_report
from holdfast.runner import RunConfig, run
from holdfast.runner.ask import ask_file, load_to_ask
from holdfast.runner.findings import check
from holdfast.runner.learn import learn_data
from holdfast.tasks import Encoder, Example, Task, Template, toy_tokenizer
from learning_data import SHORT, TOY, rows_of, write_rows
from noted import Noted
from tiny_models import tiny_model
from tiny_runs import tiny_run


def found_in(
    train: list[Example], test: list[Example], metric: Any = "exact_match", **template: Any
) -> Audit:
    encoder = Encoder(toy_tokenizer(), Template(**template), encoder_decoder=False)
    return audit(Task("t", train, test, metric), encoder, tiny_model("llama"), EvaluationOptions())


def test_what_is_cut_is_told_where_no_row_was_kept_aside() -> None:
    found = found_in([Example("abcd", "abcdef")], [], max_prompt_tokens=3, max_completion_tokens=2)
    assert found.remarks == [
        "t: 1 of 1 prompts are longer than template.max_prompt_tokens (3); their first tokens are kept, "
        "up to 1 are cut.",
        "t: 1 completions are longer than template.max_completion_tokens = 2 and lose their end.",
    ]
    (problem,) = found_in([Example("a" * 9000, "b")], [], max_prompt_tokens=9000).problems
    assert "the longest row (prompt and answer) has" in problem


def test_of_running_text_the_limit_is_told_that_cuts_it_and_how_much_is_lost() -> None:
    texts = [Example.text("abcdefgh"), Example.text("ab"), Example("a", "b")]
    for train, test in ((texts, []), (texts[:1], texts[1:2])):
        (remark,) = found_in(train, test, "perplexity", max_prompt_tokens=3, max_completion_tokens=2).remarks
        assert remark.startswith(
            "t: 1 of 2 texts are longer than template.max_prompt_tokens + template.max_completion_tokens "
            "(5); what is behind that, 3 of 11 tokens, is left out."
        )


def test_rows_that_cannot_be_kept_aside_are_trained_on_and_told(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "may.jsonl", [*rows_of("may", 20), *rows_of("may", 20)])
    progress = Noted()
    known = learn_data(data, tmp_path / "s", assignments=[*TOY, *SHORT], progress=progress)
    (skill,) = known.skills
    assert skill.train_rows == 40 - skill.test_rows
    taken = 4 - skill.test_rows
    assert taken > 0
    assert any(
        f"{taken} of the 4 rows drawn to be kept aside ask what is trained on too" in s for s in progress.said
    )


def test_of_the_file_that_the_base_is_held_by_it_is_told_what_is_cut_and_what_does_not_fit(
    tmp_path: Path,
) -> None:
    data, notes = write_rows(tmp_path / "may.jsonl", rows_of("may", 20)), tmp_path / "notes.txt"
    notes.write_text("abcd " * 1000)
    progress = Noted()
    with pytest.raises(DataError, match=r"protect_base\.general: the longest row .* the model takes"):
        learn_data(data, tmp_path / "s", general=notes, assignments=[*TOY, *SHORT], progress=progress)
    assert any("protect_base.general: 1 of 1 texts are longer than" in said for said in progress.said)


def test_of_questions_too_it_is_told_that_their_tools_are_not_shown(tmp_path: Path) -> None:
    progress, skills = Noted(), tmp_path / "s"
    data = write_rows(tmp_path / "may.jsonl", rows_of("may", 20))
    learn_data(data, skills, assignments=[*TOY, *SHORT], progress=progress)
    asked = write_rows(tmp_path / "q.jsonl", [{"prompt": "a", "tools": [{"name": "add"}]}, {"prompt": "b"}])
    with load_to_ask(skills, None, progress) as learner:
        ask_file(learner, asked, tmp_path / "a.jsonl", base=False, progress=progress)
    assert any("1 of 2 questions have tools that the model isn't shown" in said for said in progress.said)


def test_a_month_without_rows_aside_leaves_the_means_of_the_others(tmp_path: Path) -> None:
    for name, count in (("may", 20), ("few", 3), ("july", 20)):
        data = write_rows(tmp_path / f"{name}.jsonl", rows_of(name, count))
        options = [*(TOY if name == "may" else ()), *SHORT]
        known = learn_data(data, tmp_path / "s", assignments=options, progress=Noted())
    may, few, july = known.skills
    assert few.now is None
    assert may.now is not None
    assert july.now is not None
    assert known.record()["ap"] == (may.now + july.now) / 2
    page = write_report([tmp_path / "s"], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "No rows were kept aside for few: it counts in none of these." in page
    assert "–\u00a0% on average" not in page


def test_test_rows_that_are_trained_on_are_told_of_this_month_and_of_earlier_ones(tmp_path: Path) -> None:
    may, more = rows_of("may", 40), rows_of("more", 40)
    names = {"may": may, "june": [*may, *more], "july": more[:8]}
    data = {name: write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in names.items()}

    def said_of(name: str, **further: Any) -> list[str]:
        progress, first = Noted(), name == "may"
        options = [*(TOY if first else ()), *SHORT]
        learn_data(data[name], tmp_path / "s", assignments=options, progress=progress, **further)
        return [text for text in progress.said if "that are trained on" in text]

    assert said_of("may") == []
    (cumulative,) = said_of("june")
    assert cumulative.startswith("may: ")
    assert "of 4 test rows ask what is asked in the rows of 'june'" in cumulative
    assert any(text.startswith("july: 8 of 8 test rows") for text in said_of("july", test=data["july"]))


def test_a_files_questions_are_encoded_once_and_a_bad_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    text = Encoder._text
    monkeypatch.setattr(
        Encoder, "_text", lambda self, prompt: (encoded.append(prompt), text(self, prompt))[1]
    )
    asked = write_rows(tmp_path / "q.jsonl", [{"prompt": word} for word in ("ab", "bc", "ab")])
    data = write_rows(tmp_path / "may.jsonl", rows_of("may", 20))
    learn_data(data, tmp_path / "s", assignments=[*TOY, *SHORT], progress=Noted())
    with load_to_ask(tmp_path / "s", None, Noted()) as learner:
        encoded.clear()
        ask_file(learner, asked, tmp_path / "a.jsonl", base=True, progress=Noted(), max_new_tokens=2)
        assert encoded == ["ab", "bc", "ab"], "not once more by the model or by its base"
        learner.encoder.forget()
        write_rows(tmp_path / "q.jsonl", [{"prompt": "ab"}, {"prompt": [{"role": "user", "content": "x"}]}])
        with pytest.raises(DataError, match=r"question 2: .* no chat template"):
            ask_file(learner, asked, tmp_path / "b.jsonl", base=False, progress=Noted())


CUT = "longer than template.max_prompt_tokens"


def long_row(model: Any) -> Example:
    return Example("a" * 2 * model.config.max_position_embeddings, "b")


def test_a_script_is_told_once_of_its_rows_and_each_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[Example] = []
    encode = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, row: (encoded.append(row), encode(self, row))[1])
    learner = Learner(tiny_model("llama"), toy_tokenizer(), "sequential", template={"max_prompt_tokens": 3})
    train, test = [Example("abcd", "ab"), Example("bcde", "bc")], [Example("cd", "ab")]
    with learner, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with learner.task("may", train, test) as stage:
            stage.train()
        with learner.task("june", [Example("dddd", "ab")], train) as stage:
            stage.train()
    told = [str(w.message) for w in caught if CUT in str(w.message)]
    assert [text.partition(":")[0] for text in told] == ["may", "june"]
    assert len(encoded) == 3 + 3


def test_a_script_is_refused_rows_that_do_not_fit_before_anything_is_learned(tmp_path: Path) -> None:
    model = tiny_model("llama")
    template = {"max_prompt_tokens": 9000}
    with Learner(model, toy_tokenizer(), "sequential", folder=tmp_path / "s", template=template) as learner:
        before = digest(model)
        for _ in range(2):
            with (
                pytest.raises(DataError, match=r"may: the longest row .* the model takes"),
                learner.task("may", [long_row(model)]) as stage,
            ):
                stage.train()
        assert digest(model) == before
        assert not (tmp_path / "s/tasks").exists()
        with learner.task("may", [Example("a", "b")]) as stage:
            stage.train()
        assert learner.learned == ["may"]


def test_learn_tells_once_of_rows_that_are_cut(tmp_path: Path) -> None:
    data, progress = write_rows(tmp_path / "may.jsonl", rows_of("may", 20)), Noted()
    options = [*TOY, *SHORT, "template.max_prompt_tokens=3"]
    learn_data(data, tmp_path / "s", assignments=options, progress=progress)
    assert sum(CUT in said for said in progress.said) == 1


def test_a_run_tells_once_of_each_tasks_rows_before_it_trains(tmp_path: Path) -> None:
    progress = Noted()
    values = tiny_run(tmp_path / "run") | {"template": {"max_prompt_tokens": 3}}
    config = validate(RunConfig, values, "test")
    run(config, progress)
    told = [i for i, said in enumerate(progress.said) if CUT in said]
    learned = next(i for i, said in enumerate(progress.said) if ": learned " in said)
    assert len(told) == len(config.tasks.order or ())
    assert max(told) < learned
    again = Noted()
    run(config, again)
    assert not any(CUT in said for said in again.said)


def test_a_run_refuses_a_later_tasks_rows_before_it_trains(tmp_path: Path) -> None:
    long = [{"prompt": "a" * 9000, "completion": "b"}]
    for name, rows in (("a", rows_of("may", 5)), ("b", long)):
        for part in ("train", "test"):
            write_rows(tmp_path / "tasks" / name / f"{part}.jsonl", rows)
    values = tiny_run(tmp_path / "run", tasks={"source": "jsonl", "path": str(tmp_path / "tasks")})
    config = validate(RunConfig, values | {"template": {"max_prompt_tokens": 9000}}, "test")
    with pytest.raises(DataError, match=r"b: the longest row .* the model takes"):
        run(config, Noted())
    assert not (tmp_path / "run/tasks").exists()
    assert not (tmp_path / "run/zero_shot").exists()


def test_check_and_run_tell_alike_of_test_rows_that_are_trained_on_in_the_same_task_or_a_later(
    tmp_path: Path,
) -> None:
    rows = rows_of("may", 5)
    for part, own in (("train", rows), ("test", rows[:2])):
        write_rows(tmp_path / "tasks" / "b" / f"{part}.jsonl", own)
    write_rows(tmp_path / "tasks" / "a" / "train.jsonl", rows_of("other", 8))
    write_rows(tmp_path / "tasks" / "a" / "test.jsonl", rows[:3])
    tasks = {"source": "jsonl", "path": str(tmp_path / "tasks"), "order": ["a", "b", "b"]}
    config = validate(RunConfig, tiny_run(tmp_path / "run", tasks=tasks), "test")
    progress = Noted()
    run(config, progress)
    told = [
        f"{of} test rows ask what is asked in the rows of 'b' that are trained on; of those the score tells "
        "what was seen, and not what is kept."
        for of in ("a: 3 of 3", "b: 2 of 2")
    ]
    for said in (check(config).remarks, progress.said):
        assert [text for text in said if "that are trained on" in text] == told


def test_a_folder_whose_general_text_has_moved_is_asked_as_before_and_told_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts, skills = tmp_path / "texts.txt", tmp_path / "s"
    texts.write_text("abc\ndef\n")
    months = [write_rows(tmp_path / f"{name}.jsonl", rows_of(name, 20)) for name in ("may", "june")]
    text = ["strategy=sequential", "replay.memory=none", "replay.general.file=texts.txt"]
    learn_data(months[0], skills, assignments=[*TOY, *SHORT, *text], progress=Noted())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved = texts.rename(tmp_path / "elsewhere" / "moved.txt")
    with Learner.load(skills) as learner:
        assert len(learner.answer(["a="])) == 1
    with pytest.raises(DataError, match=r"replay\.general\.file: .*: no '.*texts\.txt'; give a file"):
        learn_data(months[1], skills, progress=Noted())
    known = learn_data(months[1], skills, assignments=["replay.general.file=moved.txt"], progress=Noted())
    assert len(known.skills) == 2
    assert moved.exists()
    july = write_rows(tmp_path / "july.jsonl", rows_of("july", 20))
    more = ["replay.general.file=moved.txt", "replay.general.share=0.5"]
    with pytest.raises(ConfigError, match=r"replay can't be changed"):
        learn_data(july, skills, assignments=more, progress=Noted())
