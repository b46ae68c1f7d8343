"""One answer explained: tokens and weights against the engine's own sums, and what a reader sees."""

from __future__ import annotations

import warnings
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import holdfast
from holdfast.attribution import AttributionOptions, attribute_batches, attribute_one
from holdfast.cli import app
from holdfast.errors import ConfigError, ConservationError, DataError
from holdfast.tasks import Encoder, Example, Template, toy_tokenizer
from model_families import family
from tiny_models import tiny_model

TOKENIZER = toy_tokenizer()


class Collect:
    def __init__(self) -> None:
        self.sums: dict[str, float] = {}

    def update(self, name: str, weight: torch.Tensor, grad_S: torch.Tensor) -> None:
        self.sums[name] = float((weight * grad_S[0]).sum())


def template_of(kind: str) -> dict[str, str]:
    return {"prompt": "{prompt}{eos}"} if kind == "t5" else {}


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("halves", ["none", "path"])
def test_tokens_and_weights_add_up_to_the_answers_logits(kind: str, halves: str) -> None:
    model = tiny_model(kind).double().eval()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    found = holdfast.explain(
        model, TOKENIZER, "copy ab=", "ab", template=template_of(kind), options={"halves": halves}
    )
    parts = found.elsewhere
    total = float(found.relevance.sum()) + parts["biases"] + parts["absorbed"] - parts["created"]
    total += parts["weights"] if halves == "path" else 0.0
    assert total == pytest.approx(found.target, rel=1e-9)
    assert found.conservation_error < 1e-9
    encoder = Encoder(TOKENIZER, Template(**template_of(kind)), encoder_decoder=kind == "t5")
    row = encoder(Example("copy ab=", "ab"))
    fold: Any = Collect()
    attribute_batches(
        model,
        [row],
        options=AttributionOptions(halves=halves),
        fold=fold,
        pad_id=TOKENIZER.pad_token_id,
        correct_only=False,
    )
    assert fold.sums.keys() == found.weights.keys()
    for name, tensor in found.weights.items():
        assert float(tensor.double().sum()) == pytest.approx(fold.sums[name], rel=1e-4, abs=1e-6)
    with torch.no_grad():
        ids, labels = torch.tensor([row.prompt_ids]), torch.tensor([row.completion_ids])
        if kind == "t5":
            logits = model(input_ids=ids, labels=labels).logits[0]
        else:
            logits = model(torch.cat([ids, labels], 1)).logits[0, ids.shape[1] - 1 : -1]
    assert found.target == pytest.approx(float(logits.gather(1, labels.T).sum()), rel=1e-6)
    assert len(found.tokens) == len(found.relevance)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rules": "paper", "halves": "path"}, "logits {:.4g} = "),
        ({"of": "log_probability"}, "logits above the mean of all tokens, by probability, {:.4g} = "),
    ],
)
def test_the_target_is_what_it_is_called(options: dict[str, Any], said: str) -> None:
    model = tiny_model("llama").double().eval()
    found = holdfast.explain(model, TOKENIZER, "copy ab=", "ab", options=options)
    row = Encoder(TOKENIZER, Template(), encoder_decoder=False)(Example("copy ab=", "ab"))
    with torch.no_grad():
        ids, labels = torch.tensor([row.prompt_ids]), torch.tensor([row.completion_ids])
        logits = model(torch.cat([ids, labels], 1)).logits[0, ids.shape[1] - 1 : -1]
    expected = logits.gather(1, labels.T)[:, 0]
    if "of" in options:
        expected = expected - (logits * logits.softmax(-1)).sum(-1)
    assert found.target == pytest.approx(float(expected.sum()), rel=1e-6)
    assert sum(found.parts.values()) == pytest.approx(found.target, rel=1e-6)
    assert found.adds_up.startswith(said.format(found.target))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("halves", ["none", "path"])
def test_the_parts_of_a_contrast_add_up_to_the_difference_of_the_engines_sums(kind: str, halves: str) -> None:
    model, template = tiny_model(kind).double().eval(), template_of(kind)
    options = AttributionOptions(halves=halves)
    with pytest.warns(UserWarning, match="'ab' has 3 tokens and 'bacd' 5, .*part of the difference"):
        found = holdfast.explain(
            model, TOKENIZER, "copy ab=", "ab", instead_of="bacd", template=template, options=options
        )
    encoder = Encoder(TOKENIZER, Template(**template), encoder_decoder=kind == "t5")
    rows = [encoder(Example("copy ab=", answer)) for answer in ("ab", "bacd")]
    ours, other = (
        attribute_one(model, row, options=options, fold=Collect(), pad_id=TOKENIZER.pad_token_id)[0]
        for row in rows
    )
    lengths = [len(row.completion_ids) for row in rows]
    assert list(found.logits) == lengths
    assert found.target == pytest.approx(ours.target - other.target, rel=1e-9)
    parts = found.parts
    assert parts["tokens"] == pytest.approx(float(found.relevance.sum()), rel=1e-9)
    assert abs(parts["answers"]) > 1e-3
    assert parts["tokens"] + parts["answers"] == pytest.approx(ours.inputs - other.inputs, rel=1e-6)
    assert sum(parts.values()) == pytest.approx(found.target, rel=1e-8)
    assert ("weights" in parts) == (halves == "path")
    off = abs(sum(parts.values()) - found.target) / max(abs(ours.target), abs(other.target))
    assert found.conservation_error == pytest.approx(off)
    for shown in (repr(found), found._repr_html_().replace("&#x27;", "'")):
        assert f"the answers' own tokens {parts['answers']:+.4g}" in shown
        assert f"the sum of {lengths[0]} less that of {lengths[1]}" in shown
    other_options = holdfast.explain(
        model, TOKENIZER, "copy ab=", "ba", template=template, options={"rules": "paper"}
    )
    with pytest.raises(ConfigError, match="under the same options"):
        holdfast.explain(model, TOKENIZER, "copy ab=", "ab", template=template).instead_of(other_options)


def test_a_contrast_of_first_tokens_or_of_as_many_is_no_matter_of_lengths() -> None:
    model, first = tiny_model("llama").eval(), {"target": "first"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = holdfast.explain(model, TOKENIZER, "copy ab=", "ab", instead_of="ba")
        of_first = holdfast.explain(model, TOKENIZER, "copy ab=", "ab", instead_of="bacd", options=first)
    assert not same.uneven
    assert of_first.logits == (1, 1)
    assert "less that of" not in repr(same) + repr(of_first)


def test_two_answers_are_contrasted_on_the_prompt() -> None:
    model = tiny_model("llama").eval()
    ours, other = (holdfast.explain(model, TOKENIZER, "copy ab=", x) for x in ("ab", "cab"))
    found = ours.instead_of(other)
    assert found.tokens == ours.tokens[: ours.asked]
    assert torch.equal(found.relevance, ours.relevance[: ours.asked] - other.relevance[: ours.asked])
    assert found.target == ours.target - other.target
    name = next(iter(found.weights))
    assert torch.equal(found.weights[name], ours.weights[name] - other.weights[name])
    assert "instead of" in repr(found)
    with pytest.raises(ConfigError, match="on one prompt"):
        ours.instead_of(holdfast.explain(model, TOKENIZER, "copy ba=", "ab"))
    with pytest.raises(ConfigError, match="'ab' is to be explained instead of itself"):
        holdfast.explain(model, TOKENIZER, "copy ab=", "ab", instead_of="ab")


def test_a_reader_sees_each_token_with_its_number_and_no_markup_of_theirs(tmp_path: Path) -> None:
    found = holdfast.explain(tiny_model("llama").eval(), TOKENIZER, "copy ab=", "ab")
    page = found.save(tmp_path / "why.html").read_text(encoding="utf-8")
    assert page.count("title=") == len(found.tokens)
    assert "&lt;s&gt;" in page, "the begin token is text"
    assert page.startswith("<!doctype html>")
    assert "http" not in page, "nothing is loaded from elsewhere"
    assert f"{found.relevance[0]:+.4g}" in page
    assert found._repr_html_() in page
    assert found.weights.top(1)[0].name in found.weights


def test_a_terminal_shows_the_tokens_and_colours_the_strong_ones() -> None:
    found = holdfast.explain(tiny_model("llama").eval(), TOKENIZER, "copy ab=", "ab")
    shown = found.__rich__()
    assert shown.plain == "".join(found.tokens[: found.asked]) + " → " + "".join(found.tokens[found.asked :])
    token, value = found.strongest(1)[0]
    assert abs(value) == pytest.approx(float(found.relevance.abs().max()))
    colour = "rgb(24,130,90)" if value > 0 else "rgb(200,60,40)"
    (span,) = (span for span in shown.spans if str(span.style).endswith(colour))
    assert shown.plain[span.start : span.end] == token


def test_an_answer_without_tokens_is_told() -> None:
    with pytest.raises(DataError, match="empty completion"):
        holdfast.explain(tiny_model("llama"), TOKENIZER, "a", " ")


def test_what_is_cut_is_told_and_what_is_wrong_is_named() -> None:
    model = tiny_model("llama")
    with pytest.warns(UserWarning, match=r"1 of 1 prompts are longer .*max_prompt_tokens \(4\); their first"):
        found = holdfast.explain(model, TOKENIZER, "copy ab=", "ab", template={"max_prompt_tokens": 4})
    assert found.asked == 5
    with pytest.warns(UserWarning, match="1 completions are longer than template.max_completion_tokens = 3"):
        holdfast.explain(model, TOKENIZER, "a", "abcd", template={"max_completion_tokens": 3})
    with pytest.warns(UserWarning, match="control tokens in their text, such as '</s>'"):
        holdfast.explain(model, TOKENIZER, "a", "b</s>")
    wrong: Any = None
    with pytest.raises(DataError, match="explain: 'completion' must be a text, got nothing"):
        holdfast.explain(model, TOKENIZER, "a", wrong)
    with pytest.raises(ConfigError, match=r"template: 1 problem.*\n.*Did you mean 'max_prompt_tokens'"):
        holdfast.explain(model, TOKENIZER, "a", "b", template={"max_promt_tokens": 4})
    with pytest.raises(ConfigError, match=r"options: 1 problem.*\n.*Did you mean 'paper'"):
        holdfast.explain(model, TOKENIZER, "a", "b", options={"rules": "papr"})
    with pytest.raises(DataError, match=r"longest row .* 130 tokens, the model takes 128; lower template"):
        holdfast.explain(tiny_model("gpt2"), TOKENIZER, "a" * 127, "b")


def test_rows_that_lose_something_or_do_not_fit_are_told_before_they_are_attributed(tmp_path: Path) -> None:
    def attribute(kind: str, prompt: str, **template: int) -> None:
        rows = [{"prompt": prompt, "completion": "b"}]
        holdfast.attribute(tiny_model(kind), TOKENIZER, rows, template=template, progress=False)

    with pytest.warns(UserWarning, match=r"data: 1 of 1 prompts are longer than template.max_prompt_tokens"):
        attribute("llama", "abcd", max_prompt_tokens=2)
    with pytest.raises(DataError, match=r"longest row .* 130 tokens, the model takes 128; lower template"):
        attribute("gpt2", "a" * 127)
    TOKENIZER.save_pretrained(tmp_path / "model")
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "abcd", "completion": "b"}\n' * 2)
    words = ["attribute", "--model", "model", "--data", "rows.jsonl", "--out", "prior"]
    with chdir(tmp_path):
        result = CliRunner().invoke(app, [*words, "--set", "template.max_prompt_tokens=2"])
    assert result.exit_code == 0, result.output
    assert "rows: 2 of 2 prompts are longer than template.max_prompt_tokens (2)" in result.output


def test_of_a_model_that_nothing_of_is_trained_every_weight_is_explained() -> None:
    model = tiny_model("llama")
    trained = holdfast.explain(model, TOKENIZER, "copy ab=", "ab").weights
    frozen = holdfast.explain(model.requires_grad_(False), TOKENIZER, "copy ab=", "ab").weights
    assert list(frozen) == list(trained)
    assert all(torch.equal(frozen[name], trained[name]) for name in trained)


@pytest.mark.parametrize(("rules", "said"), [("attnlrp", "several percent"), ("paper", r"correlation 0\.44")])
def test_relevance_in_16_bits_is_told_to_be_coarse(rules: str, said: str) -> None:
    lost = suppress(ConservationError)  # which is said after
    with pytest.warns(UserWarning, match=f"in bfloat16, where .*{said}"), lost:
        holdfast.explain(
            tiny_model("llama").bfloat16(), TOKENIZER, "copy ab=", "ab", options={"rules": rules}
        )


def test_tokens_are_shown_with_the_blanks_that_they_stand_for() -> None:
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", "▁the", "▁cat", "s", "▁sat"])}
    words = Tokenizer(WordPiece(vocabulary, unk_token="</s>", continuing_subword_prefix=""))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    assert tokenizer.decode([3]) == "cat", "alone it has lost its blank"
    found = holdfast.explain(tiny_model("llama"), tokenizer, "the cats", "sat")
    assert found.tokens == ["<s>", " the", " cat", "s", " sat"]


@pytest.mark.parametrize("name", ["fsmt", "pegasus_x", "zaya"])
def test_tokens_that_every_text_gets_are_no_tokens_of_this_one(name: str) -> None:
    found = holdfast.explain(family(name, torch.float32), TOKENIZER, "abcd", "de")
    assert len(found.tokens) == len(found.relevance)
    assert "Explanation of 'de'" in repr(found)
    assert found.conservation_error < 1e-3
    assert sum(found.parts.values()) == pytest.approx(found.target, rel=1e-3)


@pytest.mark.parametrize("name", ["led", "switch_transformers", "mllama"])
def test_weights_that_an_answer_does_not_reach_have_no_relevance_and_are_named(name: str) -> None:
    found = holdfast.explain(family(name), TOKENIZER, "abcd", "de")
    unreached = found.weights.meta["unreached"]
    assert unreached
    assert not any(found.weights[weight].any() for weight in unreached)


def test_the_eyes_of_a_model_are_not_rated_for_an_answer_to_text() -> None:
    model = family("gemma3")
    found = holdfast.explain(model, TOKENIZER, "abcd", "de")
    assert len(found.weights)
    assert not any("vision" in name for name in found.weights)
    assert found.weights.meta["unreached"] == []
