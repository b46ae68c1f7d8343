"""What is trained on and scored is what the user wrote: control tokens, chats, Unicode, long answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.decoders import Fuse
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from holdfast.errors import DataError
from holdfast.evaluation.answers import generate, longer_than_context
from holdfast.evaluation.audit import audit
from holdfast.evaluation.evaluate import EvaluationOptions, encode_task, evaluate_task
from holdfast.evaluation.predictions import file_safe
from holdfast.evaluation.scores import exact_match, rouge_l
from holdfast.models import context_length, tiny_llama
from holdfast.tasks import Encoder, Example, Task, Template
from tiny_t5 import tiny_t5

LETTERS = "abcdefghijklmnopqrstuvwxyz<>/|_ :\n"
CHAT = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
USER = {"role": "user", "content": "hi"}


def make_tokenizer(*own: str, chat: str | None = None, nfkc: bool = False) -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *LETTERS, "1"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = Fuse()
    if nfkc:
        backend.normalizer = normalizers.NFKC()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
    special = [*own, "<|turn|>", "<|end|>"] if chat else [*own]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = chat
    return tokenizer


def encoder_of(tokenizer: Any, **template: Any) -> Encoder:
    return Encoder(tokenizer, Template(**template), encoder_decoder=False)


class Says(nn.Module):
    """A causal model that answers every prompt with the same tokens, one after another."""

    def __init__(self, tokenizer: Any, answer: list[int]) -> None:
        super().__init__()
        self.inner = tiny_llama(tokenizer, hidden=16, layers=1)
        self.config, self.generation_config = self.inner.config, self.inner.generation_config
        self.answer = answer

    def forward(self, input_ids: Any = None, position_ids: Any = None) -> Any:
        raise NotImplementedError

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        config = self.generation_config
        said = []
        for token in self.answer[: config.max_new_tokens]:
            said.append(token)
            if token in config.eos_token_id:
                break
        return torch.cat([input_ids, torch.tensor([said]).expand(len(input_ids), -1)], dim=1)


def score_of(task: Task, tokenizer: Any, answer: list[int]) -> float:
    model = Says(tokenizer, answer)
    return evaluate_task(model, tokenizer, task, encoder_of(tokenizer), options=EvaluationOptions()).score


# control tokens


def test_control_tokens_in_a_users_text_are_text() -> None:
    tokenizer = make_tokenizer()
    row = encoder_of(tokenizer)(Example("a</s>b<s>", "c</s>d<pad>"))
    assert row.prompt_ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in row.prompt_ids
    assert row.completion_ids.index(tokenizer.eos_token_id) == len(row.completion_ids) - 1
    assert tokenizer.decode(row.prompt_ids) == "<s>a</s>b<s>"
    assert tokenizer.decode(row.completion_ids) == "c</s>d<pad></s>"


def test_special_tokens_that_were_added_for_texts_stay_tokens_beside_control_tokens() -> None:
    tokenizer = make_tokenizer("<yes>")
    yes = tokenizer.convert_tokens_to_ids("<yes>")
    row = encoder_of(tokenizer)(Example("a</s><yes>b", "<yes>"))
    assert row.prompt_ids.count(yes) == 1
    assert tokenizer.eos_token_id not in row.prompt_ids
    assert row.completion_ids == [yes, tokenizer.eos_token_id]


pieces = st.lists(st.sampled_from(["</s>", "<s>", "<pad>", "<unk>", "<|end|>", "<|turn|>", "a", "< ", "b"]))


@settings(deadline=None)
@given(prompt=pieces.map("".join), answer=pieces.map(lambda p: "".join(p) + "a"))
def test_no_text_forges_an_end_or_a_turn(prompt: str, answer: str) -> None:
    tokenizer = make_tokenizer(chat=CHAT)
    control = {tokenizer.convert_tokens_to_ids(t) for t in ("</s>", "<s>", "<pad>", "<|end|>", "<|turn|>")}
    encoder = encoder_of(tokenizer)
    row = encoder(Example(prompt, answer))
    assert [t for t in row.prompt_ids if t in control] == [tokenizer.bos_token_id]
    assert [t for t in row.completion_ids if t in control] == [tokenizer.eos_token_id]
    assert tokenizer.decode(row.prompt_ids) == f"<s>{prompt}"
    chat = encoder(Example(({"role": "user", "content": prompt},), answer))
    assert tokenizer.decode(chat.prompt_ids) == f"<|turn|>user\n{prompt}<|end|>\n<|turn|>assistant\n"
    end, turn = (tokenizer.convert_tokens_to_ids(t) for t in ("<|end|>", "<|turn|>"))
    assert [t for t in chat.prompt_ids if t in control] == [turn, end, turn]


def test_an_answer_that_is_an_added_special_token_is_scored() -> None:
    tokenizer = make_tokenizer("<yes>", "<no>")
    yes, eos = tokenizer.convert_tokens_to_ids("<yes>"), tokenizer.eos_token_id
    task = Task("t", [Example("a", "<no>")], [Example("b", "<yes>")])
    assert score_of(task, tokenizer, [yes, eos]) == 100.0
    assert score_of(task, tokenizer, [tokenizer.convert_tokens_to_ids("<no>"), eos]) == 0.0
    plain = Task("t", [Example("a", "x")], [Example("b", "a")])  # here it is noise, as T5's sentinels are
    assert score_of(plain, tokenizer, [yes, tokenizer.convert_tokens_to_ids("a"), eos]) == 100.0


def test_check_counts_rows_with_control_tokens_and_names_them() -> None:
    tokenizer = make_tokenizer()
    task = Task("t", [Example("a</s>b</s>", "c"), Example("d", "e")], [Example("<s>", "</s>a")])
    found = audit(
        task, encoder_of(tokenizer), tiny_llama(tokenizer, hidden=16, layers=1), EvaluationOptions()
    )
    assert found.problems == []
    assert found.remarks == [
        "t: 2 rows have the tokenizer's control tokens in their text, such as '</s>' (2), '<s>' (1); "
        "they are read as plain text."
    ]


# chats


def test_a_chat_answer_ends_as_the_template_ends_a_turn_and_generation_stops_there() -> None:
    tokenizer = make_tokenizer(chat=CHAT)
    end, eos = tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.eos_token_id
    encoder = encoder_of(tokenizer)
    row = encoder(Example((USER,), "ho"))
    assert tokenizer.decode(row.completion_ids) == "ho<|end|>"
    assert encoder.stop_ids(chat=True) == [end, eos]
    assert encoder.stop_ids(chat=False) == [eos]
    task = Task("t", [Example((USER,), "ho")], [Example((USER,), "ho")])
    h, o = (tokenizer.convert_tokens_to_ids(c) for c in "ho")
    assert score_of(task, tokenizer, [h, o, end, h, h]) == 100.0
    assert score_of(task, tokenizer, [h, o, eos]) == 100.0
    ranked = Task("t", task.train, task.test, "options", ("ho", "hi"))
    choices = encode_task(ranked, encoder, EvaluationOptions()).choices
    assert [tokenizer.decode(ids) for _, ids in choices] == ["ho<|end|>", "hi<|end|>"]


def test_an_end_that_the_user_has_set_is_kept() -> None:
    tokenizer = make_tokenizer(chat=CHAT)
    encoder = encoder_of(tokenizer, completion="{completion} {eos}")
    assert tokenizer.decode(encoder(Example((USER,), "ho")).completion_ids) == "ho </s>"
    assert encoder.stop_ids(chat=True) == [tokenizer.eos_token_id]


NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
)


def test_a_template_that_refuses_a_role_is_an_error_that_names_the_row() -> None:
    tokenizer = make_tokenizer(chat=NO_SYSTEM + CHAT)
    chat = ({"role": "system", "content": "be"}, USER)
    with pytest.raises(DataError, match=r"row 2: .*refuses these messages \(system, user\): System role not"):
        encoder_of(tokenizer).many([Example((USER,), "ho"), Example(chat, "ho")])
    task = Task("t", [Example(chat, "ho")], [Example((USER,), "ho")])
    model = tiny_llama(tokenizer, hidden=16, layers=1)
    (problem,) = audit(task, encoder_of(tokenizer), model, EvaluationOptions()).problems
    assert problem.startswith("t: row 1: the tokenizer's chat template refuses these messages")


@pytest.mark.parametrize(
    ("chat", "messages", "tools", "what"),
    [
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
            ({"role": "system", "content": "be brief"}, USER),
            (),
            "the system's message",
        ),
        (
            CHAT,
            (USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}),
            (),
            "the tool call 'add'",
        ),
        (CHAT, (USER,), ({"type": "function", "function": {"name": "add"}},), "the tool 'add'"),
        (
            "{{ messages[-1].content[:1] }}",
            ({"role": "user", "content": "a</s>"},),
            (),
            "the user's message",
        ),
        (
            "{% for m in messages %}{{ m.content[:2] }}{% endfor %}",
            (USER, {"role": "assistant", "content": "ho</s>"}),
            (),
            "a part of a message",
        ),
        (
            "{% for m in messages if m.role in ('system', 'user', 'assistant') %}{{ m.content }}{% endfor %}",
            (USER, {"role": "assistant", "content": "get rain"}, {"role": "tool", "content": "it rains"}),
            (),
            "the tool's message",
        ),
    ],
)
def test_a_template_that_leaves_something_out_is_refused(
    chat: str, messages: Any, tools: Any, what: str
) -> None:
    with pytest.raises(DataError, match=f"chat template leaves out {what}"):
        encoder_of(make_tokenizer(chat=chat))(Example(messages, "ho", tools=tools))


@pytest.mark.parametrize(
    "shown", ["m.content | tojson", "m.content | trim", "m.content.replace('\\n\\n', '\\n')"]
)
def test_a_template_may_change_spaces_write_json_and_shorten_answers(shown: str) -> None:
    chat = f"{{% for m in messages %}}{{{{ {shown} if m.role != 'assistant' else 'x' }}}}{{% endfor %}}"
    said = (
        {**USER, "content": " a\n\nb "},
        {"role": "assistant", "content": "c"},
        {"role": "tool", "content": "d"},
    )
    assert encoder_of(make_tokenizer(chat=chat))(Example(said, "ho")).prompt_ids


def test_tools_and_their_calls_reach_the_template() -> None:
    chat = (
        "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{% for m in messages %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}:{% endfor %}"
    )
    tokenizer = make_tokenizer(chat=chat)
    turn = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "sum"}}]}
    row = encoder_of(tokenizer)(Example((USER, turn), "ho", tools=({"function": {"name": "sum"}},)))
    assert tokenizer.decode(row.prompt_ids) == "sum hi:sum:"


# Unicode


@pytest.mark.parametrize(
    ("said", "expected", "score"),
    [
        ("caf\u00e9", "cafe\u0301", 100.0),  # composed and decomposed
        ("1", "\u2460", 100.0),  # a circled one, which T5's tokenizer writes as 1
        ("fi", "\ufb01", 100.0),  # a ligature
        ("STRASSE", "stra\u00dfe", 100.0),
        ("\u0130", "i\u0307", 100.0),
        ("cafe", "caf\u00e9", 0.0),
    ],
)
def test_answers_that_look_the_same_are_the_same(said: str, expected: str, score: float) -> None:
    assert exact_match(said, [expected]) == score
    assert rouge_l(said, [expected]) == score


@given(st.text(min_size=1).filter(str.strip))
def test_every_answer_is_right_in_any_unicode_form(text: str) -> None:
    import unicodedata

    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert exact_match(unicodedata.normalize(form, text), [text]) == 100.0
        assert rouge_l(unicodedata.normalize(form, text), [text]) == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("said", "expected", "score"),
    [
        ("猫が好き", "猫が好き", 100.0),
        ("猫", "猫が好き", 40.0),  # precision 1, recall 1/4
        ("кошка спит", "кошка ест", 50.0),
        ("the cats sat", "the cat sits", 66.667),  # stems, as rouge-score has them
        ("?", "?", 100.0),
        ("!", "?", 0.0),
    ],
)
def test_rouge_counts_words_of_any_script(said: str, expected: str, score: float) -> None:
    assert rouge_l(said, [expected]) == pytest.approx(score, abs=1e-3)


@given(st.text("abc XY.,!'-_0", min_size=1), st.text("abc XY.,!'-_0", min_size=1))
def test_rouge_of_english_is_that_of_the_library(said: str, expected: str) -> None:
    from rouge_score import rouge_scorer

    own = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True).score(expected, said)["rougeL"].fmeasure
    if any(c.isalnum() for c in expected):
        assert rouge_l(said, [expected]) == pytest.approx(100 * own)


def test_check_counts_answers_that_the_tokenizer_can_not_write() -> None:
    tokenizer = make_tokenizer(nfkc=True)
    tests = [Example("a", "{x}"), Example("a", "b"), Example("a", "é"), Example("a", "Ω", ("Ω", "a"))]
    found = audit(
        Task("t", [Example("a", "b")], [*tests, Example("a", "①")]),
        encoder_of(tokenizer),
        tiny_llama(tokenizer, hidden=16, layers=1),
        EvaluationOptions(),
    )
    (remark,) = found.remarks
    assert remark.startswith("t: 2 of 5 test answers hold characters that the tokenizer lacks")
    assert "'{x}'" in remark


def test_options_that_are_the_same_to_the_model_are_refused() -> None:
    tokenizer = make_tokenizer()
    task = Task("t", [Example("a", "Ω")], [Example("a", "Ω")], "options", ("Ω", "b", "Σ"))
    found = audit(
        task, encoder_of(tokenizer), tiny_llama(tokenizer, hidden=16, layers=1), EvaluationOptions()
    )
    assert found.problems == [
        "t: the options 'Ω' and 'Σ' are the same tokens to this model, so it can't choose between them; "
        "write them with other words."
    ]


# lengths


def test_a_test_answer_longer_than_any_in_training_is_not_cut() -> None:
    tokenizer = make_tokenizer()
    task = Task("t", [Example("a", "b")], [Example("c", "abcdefghij")])
    ids = [tokenizer.convert_tokens_to_ids(c) for c in "abcdefghij"]
    assert score_of(task, tokenizer, [*ids, tokenizer.eos_token_id]) == 100.0


def test_check_names_answers_longer_than_may_be_generated() -> None:
    tokenizer = make_tokenizer()
    task = Task("t", [Example("a", "b")], [Example("c", "abcdefghij"), Example("c", "a")])
    model = tiny_llama(tokenizer, hidden=16, layers=1)
    found = audit(task, encoder_of(tokenizer), model, EvaluationOptions(max_new_tokens=5))
    assert found.remarks == [
        "t: 1 of 2 test answers are longer than evaluation.max_new_tokens = 5, so they can't be produced."
    ]


def small_gpt2(tokenizer: Any, positions: int) -> Any:
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=positions, n_embd=16, n_layer=1, n_head=2, bos_token_id=1
    )
    return GPT2LMHeadModel(config).eval()


def test_generation_ends_where_the_context_does() -> None:
    tokenizer = make_tokenizer()
    model = small_gpt2(tokenizer, 12)
    model.lm_head.weight.data.zero_()  # always <pad>, never the end
    rows = encoder_of(tokenizer).many([Example("a" * 9, "b"), Example("a", "b")])
    answers = generate(model, tokenizer, rows, batch_size=2, max_new_tokens=50)
    assert answers == ["", ""]  # learned positions: one token more would be an index error


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_long_question_shortens_no_answer_to_one_that_leaves_room(size: int) -> None:
    tokenizer = make_tokenizer()
    says = Says(tokenizer, [4] * 20)
    says.config.max_position_embeddings = 12
    rows = encoder_of(tokenizer).many([Example("a" * n, "b") for n in (2, 9, 3, 9, 1)])
    answers = generate(says, tokenizer, rows, batch_size=size, max_new_tokens=6)
    assert [len(answer) for answer in answers] == [6, 2, 6, 2, 6]
    told: list[int] = []

    def engine(rows: Any, rooms: Any, *_: Any) -> list[list[int]]:
        told.extend(rooms)
        return [[4] * room for room in rooms]

    generate(says, tokenizer, rows, batch_size=size, max_new_tokens=6, engine=engine)
    assert told == [6, 2, 6, 2, 6]


def test_rows_that_the_context_does_not_hold_are_numbered() -> None:
    tokenizer = make_tokenizer()
    rows = encoder_of(tokenizer).questions([Example("a" * n, "") for n in (12, 11, 3, 40)])
    assert longer_than_context(small_gpt2(tokenizer, 12), rows) == [0, 3]
    assert longer_than_context(tiny_t5(tokenizer), rows) == []


def test_check_finds_what_does_not_fit_the_context() -> None:
    tokenizer = make_tokenizer()
    model, encoder = small_gpt2(tokenizer, 12), encoder_of(tokenizer)

    def found(prompt: int, answer: int, **more: Any) -> Any:
        task = Task("t", [Example("a", "b")], [Example("a" * prompt, "b" * answer)], **more)
        return audit(task, encoder, model, EvaluationOptions())

    assert found(5, 3).problems == found(5, 3).remarks == []  # <s> 5, 3 </s>: 10, and two more
    assert found(6, 3).remarks == [
        "t: 1 of 1 test prompts leave fewer than 6 tokens to their answer, the longest one 5: the model "
        "takes 12 in all."
    ]
    (problem,) = found(8, 3).problems
    assert "the longest row (prompt and answer) has 13 tokens, the model takes 12; lower template." in problem
    (problem,) = found(8, 1, metric="options", options=("b", "bbb")).problems
    assert "has 13 tokens, the model takes 12" in problem
    task = Task("t", [Example("a" * 8, "bbb")], [Example("a", "b")])
    assert "has 13 tokens" in audit(task, encoder, model, EvaluationOptions()).problems[0]


def test_context_is_known_where_a_model_has_one() -> None:
    tokenizer = make_tokenizer()
    assert context_length(small_gpt2(tokenizer, 12)) == 12
    assert context_length(tiny_llama(tokenizer, hidden=16, layers=1)) == 512
    assert context_length(tiny_t5(tokenizer)) is None


# names of files


@given(st.text(min_size=1), st.text(min_size=1))
def test_any_name_is_a_file_name_and_different_names_stay_different(a: str, b: str) -> None:
    for name in (a, b * 90):
        safe = file_safe(name)
        assert len(safe.encode()) <= 150
        assert safe not in (".", "..")
        assert not {"/", "\0"} & {*safe}
    assert (file_safe(a * 90) == file_safe(b * 90)) == (a * 90 == b * 90)


def test_names_of_250_bytes_can_be_written(tmp_path: Any) -> None:
    from holdfast.evaluation.predictions import write_predictions
    from holdfast.records import Prediction

    said = Prediction(prompt="a", expected=["b"], generated="b", score=100.0)
    for name in ("x" * 250, "é" * 125, "/" * 250, "..", "." * 250):
        write_predictions(tmp_path / f"01-{file_safe(name)}.partial", name, [said])
    assert len([*tmp_path.rglob("*.jsonl")]) == 5
    assert file_safe("glue/mnli v1.1") == "glue%2Fmnli v1.1"
