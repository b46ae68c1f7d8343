"""One answer explained: tokens and weights against the engine's own sums, and what a reader sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from holdfast.attribution import AttributionOptions, attribute_batches
from holdfast.errors import ConfigError, DataError
from holdfast.tasks import Encoder, Example, Template, toy_tokenizer
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


def test_two_answers_are_contrasted_on_the_prompt() -> None:
    model = tiny_model("llama").eval()
    ours, other = (holdfast.explain(model, TOKENIZER, "copy ab=", x) for x in ("ab", "cab"))
    found = holdfast.explain(model, TOKENIZER, "copy ab=", "ab", instead_of="cab")
    assert found.tokens == ours.tokens[: ours.asked]
    assert torch.equal(found.relevance, ours.relevance[: ours.asked] - other.relevance[: ours.asked])
    assert found.target == ours.target - other.target
    name = next(iter(found.weights))
    assert torch.equal(found.weights[name], ours.weights[name] - other.weights[name])
    assert "instead of" in repr(found)
    with pytest.raises(ConfigError, match="on one prompt"):
        ours.instead_of(holdfast.explain(model, TOKENIZER, "copy ba=", "ab"))


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


def test_an_answer_without_tokens_is_told() -> None:
    with pytest.raises(DataError, match="empty completion"):
        holdfast.explain(tiny_model("llama"), TOKENIZER, "a", " ")
