"""A run inside somebody's own script draws no bars, and changes none of their settings."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging

from holdfast.config import validate
from holdfast.models import ModelOptions, load_model, save_model, tiny_llama
from holdfast.progress import no_library_bars
from holdfast.runner import RunConfig, run
from holdfast.tasks import toy_tokenizer


@pytest.fixture(autouse=True)
def bars_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user who has set nothing, whatever other tests have done."""
    monkeypatch.setattr(logging, "_tqdm_active", True)


def test_a_run_in_a_script_writes_nothing_on_the_terminal(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tiny(tmp_path / "r")
    values["model"] = {"toy": True, "hidden": 16, "layers": 1}
    values["tasks"] = {"source": "toy", "order": ["head", "copy"], "train_rows": 16, "test_rows": 4}
    values["training"] |= {"max_steps": 2, "checkpoint_steps": 1}
    config = validate(RunConfig, values, source="test")
    run(config)
    shutil.rmtree(next((tmp_path / "r" / "tasks").glob("02-*")))
    run(config)  # the weights of task 1 are loaded from disk
    assert capsys.readouterr() == ("", "")


def test_a_model_is_saved_and_loaded_without_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = toy_tokenizer()
    save_model(tiny_llama(tokenizer, hidden=16, layers=1), tokenizer, tmp_path)
    load_model(ModelOptions(path=str(tmp_path)))
    assert capsys.readouterr() == ("", "")


def test_bars_of_the_user_come_back_even_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def mine(bar: Any, args: Any, kwargs: Any) -> Any:
        return bar(*args, **{**kwargs, "desc": "mine"})

    @no_library_bars()
    def fail() -> None:
        list(logging.tqdm([1, 2]))
        raise RuntimeError("on purpose")

    before = logging.set_tqdm_hook(mine)
    try:
        with pytest.raises(RuntimeError, match="on purpose"):
            fail()
        assert capsys.readouterr().err == ""
        list(logging.tqdm([1, 2]))
        assert "mine: 100%" in capsys.readouterr().err
    finally:
        logging.set_tqdm_hook(before)
