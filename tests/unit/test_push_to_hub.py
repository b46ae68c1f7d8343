"""What is uploaded, and what its card says; the hub itself is never asked."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi
from typer.testing import CliRunner

from holdfast import Learner
from holdfast.cli import app
from holdfast.errors import ConfigError
from holdfast.learner.card import model_card
from holdfast.learner.skills import read_skills
from holdfast.tasks import toy_tokenizer
from learning_data import rows_of
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def skills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks, learned in a script."""
    folder = tmp_path_factory.mktemp("learned") / "skills"
    training = {"max_steps": 1, "batch_size": 4}
    with Learner(
        tiny_model("llama"), toy_tokenizer(), "sequential", folder=folder, training=training
    ) as learner:
        for name in ("may", "june | july"):
            with learner.task(name, rows_of("may", 8), rows_of("test", 2)) as stage:
                stage.train()
    return folder


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would have been uploaded."""
    seen: list[dict[str, Any]] = []

    class Url(str):
        repo_id = "me/model"

    def create(self: HfApi, repo_id: str, **options: Any) -> Url:
        seen.append({"repo_id": repo_id, **options})
        return Url("https://huggingface.co/me/model")

    def upload(self: HfApi, *, folder_path: Path, repo_id: str, commit_message: str) -> Any:
        files = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}
        seen.append({"files": files, "repo_id": repo_id, "message": commit_message})
        return SimpleNamespace()

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return seen


def test_the_model_goes_up_with_a_card_of_its_skills(skills: Path, uploads: list[dict[str, Any]]) -> None:
    with Learner.load(skills) as learner:
        assert learner.push_to_hub("model", private=True) == "https://huggingface.co/me/model"
    made, sent = uploads
    assert (made["repo_id"], made["private"], made["exist_ok"]) == ("model", True, True)
    assert sent["repo_id"] == "me/model"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(sent["files"])
    card = sent["files"]["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert (head["library_name"], "base_model" in head) == ("transformers", False)
    for skill in read_skills(skills).skills:
        assert f"| {skill.name.replace('|', chr(92) + '|')} | 8 | exact_match | 2 | {skill.then:.1f}" in card
    assert "was not measured" in card
    assert str(skills.parent) not in card, "a path of this machine is no one's business"


def test_the_command_uploads_too_and_a_refusal_is_told(
    skills: Path, uploads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = CliRunner().invoke(app, ["skills", str(skills), "--push", "me/model"])
    assert result.exit_code == 0, result.output
    assert "Uploaded: https://huggingface.co/me/model" in result.output

    def refuse(self: HfApi, repo_id: str, **options: Any) -> Any:
        raise OSError("no way\nthere")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with (
        Learner.load(skills) as learner,
        pytest.raises(ConfigError, match=r"'x' can't be uploaded \(no way\)"),
    ):
        learner.push_to_hub("x")


def test_nothing_learned_is_nothing_to_upload() -> None:
    with pytest.raises(ConfigError, match="nothing was learned yet"):
        Learner(tiny_model("llama"), toy_tokenizer(), "sequential").push_to_hub("x")


def test_a_card_names_a_base_of_the_hub_and_what_an_adapter_needs(skills: Path) -> None:
    card = model_card(read_skills(skills), base_model="org/base", adapter=True, title="mine")
    head = yaml.safe_load(card.split("---")[1])
    assert (head["base_model"], head["library_name"]) == ("org/base", "peft")
    assert "# mine\n\n`org/base`, which learned 2 tasks" in card


def test_a_card_has_what_lm_eval_was_asked_afterwards_and_calls_it_measured(skills: Path) -> None:
    asked = {"base": {"boolq": {"acc,none": 0.25}}, "now": {"boolq": {"acc,none": 0.5}}}
    (skills / "harness.json").write_text(json.dumps(asked))
    try:
        card = model_card(read_skills(skills), base_model=None, adapter=False, title="mine")
    finally:
        (skills / "harness.json").unlink()
    assert "| boolq acc | 0.250 | 0.500 |" in card
    assert "was not measured" not in card


def test_a_card_tells_how_many_test_rows_ask_what_was_trained_on(skills: Path, tmp_path: Path) -> None:
    clean = model_card(read_skills(skills), base_model=None, adapter=False, title="mine")
    assert "test rows that ask nothing that training rows ask" in clean
    training = {"max_steps": 1, "batch_size": 4}
    with Learner(
        tiny_model("t5"), toy_tokenizer(), "sequential", folder=tmp_path / "s", training=training
    ) as learner:
        for name, test in (("may", rows_of("test", 2)), ("june", rows_of("may", 8)[:3])):
            train = rows_of("may", 8)[:4] if name == "may" else rows_of("may", 8)
            with learner.task(name, [*train, *(rows_of("test", 2) if name == "june" else [])], test) as stage:
                stage.train()
        card = (learner.export(tmp_path / "out") / "README.md").read_text()
    assert "(may: 2 of 2, june: 3 of 3, at least)" in card
    assert "nothing that training rows ask" not in card
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "text2text-generation"
    part = next((tmp_path / "s/tasks").glob("02-*")) / "task.json"
    about = json.loads(part.read_text())
    del about["met_in_training"]  # of an earlier version
    part.write_text(json.dumps(about))
    old = model_card(read_skills(tmp_path / "s"), base_model=None, adapter=False, title="mine")
    assert "was not recorded of may, june" in old
