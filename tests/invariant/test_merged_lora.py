"""A LoRA a task through `holdfast learn` and `holdfast skills`: what is kept, handed on, and taken back."""

from __future__ import annotations

import contextlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from holdfast.cli import app
from holdfast.learner import Learner
from holdfast.models import ModelOptions, load_model, save_model
from holdfast.tasks import toy_tokenizer
from learning_data import SHORT, bytes_in, data_sets, rows_of
from processes import Ended

LORA = ("--lora", "model.lora.r=2", "strategy.importance.samples=4", "training.learning_rate=1e-2", *SHORT)


def holdfast(*arguments: str, cwd: Path) -> Ended:
    with contextlib.chdir(cwd):
        result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80"})
    return Ended(result.exit_code, result.stdout, result.stderr)


def learned(folder: Path, *options: str) -> dict[str, bytes | None]:
    """Learn may and june on a base in a folder; what the skills were after may."""
    save_model(*load_model(ModelOptions(toy=True, hidden=16, layers=1), 5, toy_tokenizer), folder / "base")
    data_sets(folder, "may", "june")
    first = ("learn", "may.jsonl", "--skills", "s", "--model", "base", *LORA, *options)
    for command in (first, ("learn", "june.jsonl", "--skills", "s")):
        if command is not first:
            before = bytes_in(folder / "s")
        ended = holdfast(*command, cwd=folder)
        assert ended.code == 0, ended.err
    return before


def logits(model: Any, learner: Learner) -> torch.Tensor:
    with torch.no_grad():
        return model(**learner.tokenizer("may abcd: ", return_tensors="pt")).logits


def test_learn_keeps_an_adapter_a_task_and_hands_on_one(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not held")  # B is free on purpose
        before = learned(tmp_path)
    for out, options in (("whole", ()), ("small", ("--rank", "1"))):
        ended = holdfast("skills", "s", "--export", out, *options, cwd=tmp_path)
        assert ended.code == 0, ended.err
    ranks = [
        json.loads((tmp_path / out / "adapter_config.json").read_text())["r"] for out in ("whole", "small")
    ]
    assert ranks == [4, 1]
    models = {
        out: PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / out
        )
        for out in ("whole", "small")
    }
    with Learner.load(tmp_path / "s") as learner:
        ours = logits(learner.model, learner)
        assert torch.equal(logits(models["whole"].eval(), learner), ours)
        assert torch.isfinite(logits(models["small"].eval(), learner)).all()
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        with learner.state.base.answering(learner.model) as answering:
            assert learner.state.base.by_adapter
            assert torch.equal(logits(answering, learner), logits(base, learner))
        assert not torch.equal(logits(base, learner), ours)
    refused = holdfast("skills", "s", "--export", "more", "--rank", "9", cwd=tmp_path)
    assert refused.code == 2
    assert "has 4 ranks" in " ".join(refused.err.split())
    assert not (tmp_path / "more").exists()
    assert holdfast("skills", "s", "--undo", cwd=tmp_path).code == 0
    assert bytes_in(tmp_path / "s") == before


def test_learn_into_the_weights_keeps_them_and_hands_on_a_whole_model(tmp_path: Path) -> None:
    before = learned(tmp_path, "strategy.merge_lora=weights")
    assert holdfast("skills", "s", "--export", "out", cwd=tmp_path).code == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert sum(p.numel() for p in exported.parameters()) == sum(p.numel() for p in base.parameters())
    with Learner.load(tmp_path / "s") as learner:
        assert torch.equal(logits(exported, learner), logits(learner.model, learner))
        with learner.state.base.answering(learner.model) as answering:
            assert not learner.state.base.by_adapter, "without the adapter it is no longer the base"
            assert torch.equal(logits(answering, learner), logits(base, learner))
        with pytest.raises(Exception, match="whole model and no adapter"):
            learner.export(tmp_path / "more", rank=1)
    assert not torch.equal(logits(exported, learner), logits(base, learner))
    assert holdfast("skills", "s", "--undo", cwd=tmp_path).code == 0
    assert bytes_in(tmp_path / "s") == before
    with Learner.load(tmp_path / "s") as learner:
        assert learner.learned == ["may"]
        assert not torch.equal(logits(learner.model, learner), logits(exported, learner))
        with learner.task("june again", rows_of("june", 16)) as stage:
            stage.train()
