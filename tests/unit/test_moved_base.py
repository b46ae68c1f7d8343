"""A base that has moved is found where it is said to be; one that is another by now is noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast import Learner
from holdfast.config import validate
from holdfast.errors import ConfigError, ModelError, RunDirectoryError
from holdfast.learner.config import recorded_config
from holdfast.learner.ownership import move_base
from holdfast.models import load_model, tiny_llama
from holdfast.models.base import identity_of
from holdfast.runner import RunConfig, run
from holdfast.runner.findings import check
from holdfast.runner.learn import learn_data
from holdfast.tasks import toy_tokenizer
from learning_data import SHORT, data_sets
from noted import Noted
from processes import launched
from tiny_runs import tiny_run


def saved(folder: Path, seed: int = 0) -> Path:
    tokenizer = toy_tokenizer()
    tiny_llama(tokenizer, seed, hidden=16, layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def learn(folder: Path, month: str, model: Path | None = None, **more: Any) -> list[str]:
    progress = Noted()
    learn_data(
        folder / f"{month}.jsonl",
        folder / "s",
        model=None if model is None else str(model),
        assignments=SHORT,
        progress=progress,
        **more,
    )
    return progress.said


@pytest.mark.parametrize("lora", [True, False])
def test_a_moved_base_is_said_once_and_another_is_refused(tmp_path: Path, lora: bool) -> None:
    data_sets(tmp_path, "may", "june", "july")
    learn(tmp_path, "may", saved(tmp_path / "base"), lora=lora)
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"If it has moved, say once where it is: .*skills .*s --model"):
        learn(tmp_path, "june")
    other = saved(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="that is another model: its weights differ"):
        learn(tmp_path, "june", other)
    learn(tmp_path, "june", moved)
    learn(tmp_path, "july")
    moved = moved.rename(tmp_path / "once more")
    move_base(tmp_path / "s", str(moved))
    with Learner.load(tmp_path / "s") as learner:
        assert learner.learned == ["may", "june", "july"]
    (tmp_path / "s" / "tasks" / "03-july" / "began.json").unlink()  # as of an earlier version
    with pytest.raises(ConfigError, match="whether that is the same can't be told"):
        move_base(tmp_path / "s", str(other))


@pytest.mark.parametrize("lora", [True, False])
def test_a_base_that_is_another_now_is_refused_under_a_lora_and_told_of_whole_weights(
    tmp_path: Path, lora: bool
) -> None:
    data_sets(tmp_path, "may", "june")
    learn(tmp_path, "may", saved(tmp_path / "base"), lora=lora)
    shutil.rmtree(tmp_path / "base")
    saved(tmp_path / "base", seed=1)
    if lora:
        with pytest.raises(ModelError, match=r"these are not the weights that 01-may in .* was learned on"):
            learn(tmp_path, "june")
        with pytest.raises(ModelError, match="the adapter there means nothing on others"):
            Learner.load(tmp_path / "s")
    else:
        assert any("these are not the weights that 01-may" in said for said in learn(tmp_path, "june"))


def test_a_run_is_not_continued_on_another_base(tmp_path: Path) -> None:
    values = tiny_run(tmp_path / "r", model={"path": str(saved(tmp_path / "base")), "lora": {"r": 2}})
    values["tasks"]["order"] = ["copy"]
    run(validate(RunConfig, values, "test"))
    saved(tmp_path / "base", seed=1)
    values["tasks"]["order"] = ["copy", "head"]
    with pytest.raises(ModelError, match="these are not the weights that 01-copy"):
        run(validate(RunConfig, values, "test"))


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_a_run_goes_on_where_its_base_has_moved(
    lora: bool, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"path": str(saved(tmp_path / "base")), **({"lora": {"r": 2}} if lora else {})}
    values = tiny_run(tmp_path / "r", model=model)
    values["tasks"]["order"] = ["copy"]
    run(validate(RunConfig, values, "test"))
    before = (tmp_path / "r/tasks/01-copy/manifest.json").read_text()
    (tmp_path / "base").rename(tmp_path / "moved")
    values["tasks"]["order"] = ["copy", "head"]
    if told:
        move_base(tmp_path / "r", str(tmp_path / "moved"))
        with pytest.raises(RunDirectoryError, match=rf"give model\.path={tmp_path / 'moved'}"):
            run(validate(RunConfig, values, "test"))
    monkeypatch.chdir(tmp_path)
    model["path"] = "moved"
    config = validate(RunConfig, values, "test")
    assert not [text for text in check(config).problems if "output" in text]
    assert run(config)["finished"]
    assert (tmp_path / "r/tasks/01-copy/manifest.json").read_text() == before
    assert recorded_config(tmp_path / "r", {}).model == config.model


def test_a_run_is_refused_another_model_at_another_path(tmp_path: Path) -> None:
    values = tiny_run(tmp_path / "r", model={"path": str(saved(tmp_path / "base"))})
    values["tasks"]["order"] = ["copy"]
    run(validate(RunConfig, values, "test"))
    values["model"] = {"path": str(saved(tmp_path / "other", seed=1))}
    with pytest.raises(RunDirectoryError, match=r"model\.path \(.* here; the weights are others\)"):
        run(validate(RunConfig, values, "test"))
    values["model"] = {"path": str(shutil.copytree(tmp_path / "base", tmp_path / "copy"))}
    (tmp_path / "r/tasks/01-copy/began.json").unlink()  # as of an earlier version
    with pytest.raises(RunDirectoryError, match=r"can't be told.* write this path into .*config\.yaml"):
        run(validate(RunConfig, values, "test"))


def test_a_base_is_known_in_every_float_type_and_under_a_new_adapter(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base")
    options: list[dict[str, Any]] = [{}, {"dtype": "bfloat16"}, {"lora": {"r": 2}}, {"lora": {"r": 4}}]

    def identities() -> set[str | None]:
        sections = [{**tiny_run(tmp_path), "model": {"path": str(folder), **more}} for more in options]
        models = [validate(RunConfig, values, "test").model for values in sections]
        return {identity_of(load_model(model, seed)[0]) for seed, model in enumerate(models)}

    before = identities()
    assert len(before) == 1
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    weights[name] = weights[name] + 0.01 * torch.ones_like(weights[name])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert not before & identities()


def test_what_a_task_began_with_is_one_line_of_its_folder(tmp_path: Path) -> None:
    data_sets(tmp_path, "may")
    learn(tmp_path, "may", saved(tmp_path / "base"))
    noted = json.loads((tmp_path / "s" / "tasks" / "01-may" / "began.json").read_text())
    assert list(noted) == ["base"]


def test_several_processes_take_note_of_a_moved_base_together(tmp_path: Path) -> None:
    data_sets(tmp_path, "may", "june")
    learn(tmp_path, "may", saved(tmp_path / "base"))
    (tmp_path / "base").rename(tmp_path / "moved")
    command = ("learn", "june.jsonl", "--skills", "s", "--model", "moved", "training.max_steps=1")
    for rank in launched(2, None, command, tmp_path)():
        assert rank.code == 0, rank.err
    assert f"path: {tmp_path / 'moved'}" in (tmp_path / "s" / "config.yaml").read_text()
