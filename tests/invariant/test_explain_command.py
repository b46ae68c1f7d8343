"""`holdfast explain` and `Learner.explain`: the answer that a folder gives, and why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_learn_command import in_this_process, refused

import holdfast
from holdfast import Learner
from holdfast.errors import ConfigError
from holdfast.tasks import toy_tokenizer
from learning_data import SHORT, TOY, data_sets, rows_of
from processes import holdfast as command
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    data_sets(folder, "may")
    long = ("training.max_steps=30", "training.learning_rate=0.01")
    ended = command("learn", "may.jsonl", "--skills", "s", *TOY, *SHORT, *long, cwd=folder)
    assert ended.code == 0, ended.err
    return folder


QUESTION = rows_of("may", 1)[0]["prompt"].strip()


def answered(learner: Learner) -> tuple[str, str]:
    """A question that the model answers, and how."""
    asked = [row["prompt"].strip() for row in rows_of("may", 32)]
    return next(pair for pair in zip(asked, learner.answer(asked), strict=True) if pair[1].strip())


def test_the_learner_explains_its_own_answer_in_its_own_frame(made: Path) -> None:
    with Learner.load(made / "s") as learner:
        question, said = answered(learner)
        why = learner.explain(question)
        frame, model = learner.config.template, learner.model
        alone = holdfast.explain(model, learner.tokenizer, question, said, template=frame)
        assert why.answer == said
        assert torch.equal(why.relevance, alone.relevance)
        paper = learner.explain(QUESTION, "abcd", options={"rules": "paper"})
        assert not torch.equal(learner.explain(QUESTION, "abcd").relevance, paper.relevance)
        with pytest.raises(ConfigError, match="Did you mean 'paper'"):
            learner.explain(QUESTION, "abcd", options={"rules": "papr"})
        assert not learner.encoder._known  # no row is kept that nobody asks for again


def test_what_takes_more_than_a_plain_model_to_answer_is_refused() -> None:
    with Learner(tiny_model("llama"), toy_tokenizer(), "l2p", training={"max_steps": 1}) as learner:
        with learner.task("may", rows_of("may", 8)) as stage:
            stage.train()
        with pytest.raises(ConfigError, match="'l2p' answers come from more than a plain model"):
            learner.explain(QUESTION, "abcd")


def test_the_command_shows_the_strongest_tokens_and_writes_the_map(made: Path, tmp_path: Path) -> None:
    with Learner.load(made / "s") as learner:
        why = learner.explain(QUESTION, "abcd", instead_of="dcba")
        question, said = answered(learner)
    page = tmp_path / "why.html"
    options = ("--answer", "abcd", "--instead-of", "dcba", "--out", str(page))
    told = in_this_process("explain", "s", QUESTION, *options, cwd=made)
    assert told.code == 0, told.err
    assert QUESTION in told.out
    assert "for 'abcd' instead of 'dcba'" in told.out
    assert f"the answers' own tokens {why.elsewhere['answers']:+.4g}" in told.out
    shown = [line.split(maxsplit=1) for line in told.out.splitlines() if line.startswith("  ")]
    assert [(token, float(value)) for value, token in shown] == [
        (repr(token), float(f"{value:.3g}")) for token, value in why.strongest()
    ]
    assert page.read_text().startswith("<!doctype html>")
    own = in_this_process("explain", "s", question, "--after", "may", "--set", "target=first", cwd=made)
    assert own.code == 0, own.err
    assert f"for {said!r}, logits" in own.out
    refused(
        in_this_process("explain", "s", QUESTION, "--set", "rules=papr", cwd=made), "Did you mean 'paper'"
    )
    refused(in_this_process("explain", "s", "", cwd=made), "empty")
