"""KL to the base: the estimate, the base's own rows, and what a learner, a run and the tables say of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from holdfast import Learner
from holdfast.cli import app
from holdfast.config import validate
from holdfast.errors import ConfigError
from holdfast.evaluation.general import (
    Answers,
    ask_base,
    divergence,
    encode_own,
    load_own,
    own_rows,
    save_own,
)
from holdfast.models import LoraOptions, add_lora
from holdfast.report import write_report
from holdfast.runner import RunConfig, run
from holdfast.tasks import Encoder, Example, Template, toy_tokenizer
from tiny_models import tiny_model
from tiny_runs import tiny_run

TOKENIZER = toy_tokenizer()
ROWS = [{"prompt": f"{i}=", "completion": "ab"} for i in range(8)]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def kl(base: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    p, q = base.double().log_softmax(-1), now.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 9))
def test_a_vocabulary_kept_whole_gives_the_divergence_itself(seed: int, size: int) -> None:
    torch.manual_seed(seed)
    base, now = 3 * torch.randn(4, size), 3 * torch.randn(4, size)
    found, square = Answers.of(base, generator()).divergence(now)
    torch.testing.assert_close(found, kl(base, now), rtol=1e-4, atol=1e-5)
    assert not square.any()


@pytest.mark.parametrize("apart", [0.05, 1.0])
def test_a_draw_of_unlikely_tokens_has_no_bias_and_its_error_is_told(apart: float) -> None:
    base = 2 * torch.randn(1, 400).repeat(4000, 1)
    now = base + apart * torch.randn(1, 400)
    found, square = Answers.of(base, generator(), top=8, drawn=8, whole=0).divergence(now)
    exact = kl(base[:1], now[:1]).item()
    error = found.std().item()
    assert abs(found.mean().item() - exact) < 4 * error / 4000**0.5
    assert square.mean().sqrt().item() == pytest.approx(error, rel=0.1)
    assert (
        Answers.of(base[:1], generator(), top=8, drawn=8, whole=0).top_NK.exp().sum() < 0.9
    )  # something is drawn


@pytest.mark.parametrize("kind", ["llama", "llama-lora", "gpt2", "bloom", "t5"])
def test_divergence_of_a_model_is_the_mean_over_its_rows_tokens(kind: str) -> None:
    base, now = tiny_model(kind), tiny_model(kind)
    with torch.no_grad():
        for p in now.parameters():
            p.add_(0.1 * torch.randn_like(p))
    encoder = Encoder(TOKENIZER, Template(), encoder_decoder=kind == "t5")
    rows = encoder.many([Example("x" * (i % 3) + "=", "abcd"[: 1 + i % 4]) for i in range(9)])
    by_hand = []
    for row in rows:
        logits = []
        for model in (base, now):
            if kind == "t5":
                decoder = torch.tensor([[model.config.decoder_start_token_id, *row.completion_ids[:-1]]])
                logits.append(
                    model(input_ids=torch.tensor([row.prompt_ids]), decoder_input_ids=decoder).logits[0]
                )
            else:
                ids = torch.tensor([row.prompt_ids + row.completion_ids])
                logits.append(model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1])
        by_hand.append(kl(*logits))
    answers = ask_base(base, TOKENIZER, rows)
    assert divergence(base, TOKENIZER, rows, answers).kl == pytest.approx(0, abs=1e-6)
    assert divergence(now, TOKENIZER, rows, answers).kl == pytest.approx(
        torch.cat(by_hand).mean().item(), rel=1e-3
    )


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_own_rows_are_the_same_for_a_seed_and_draw_from_no_other_generator(kind: str) -> None:
    model = tiny_model(kind)
    before = torch.get_rng_state()
    rows = own_rows(model, TOKENIZER, 6, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert rows == own_rows(model, TOKENIZER, 6, seed=1) != own_rows(model, TOKENIZER, 6, seed=2)
    assert all(row.prompt == "" and row.completion.strip() for row in rows)
    assert all(len(row.completion_ids) <= 64 for row in encode_own(rows, TOKENIZER, kind == "t5"))


def test_a_chat_template_makes_user_turns_and_answers() -> None:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = CHAT
    rows = own_rows(tiny_model("llama"), tokenizer, 4, seed=0)
    assert [[m["role"] for m in row.prompt] for row in rows] == [["user"]] * 4  # type: ignore[union-attr]
    first = encode_own(rows, tokenizer, False)[0]
    assert (
        first.prompt_ids
        == tokenizer(f"<user>{rows[0].prompt[0]['content']};<a>", add_special_tokens=False).input_ids
    )  # type: ignore


def test_rows_of_the_base_come_back_whatever_ends_of_lines_it_wrote(tmp_path: Path) -> None:
    rows = [Example("a\u2028b\r\nc", "d\x85e\n"), Example.text("\u2029\x0c")]
    save_own(tmp_path, rows, Answers.of(torch.randn(2, 5), generator()))
    kept = load_own(tmp_path)
    assert kept is not None
    assert kept[0] == rows


@pytest.mark.parametrize("lora", [False, True])
def test_a_learner_measures_on_the_same_rows_after_each_task(lora: bool, tmp_path: Path) -> None:
    def start() -> Any:
        return add_lora(tiny_model("llama"), LoraOptions(r=4)) if lora else tiny_model("llama")

    options = {"max_steps": 4, "batch_size": 8, "learning_rate": 1e-2}
    with Learner(start(), TOKENIZER, "sequential", folder=tmp_path / "s", base_model=start, training=options,
                 evaluation={"general": True, "general_rows": 8}) as learner:  # fmt: skip
        for name in ("a", "b"):
            with learner.task(name, ROWS) as stage:
                stage.train()
        known = learner.skills()
        assert learner.kl_to_base().kl == pytest.approx(known.skills[1].kl_base, rel=1e-4)
        assert learner.kl_to_base(ROWS).kl == pytest.approx(known.skills[1].kl_new, rel=1e-4)
    for skill in known.skills:
        assert skill.kl_base is not None
        assert skill.kl_base > 0
        assert skill.kl_new is not None
        assert skill.kl_new > 0
    assert len(list(tmp_path.glob("s/tasks/*/general/rows.jsonl"))) == 1  # written once, by the base
    lines = (tmp_path / "s/tasks/01-a/general/rows.jsonl").read_text().splitlines()
    by_the_base = [row.record() for row in own_rows(start(), TOKENIZER, 8, seed=0)]
    by_the_base = [row.record() for row in own_rows(start(), TOKENIZER, 8, seed=0)]
    assert [json.loads(line) for line in lines] == by_the_base
    shown = CliRunner().invoke(app, ["skills", str(tmp_path / "s")], env={"COLUMNS": "200"})
    assert "KL to base" in shown.output
    assert f"{known.skills[1].kl_base:.3f}" in shown.output


def test_what_is_learned_is_the_same_whether_it_is_measured_or_not(tmp_path: Path, capsys: Any) -> None:
    from holdfast.progress import Progress

    weights = []
    for general in (False, True):
        values = tiny_run(tmp_path / f"{general}", evaluation={"general": general, "zero_shot": False})
        values["tasks"] = {**values["tasks"], "order": ["copy", "flip"]}
        values["model"] = {**values["model"], "lora": {"dropout": 0.1}}
        metrics = run(validate(RunConfig, values, "test"), Progress())
        assert ("kl_base" in metrics) == general
        assert ("KL to the base" in capsys.readouterr().err) == general  # where a task is said to be learned
        weights.append((tmp_path / f"{general}/tasks/02-flip/model/adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert len(metrics["kl_base"]) == len(metrics["kl_new"]) == 2
    assert metrics["seconds"]["general"] > 0
    page = write_report([tmp_path / "True"], tmp_path / "report.html", None).read_text()
    assert "General ability" in page
    assert "On rows that the base wrote itself" in page


def test_without_a_base_the_new_rows_are_left_out_and_it_is_said(tmp_path: Path, capsys: Any) -> None:
    from holdfast.progress import Progress

    options = {"max_steps": 1, "batch_size": 8}
    with Learner(tiny_model("llama"), TOKENIZER, "sequential", training=options, progress=Progress(),
                 evaluation={"general": True, "general_rows": 2}) as learner:  # fmt: skip
        for name in ("a", "b"):
            with learner.task(name, ROWS) as stage:
                stage.train()
        first, second = learner.skills().skills
    assert first.kl_new is not None
    assert second.kl_new is None
    assert second.kl_base is not None  # of what was kept at the start
    said = " ".join(capsys.readouterr().err.split())
    assert "general ability on the rows of 'b' isn't measured" in said
    assert "give base_model=" in said


def test_kl_to_base_where_no_rows_were_kept_says_what_to_set() -> None:
    refused = pytest.raises(ConfigError, match=r"Learner.kl_to_base: no rows.*evaluation.general is true")
    with Learner(tiny_model("llama"), TOKENIZER, "sequential") as learner, refused:
        learner.kl_to_base()
