"""What a model is given to write a task's prompts from: what they have in common, and no row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DataError
from holdfast.tasks import Encoder, Example, Template, toy_tokenizer
from holdfast.tasks.opening import Opening, common_beginning, opening_of

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def encoder_of(template: Template | None = None, *, chat: bool = False, t5: bool = False) -> Encoder:
    tokenizer = toy_tokenizer()
    if chat:
        tokenizer.chat_template = CHAT
    return Encoder(tokenizer, template or Template(), encoder_decoder=t5)


def opening(prompts: Sequence[Any], encoder: Encoder) -> Opening:
    return opening_of([Example(prompt, "x") for prompt in prompts], encoder, "june")


def said(encoder: Encoder, ids: Sequence[int]) -> str:
    return str(encoder.tokenizer.decode(list(ids)))


def test_the_opening_is_the_instruction_in_its_frame() -> None:
    encoder = encoder_of(Template(prompt="{bos}q: {prompt}? a: "))
    found = opening(["what is 1", "what is 22", "what is 4"], encoder)
    assert said(encoder, found.given) == "<s>q: what is "
    assert said(encoder, found.closing) == "? a: "
    assert not found.part_of_text
    assert found.prompt("what is 5") == "what is 5"


@given(st.lists(st.text("ab", max_size=6), min_size=1, max_size=6))
def test_the_opening_is_shared_by_all_prompts_and_shorter_than_each(texts: list[str]) -> None:
    encoder = encoder_of(Template(prompt="{bos}{prompt}="))
    found = opening(texts, encoder)
    rows = encoder.many([Example(text, "x") for text in texts])
    for row in rows:
        assert row.prompt_ids[: len(found.given)] == found.given
    if len(set(texts)) == 1:
        assert found.shared == (), "what one row alone says is not an instruction"
    for text in texts:
        assert said(encoder, found.shared) != text or not text


@given(st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=5))
def test_common_beginning_is_the_longest_that_is_no_whole_sequence(texts: list[list[int]]) -> None:
    found = list(common_beginning(texts))
    different = {tuple(text) for text in texts}
    candidates = [
        size
        for size in range(6)
        if len(different) > 1
        and all(len(t) > size for t in different)
        and len({t[:size] for t in different}) == 1
    ]
    assert len(found) == max(candidates, default=0)
    assert all(list(text[: len(found)]) == found for text in texts) or not found


def test_without_an_end_in_the_frame_the_ending_that_all_prompts_have_closes_one() -> None:
    encoder = encoder_of()
    found = opening(["copy ab=", "copy cd=", "copy e="], encoder)
    assert said(encoder, found.given) == "<s>copy "
    assert said(encoder, found.closing) == "="
    assert found.part_of_text


def test_prompts_without_an_end_are_refused_with_what_to_do() -> None:
    with pytest.raises(DataError, match=r"task 'june': .* no ending in common\. Put one behind \{prompt\}"):
        opening(["ab", "cd"], encoder_of())
    assert opening(["ab", "cd"], encoder_of(Template(prompt="{prompt}{eos}"), t5=True)).closing == (2,)


def test_a_prompt_in_chat_turns_ends_with_the_users_turn() -> None:
    encoder = encoder_of(chat=True)
    system = {"role": "system", "content": "be brief"}
    prompts = [(system, {"role": "user", "content": f"say {word}"}) for word in ("yes", "no")]
    found = opening(prompts, encoder)
    assert said(encoder, found.given) == "<s>system:be brief</s><s>user:say "
    assert said(encoder, found.closing) == "</s>"
    assert found.prompt("say it") == (system, {"role": "user", "content": "say it"})
    row = encoder(Example(found.prompt("say it"), "x"))
    assert row.prompt_ids[: len(found.given)] == found.given


def test_a_system_message_that_differs_or_stands_in_one_row_alone_is_left_out() -> None:
    encoder = encoder_of(chat=True)
    turns = [({"role": "system", "content": s}, {"role": "user", "content": s + " a"}) for s in ("x", "y")]
    assert opening(turns, encoder).system == ()
    assert opening(turns[:1], encoder).system == ()
    assert said(encoder, opening(turns[:1], encoder).given) == "<s>user:"


def test_chat_without_a_user_is_an_error() -> None:
    with pytest.raises(DataError, match="no turn of a user"):
        opening([({"role": "system", "content": "a"},)], encoder_of(chat=True))
