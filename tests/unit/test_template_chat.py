"""template.chat: a text prompt as a user turn, the default of `holdfast learn` for an instruct model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from holdfast.cli import app
from holdfast.errors import DataError
from holdfast.tasks import Encoder, Example, Template, toy_tokenizer
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


def test_a_long_one_is_cut_inside_the_turn() -> None:
    encoder = Encoder(chatting(), Template(chat=True, max_prompt_tokens=3), encoder_decoder=False)
    row = encoder(Example("abcde", "d"))
    assert row.cut == 2
    assert row.prompt_ids == encoder(Example("abc", "d")).prompt_ids


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
