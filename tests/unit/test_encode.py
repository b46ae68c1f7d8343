"""Templates, encoding and collation."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import PreTrainedTokenizerFast

from holdfast.errors import DataError
from holdfast.tasks.encode import Encoded, Encoder, Template, collate, collate_prompts
from holdfast.tasks.task import Example

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ :\n?|"


def character_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *LETTERS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", **special)


TOKENIZER = character_tokenizer(bos_token="<s>", eos_token="</s>")
words = st.text("abcxyz ", min_size=1, max_size=12).filter(str.strip)
encoded_rows = st.lists(
    st.builds(
        Encoded,
        st.lists(st.integers(3, 40), min_size=1, max_size=9),
        st.lists(st.integers(3, 40), min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=6,
)


def encoder(encoder_decoder: bool = False, **template: object) -> Encoder:
    return Encoder(TOKENIZER, Template(**template), encoder_decoder=encoder_decoder)


def text_of(ids: list[int]) -> str:
    return TOKENIZER.decode(ids)


def test_frame_prompt_and_answer_are_put_together_as_the_template_says():
    row = encoder(prompt="{bos}{prompt}\nAnswer: ", strip="Answer:")(Example("what is it\n\nAnswer: ", "cat"))
    assert text_of(row.prompt_ids) == "<s>what is it\nAnswer: "
    assert text_of(row.completion_ids) == "cat</s>"
    assert row.prompt_ids[0] == TOKENIZER.bos_token_id
    assert row.completion_ids[-1] == TOKENIZER.eos_token_id
    assert row.cut == row.completion_cut == 0


def test_a_row_is_encoded_once_until_it_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    encode, calls = encoder(), []
    own = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, example: calls.append(1) or own(self, example))
    rows = [Example("ab", "c"), Example("ab", "c"), Example("b", "c")]
    first = encode.many(rows)
    assert encode.many([*reversed(rows), Example("b", "c")]) == [*reversed(first), first[2]]
    assert len(calls) == 4, "another example that is equal is another one"
    encode.forget()
    assert encode.many(rows) == first
    assert len(calls) == 7


def test_tokens_take_four_bytes_each_and_can_not_be_changed_by_who_looks_at_them() -> None:
    long = Encoded(range(1000), [])
    assert sum(sys.getsizeof(part) for part in long._values()[:2]) < 4500
    long.prompt_ids.append(7)
    assert long.prompt_ids == list(range(1000))
    assert long == Encoded(range(1000), [])
    assert hash(long) == hash(Encoded(range(1000), []))
    assert long != Encoded(range(1000), [], cut=1)


def test_without_strip_the_prompt_is_taken_to_the_letter():
    assert text_of(encoder(prompt="{prompt}")(Example("ab \n", "c")).prompt_ids) == "ab \n"


@settings(deadline=None)
@given(text=words, answer=words, limit=st.integers(1, 6), keep=st.sampled_from(["first", "last"]))
def test_cutting_touches_neither_frame_nor_completion(text, answer, limit, keep):
    full = encoder(prompt="{bos}Q: {prompt}\nA: ")(Example(text, answer))
    row = encoder(prompt="{bos}Q: {prompt}\nA: ", max_prompt_tokens=limit, keep=keep)(Example(text, answer))
    kept = text[:limit] if keep == "first" else text[-limit:]
    assert text_of(row.prompt_ids) == f"<s>Q: {kept}\nA: "
    assert row.completion_ids == full.completion_ids
    assert row.cut == max(0, len(text) - limit) == len(full.prompt_ids) - len(row.prompt_ids)


def test_a_too_long_answer_keeps_its_end_token_and_says_what_was_cut():
    row = encoder(max_completion_tokens=2)(Example("a", "bcde"))
    assert text_of(row.completion_ids) == "bc</s>"
    assert row.completion_cut == 2


def test_a_tokenizer_without_special_tokens_leaves_their_places_empty():
    row = Encoder(character_tokenizer(), Template(), encoder_decoder=True)(Example("ab", "c"))
    assert text_of(row.prompt_ids) == "ab"
    assert text_of(row.completion_ids) == "c"


@pytest.mark.parametrize("completion", ["", "  \n"])
def test_an_empty_completion_is_an_error_that_names_the_row(completion):
    with pytest.raises(DataError, match=r"row 2: empty completion \(prompt 'why'\)"):
        encoder().many([Example("a", "b"), Example("why", completion)])


def test_an_empty_prompt_is_an_error_for_a_causal_model_only():
    with pytest.raises(DataError, match="empty prompt"):
        encoder(prompt="{prompt}")(Example("", "b"))
    assert encoder(encoder_decoder=True, prompt="{prompt}")(Example("", "b")).prompt_ids == []


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"prompt": "{bos}"}, r"\{prompt\} must stand in the template exactly once"),
        ({"completion": "{completion}{completion}"}, r"\{completion\} must stand .* exactly once"),
        ({"prompt": "{prompt}{sep}"}, r"unknown placeholder \{sep\}; allowed here: \{prompt\}, \{bos\}"),
        ({"max_prompt_tokens": 0}, "greater than or equal to 1"),
        ({"promt": "{prompt}"}, "Extra inputs are not permitted"),
    ],
)
def test_a_wrong_template_says_what_is_wrong(template, message):
    with pytest.raises(ValidationError, match=message):
        Template(**template)


CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)


def chat_encoder(**template: object) -> Encoder:
    tokenizer = character_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT
    return Encoder(tokenizer, Template(**template), encoder_decoder=False)


def test_chat_messages_go_through_the_tokenizers_chat_template():
    row = chat_encoder()(Example(({"role": "user", "content": "hello"},), "b"))
    assert text_of(row.prompt_ids) == "user: hello\nA: "
    assert text_of(row.completion_ids) == "b</s>"


@pytest.mark.parametrize(("keep", "left"), [("first", "abcd"), ("last", "ghij")])
def test_a_long_chat_loses_text_of_its_longest_message_and_no_frame(keep, left):
    messages = ({"role": "system", "content": "xyz"}, {"role": "user", "content": "abcdefghij"})
    row = chat_encoder(max_prompt_tokens=7, keep=keep)(Example(messages, "b"))
    assert text_of(row.prompt_ids) == f"system: xyz\nuser: {left}\nA: "
    assert row.cut == 6
    assert messages[1]["content"] == "abcdefghij"


def test_a_chat_prompt_without_chat_template_is_an_error():
    with pytest.raises(DataError, match=r"row 1: .*the tokenizer has no chat template"):
        encoder().many([Example(({"role": "user", "content": "a"},), "b")])


@settings(deadline=None)
@given(rows=encoded_rows, side=st.sampled_from(["left", "right"]))
def test_labels_cover_exactly_the_completion(rows, side):
    batch = collate(rows, 0, encoder_decoder=False, side=side)
    for i, row in enumerate(rows):
        labels, ids = batch["labels"][i], batch["input_ids"][i]
        assert labels[labels != -100].tolist() == row.completion_ids
        assert torch.equal(ids[labels != -100], labels[labels != -100])
        assert ids[batch["attention_mask"][i] == 1].tolist() == row.prompt_ids + row.completion_ids


@settings(deadline=None)
@given(rows=encoded_rows)
def test_left_and_right_padding_give_the_same_tokens_at_the_same_positions(rows):
    left, right = (collate(rows, 0, encoder_decoder=False, side=side) for side in ("left", "right"))
    for i in range(len(rows)):
        for key in ("input_ids", "labels", "position_ids"):
            a, b = (batch[key][i][batch["attention_mask"][i] == 1] for batch in (left, right))
            assert a.tolist() == b.tolist()
        positions = right["position_ids"][i][right["attention_mask"][i] == 1]
        assert positions.tolist() == list(range(len(positions)))


@settings(deadline=None)
@given(rows=encoded_rows, pad_id=st.sampled_from([0, 2, 7]))
def test_masks_and_labels_do_not_depend_on_the_padding_token(rows, pad_id):
    reference, other = (collate(rows, pad, encoder_decoder=False) for pad in (0, pad_id))
    assert all(torch.equal(reference[k], other[k]) for k in ("attention_mask", "labels", "position_ids"))


@settings(deadline=None)
@given(rows=encoded_rows, side=st.sampled_from(["left", "right"]))
def test_encoder_decoder_batches_keep_prompt_and_answer_apart(rows, side):
    batch = collate(rows, 0, encoder_decoder=True, side=side)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    for i, row in enumerate(rows):
        assert batch["input_ids"][i][batch["attention_mask"][i] == 1].tolist() == row.prompt_ids
        assert batch["labels"][i].tolist()[: len(row.completion_ids)] == row.completion_ids
        assert set(batch["labels"][i].tolist()[len(row.completion_ids) :]) <= {-100}


@settings(deadline=None)
@given(rows=encoded_rows)
def test_prompts_to_generate_from_end_at_the_last_column_of_a_causal_batch(rows):
    batch = collate_prompts(rows, 0, encoder_decoder=False)
    assert batch["attention_mask"][:, -1].all()
    assert batch["input_ids"][:, -1].tolist() == [row.prompt_ids[-1] for row in rows]
    assert set(collate_prompts(rows, 0, encoder_decoder=True)) == {"input_ids", "attention_mask"}


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        collate([], 0, encoder_decoder=False)
    with pytest.raises(ValueError, match="at least one row"):
        collate_prompts([], 0, encoder_decoder=False)
