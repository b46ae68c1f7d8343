"""template.chat: a text prompt as a user turn, the default of `holdfast learn` for an instruct model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from holdfast.cli import app
from holdfast.config import validate
from holdfast.errors import ConfigError, DataError
from holdfast.evaluation.audit import audit
from holdfast.evaluation.evaluate import EvaluationOptions, encode_task
from holdfast.tasks import Encoder, Example, Template, toy_tokenizer
from holdfast.tasks.opening import opening_of
from holdfast.tasks.rows import as_examples, as_questions
from holdfast.tasks.task import Task
from tiny_models import tiny_model

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def chatting() -> Any:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def test_a_text_prompt_is_encoded_as_a_user_turn() -> None:
    tokenizer = chatting()
    encoder = Encoder(tokenizer, Template(chat=True, strip="="), encoder_decoder=False)
    as_turn = Encoder(tokenizer, Template(), encoder_decoder=False)
    turn = ({"role": "user", "content": "abc"},)
    assert encoder(Example("abc=", "d")) == as_turn(Example(turn, "d"))
    assert encoder(Example("abc=", "d")) != as_turn(Example("abc", "d"))


ADD = {"type": "function", "function": {"name": "add"}}


def test_tools_beside_a_text_prompt_are_shown_in_its_turn() -> None:
    tokenizer = chatting()
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}" + CHAT
    encoder = Encoder(tokenizer, Template(chat=True), encoder_decoder=False)
    (row,) = as_examples([{"prompt": "abc", "completion": "d", "tools": [ADD]}])
    (asked,) = as_questions([{"prompt": "abc", "tools": [ADD]}])
    turn = ({"role": "user", "content": "abc"},)
    assert encoder(row) == encoder(Example(turn, "d", tools=(ADD,))) != encoder(Example(turn, "d"))
    assert encoder.question(asked).prompt_ids == encoder(row).prompt_ids


def test_tools_that_no_chat_template_shows_are_told() -> None:
    rows = as_examples([{"prompt": "abc", "completion": "d", "tools": tools} for tools in ([ADD], [], None)])
    encoder = Encoder(chatting(), Template(), encoder_decoder=False)
    found = audit(Task("t", rows, []), encoder, tiny_model("llama"), EvaluationOptions())
    (remark,) = found.remarks
    assert remark.startswith("t: 1 of 3 rows have tools that the model isn't shown")


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (CHAT, 0),
        ("{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}", 1),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", 1),
        ("{% for m in messages %}{% if m.role == 'user' %}[I] {{ m.content }} [/I]"
         "{% else %} {{ m.content }};{% endif %}{% endfor %}", 0),
    ],
)  # fmt: skip
def test_a_template_that_begins_no_answer_is_told_once(template: str, told: int) -> None:
    tokenizer = chatting()
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer, Template(chat=True), encoder_decoder=False)
    model, said = tiny_model("llama"), []
    for name in ("a", "b"):
        task = Task(name, [Example("abc", "d")], [])
        said += audit(task, encoder.apart(), model, EvaluationOptions()).remarks
    assert len([line for line in said if "doesn't begin an answer" in line]) == len(said) == told


def test_a_task_without_tools_is_known_by_the_digest_it_had() -> None:
    rows = as_examples([{"prompt": "abc", "completion": "d", "tools": []}])
    assert repr(rows) == "[Example(prompt='abc', completion='d', references=(), tools=())]"


def test_a_long_one_is_cut_inside_the_turn() -> None:
    encoder = Encoder(chatting(), Template(chat=True, max_prompt_tokens=3), encoder_decoder=False)
    row = encoder(Example("abcde", "d"))
    assert row.cut == 2
    assert row.prompt_ids == encoder(Example("abc", "d")).prompt_ids


def test_its_answer_ends_as_a_turn_ends_and_so_is_asked() -> None:
    tokenizer = chatting()
    end = tokenizer.convert_ids_to_tokens(5)
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    tokenizer.chat_template = CHAT.replace(";", end)
    encoder = Encoder(tokenizer, Template(chat=True), encoder_decoder=False)
    assert encoder(Example("ab", "d")).completion_ids[-1:] == [5]
    asked = encode_task(Task("t", [], [Example("ab", "d")]), encoder, EvaluationOptions())
    assert asked.stop_ids == [5, tokenizer.eos_token_id]


def test_a_generated_memory_is_opened_inside_the_turn() -> None:
    encoder = Encoder(chatting(), Template(chat=True), encoder_decoder=False)
    rows = [Example(f"copy {word}", word) for word in ("ab", "cd", "ef")]
    opening = opening_of(rows, encoder, "t")
    whole = [*opening.given, *encoder.text.ids("ab"), *opening.closing]
    assert encoder(rows[0]).prompt_ids[: len(whole)] == whole
    assert opening.prompt("copy gh") == "copy gh"
    assert "user" in encoder.text_of(opening.before)


def test_a_frame_of_text_beside_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`prompt` doesn't combine with `chat: true`"):
        validate(Template, {"chat": True, "prompt": "Q: {prompt}"}, "test")


def test_without_a_chat_template_it_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"template.chat: the tokenizer has no chat template.*template.prompt"
    ):
        Encoder(toy_tokenizer(), Template(chat=True), encoder_decoder=False)


@pytest.mark.parametrize(("given", "chat"), [([], True), (["template.chat=false"], False)])
def test_learn_asks_an_instruct_model_in_its_template_unless_told(
    given: list[str], chat: bool, tmp_path: Path
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    chatting().save_pretrained(tmp_path / "model")
    rows = [json.dumps({"prompt": f"{i}=", "completion": "ab"}) + "\n" for i in range(20)]
    (tmp_path / "may.jsonl").write_text("".join(rows))
    command = [
        "learn",
        str(tmp_path / "may.jsonl"),
        "--skills",
        str(tmp_path / "s"),
        "--strategy",
        "sequential",
    ]
    shown = CliRunner().invoke(
        app, [*command, "--model", str(tmp_path / "model"), "training.max_steps=1", *given]
    )
    assert shown.exit_code == 0, shown.output
    assert yaml.safe_load((tmp_path / "s/config.yaml").read_text())["template"]["chat"] == chat
    again = CliRunner().invoke(app, [*command[:1], str(tmp_path / "may.jsonl"), *command[2:4]])
    assert again.exit_code == 0, again.output
