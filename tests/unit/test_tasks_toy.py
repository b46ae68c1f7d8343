"""The toy suite: every answer checked by other means than the generator's, and what the suite promises."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import DataError
from holdfast.tasks import (
    BASE_TASKS,
    STREAM_TASKS,
    TOY_TASKS,
    Encoder,
    Template,
    ToySource,
    build_stream,
    toy_suite,
    toy_tokenizer,
)
from holdfast.tasks.toy import LETTERS, SIZES, make_task


def is_sorted_copy(letters: str, answer: str) -> bool:
    return Counter(letters) == Counter(answer) and all(x <= y for x, y in itertools.pairwise(answer))


def follows(letters: str, answer: str) -> bool:
    return len(letters) == len(answer) and all(
        (ord(y) - ord(x)) % 8 == 1 for x, y in zip(letters, answer, strict=True)
    )


def is_translation(letters: str, answer: str) -> bool:
    """The same letter always gives the same word, and different letters different ones."""
    pairs = set(zip(letters, answer, strict=True))
    return len(pairs) == len(set(letters)) == len(set(answer))


def looked_up(letters: str, answer: str) -> bool:
    before, key, after = letters.partition("a")
    return bool(key) and "a" not in before + after and after.startswith(answer) and len(answer) == 1


CHECKS: dict[str, Callable[[str, str], bool]] = {
    "copy": lambda x, y: x == y,
    "flip": lambda x, y: len(x) == len(y) and all(x[i] == y[-1 - i] for i in range(len(x))),
    "sort": is_sorted_copy,
    "next": follows,
    "roll": lambda x, y: len(x) == len(y) and y.endswith(x[0]) and y.startswith(x[1:]),
    "swap": lambda x, y: Counter(x) == Counter(y) and all(y[i ^ 1] == x[i] for i in range(len(x) // 2 * 2)),
    "lang": is_translation,
    "head": lambda x, y: len(y) == 1 and x.startswith(y),
    "tail": lambda x, y: len(y) == 1 and x.endswith(y),
    "most": lambda x, y: y in x and not any(letter > y for letter in x),
    "many": lambda x, y: Counter(x)["a"] == int(y),
    "even": lambda x, y: y == ("yes", "no")[sum(letter == "a" for letter in x) % 2],
    "find": looked_up,
    "plus": lambda x, y: ord(y) - 97 == (ord(x[0]) + ord(x[-1]) - 2 * 97) % 4,
    "rise": lambda x, y: y == ("up" if ord(x[-1]) > ord(x[0]) else "down"),
    "kind": lambda x, y: (
        y == ("low" if sum(z in "abcd" for z in x) > sum(z in "efgh" for z in x) else "high")
    ),
}


def test_every_task_has_an_independent_check():
    assert set(CHECKS) == set(TOY_TASKS)
    assert len(TOY_TASKS) >= 8


@pytest.mark.parametrize("name", TOY_TASKS)
@pytest.mark.parametrize("size", [SIZES.start, 4, 5, 8])
def test_answers_are_right_and_prompts_share_one_layout(name, size):
    task = make_task(name, train_rows=15, test_rows=5, seed=3, size=size)
    for row in (*task.train, *task.test):
        word, letters = str(row.prompt).removesuffix("=").split(" ")
        assert word == name
        assert len(word) == 4
        assert row.prompt.endswith("=")
        assert len(letters) == size
        assert set(letters) <= set(LETTERS)
        assert CHECKS[name](letters, row.completion), (letters, row.completion)


@pytest.mark.parametrize("name", TOY_TASKS)
def test_train_and_test_prompts_are_all_different(name):
    task = make_task(name, train_rows=300, test_rows=100)
    prompts = [row.prompt for row in (*task.train, *task.test)]
    assert len(task.train) == 300
    assert len(task.test) == 100
    assert len(set(prompts)) == 400


@pytest.mark.parametrize("name", TOY_TASKS)
def test_no_single_answer_is_right_for_most_prompts(name):
    task = make_task(name, train_rows=400, test_rows=1)
    assert Counter(row.completion for row in task.train).most_common(1)[0][1] < 0.7 * 400


def test_the_suite_is_the_same_for_a_seed_and_another_for_another_seed():
    assert toy_suite(train_rows=20, seed=4) == toy_suite(train_rows=20, seed=4)
    assert toy_suite(train_rows=20, seed=4) != toy_suite(train_rows=20, seed=5)


def test_a_task_does_not_depend_on_its_neighbours():
    alone = toy_suite(["flip"], train_rows=20).tasks[0]
    assert toy_suite(["copy", "flip"], train_rows=20).tasks[1] == alone


def test_the_demo_groups_are_disjoint_and_registered():
    assert set(BASE_TASKS) | set(STREAM_TASKS) <= set(TOY_TASKS)
    assert not set(BASE_TASKS) & set(STREAM_TASKS)
    assert toy_suite(train_rows=1, test_rows=1).names == list(STREAM_TASKS)


def test_a_description_is_one_line():
    assert all(str(task) and "\n" not in str(task) for task in TOY_TASKS.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["filp"]}, r"no task 'filp'\. Did you mean 'flip'\? Allowed: copy, flip"),
        ({"size": 2}, "size must be 3 to 16 letters, got 2"),
        (
            {"size": 3, "train_rows": 600},
            "'flip' of size 3 has fewer than 700 different prompts; ask for fewer rows",
        ),
    ],
)
def test_an_impossible_suite_says_why(arguments, message):
    with pytest.raises(DataError, match=message):
        toy_suite(**({"names": ["flip"]} | arguments))


def test_the_suite_is_a_source():
    stream = build_stream(ToySource(order=["sort", "flip"], train_rows=7, test_rows=3, size=4), seed=2)
    assert stream.names == ["sort", "flip"]
    assert stream.tasks[0] == make_task("sort", 7, 3, seed=2, size=4)
    assert build_stream(ToySource(train_rows=2, test_rows=1)).names == list(STREAM_TASKS)
    with pytest.raises(DataError, match=r"no task 'flap'\. Did you mean 'flip'\?"):
        build_stream(ToySource(order=["flap"]))
    with pytest.raises(DataError, match="'flip' of size 3 has fewer than"):
        build_stream(ToySource(order=["flip"], size=3, train_rows=1000))


def test_every_character_of_the_suite_has_a_token_of_its_own():
    tokenizer = toy_tokenizer()
    encoder = Encoder(tokenizer, Template(), encoder_decoder=False)
    for name in TOY_TASKS:
        for row in make_task(name, 20, 1, size=8).train:
            encoded = encoder(row)
            assert tokenizer.unk_token_id not in encoded.prompt_ids + encoded.completion_ids
            assert len(encoded.prompt_ids) == 1 + len(row.prompt)
            assert tokenizer.decode(encoded.completion_ids, skip_special_tokens=True) == row.completion
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


@settings(deadline=None)
@given(st.text("abcxyz0189 =", min_size=1))
def test_the_tokenizer_gives_back_what_it_was_given(text):
    tokenizer = toy_tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_survives_a_round_trip_to_disk(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = toy_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("flip abc=")["input_ids"] == tokenizer("flip abc=")["input_ids"]
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
