"""Models that can't be what was saved: each is refused with the file or the tensors that are wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from holdfast.cli import app
from holdfast.config import validate
from holdfast.errors import ConfigError, ModelError
from holdfast.models import ModelOptions, load_model, save_model, tiny_llama
from holdfast.places import is_local
from holdfast.runner import RunConfig
from holdfast.tasks import toy_tokenizer

WEIGHTS = "model.safetensors"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "base"
    tokenizer = toy_tokenizer()
    save_model(tiny_llama(tokenizer, hidden=16, layers=2), tokenizer, folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "base"))


def load(path: Path | str) -> Any:
    return load_model(ModelOptions(path=str(path)))


def refusal(path: Path | str) -> str:
    with pytest.raises(ModelError) as error:
        load(path)
    assert str(error.value).startswith("model.path: ")
    return str(error.value)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS, metadata={"format": "pt"})

    return apply


def config(**values: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return apply


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(raw) and None


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemError('a pickle ran')",)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")


def index_instead(content: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / f"{WEIGHTS}.index.json").write_text(content)

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:5000]), "damaged file model.safet"),
        (text(WEIGHTS, b""), "damaged file model.safetensors (Error while deserializing header"),
        (text(WEIGHTS, b"\xff" * 100), "damaged file model.safetensors ("),
        (tensors(lambda t: t.update({UP: torch.zeros(3, 3)})), f"{UP} (3, 3) instead of (48, 16)"),
        (
            tensors(lambda t: t.pop(UP)),
            f"lacks 1 tensor that its config.json asks for, which would be random: {UP}",
        ),
        (tensors(lambda t: t.update({"x": t.pop(UP)})), f"which would be random: {UP}"),
        (config(num_hidden_layers=3), "lacks 9 tensors that its config.json asks for"),
        (config(num_hidden_layers=1), "has 9 tensors of layers that its config.json doesn't have"),
        (lambda f: (f / WEIGHTS).unlink(), "no file named model.safetensors"),
        (pickled, "its pickle holds more than tensors, or is damaged. Save the model as safetensors"),
        (index_instead("[]"), "damaged file model.safetensors.index.json (it must be a JSON object, got [])"),
        (index_instead('{"weight_map": {}}'), "could not be loaded: "),
        (text("config.json", "{"), "damaged file config.json"),
        (text("config.json", b"\xff"), "damaged file config.json"),
        (text("config.json", "[]"), "damaged file config.json (it must be a JSON object, got [])"),
        (text("config.json", '"x"'), "damaged file config.json (it must be a JSON object, got 'x')"),
        (text("config.json", "{}"), "Should have a `model_type` key"),
        (text("generation_config.json", "[]"), "damaged file generation_config.json"),
        (text("tokenizer.json", "[]"), "damaged file tokenizer.json"),
        (text("tokenizer_config.json", "[]"), "damaged file tokenizer_config.json"),
        (text("tokenizer.json", "["), "damaged file tokenizer.json"),
        (config(num_attention_heads="four"), "'num_attention_heads' expected int, got str"),
        (config(num_attention_heads=3), "not a multiple of the number of attention heads"),
        (config(num_attention_heads=0), "ZeroDivisionError"),
        (config(hidden_size=-4), "negative dimension"),
        (config(model_type="vit"), "Unrecognized configuration class"),
        (config(model_type="llamma"), "model type `llamma`"),
        (config(quantization_config={"quant_method": "gptq", "bits": 4}), "requires optimum"),
        (config(quantization_config={"quant_method": "nope"}), "is quantised by 'nope', which transformers"),
    ],
)
def test_a_model_that_is_not_what_was_saved_is_refused(
    folder: Path, spoil: Callable[[Path], None], message: str
) -> None:
    assert load(folder) is not None
    spoil(folder)
    assert message in refusal(folder)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(folder: Path) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(folder)
    assert "has a tokenizer with tokens up to 49, but embeddings for 49 only" in refusal(folder)


def test_check_refuses_what_run_would_train_from_random(folder: Path, tiny: Any, tmp_path: Path) -> None:
    tensors(lambda t: t.pop(UP))(folder)
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(tiny(tmp_path / "r", model={"path": str(folder)})))
    result = CliRunner().invoke(app, ["check", str(file)])
    assert result.exit_code == 2
    assert UP in result.output
    assert "Ready to run" not in result.output


def test_a_typo_in_a_local_path_does_not_talk_of_the_hub_and_names_what_is_near(folder: Path) -> None:
    for wrong in (folder.with_name("bse"), folder.parent / "basee"):
        said = refusal(wrong)
        assert f"no Hugging Face model at '{wrong}' (nothing is there)" in said
        assert f"Did you mean '{folder}'?" in said
        assert "connect" not in said
    assert "There is no folder 'runs/nowhere' either" in refusal("runs/nowhere/model")
    assert "no config.json there" in refusal(folder.parent)


def test_what_may_be_a_hub_id_names_the_folder_that_was_looked_for_too() -> None:
    said = refusal("some-modle")
    assert "no folder 'some-modle' here (looked in /" in said
    assert "as a hub id it could not be loaded" in said


def test_a_damaged_gguf_file_is_told(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert f"'{tmp_path / 'm.gguf'}' could not be loaded" in refusal(tmp_path / "m.gguf")


def test_a_gguf_file_without_the_package_that_reads_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.is_gguf_available", lambda: False)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert "is not installed: pip install gguf" in refusal(tmp_path / "m.gguf")


def test_a_folder_of_several_gguf_files_asks_which(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert "holds 2 GGUF files: a.gguf, b.gguf. Give one of them." in refusal(tmp_path)


def test_a_home_folder_that_nobody_has_is_told() -> None:
    assert "no Hugging Face model at '~nobody-1/x'" in refusal("~nobody-1/x")


def test_a_path_that_no_file_system_takes_is_told() -> None:
    assert "can't be read (File name too long)" in refusal("x" * 300)


def test_a_folder_that_may_not_be_read_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_file", refuse)
    assert "can't be read (Permission denied)" in refusal(folder)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=300))
def test_every_text_is_local_or_not(path: str) -> None:
    assert is_local(path) in (True, False)
    assert is_local(f"./{path}")
    assert is_local(f"a/b/{path}/c")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"toy": True, "hidden": 9}, "model.hidden: Input should be a multiple of 8 (got 9)"),
        ({"toy": True, "hidden": 2**40}, "model.hidden: Input should be less than or equal to 8192"),
        ({"toy": True, "lora": {"r": 2**40}}, "model.lora.r: Input should be less than or equal to 65536"),
    ],
)
def test_sizes_that_no_machine_has_are_refused(tiny: Any, tmp_path: Path, model: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(RunConfig, tiny(tmp_path / "r", model=model), "c")
    assert message in str(error.value)


# the output, and files that may not be used


def test_an_output_that_no_file_system_takes_is_found_by_check(tiny: Any, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(tiny(tmp_path / ("x" * 300))))
    result = CliRunner().invoke(app, ["check", str(file)])
    assert result.exit_code == 2
    assert "can't be used (File name too long)" in result.output


def test_a_folder_that_may_not_be_written_is_found_by_check(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(tiny(tmp_path / "new" / "r")))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    result = CliRunner().invoke(app, ["check", str(file)])
    assert result.exit_code == 2
    assert f"output: {tmp_path} may not be written (Permission denied)" in result.output
    assert not (tmp_path / "new").exists()


def test_any_file_that_may_not_be_used_is_a_message_and_no_traceback(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import holdfast.runner.config as runner_config

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr(runner_config, "load_config", refuse)
    result = CliRunner().invoke(app, ["check", str(tmp_path / "c.yaml")])
    assert result.exit_code == 2
    assert "error: /some/file: Permission denied" in result.output
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("name", ["[/x]", "[red]x", ":smile:", "t" * 250, "a/b", "..", "é" * 120])
def test_a_run_survives_any_name_of_task_label_and_folder(tiny: Any, tmp_path: Path, name: str) -> None:
    rows = "".join(json.dumps({"prompt": f"{c}=", "completion": c}) + "\n" for c in "abcd")
    (tmp_path / "data.jsonl").write_text(rows)
    tasks = {
        "source": "hub",
        "tasks": {name: {"path": str(tmp_path / "data.jsonl"), "test": "train"}, "b": {"path": "x.jsonl"}},
        "order": [name],
    }
    output = tmp_path / "[out]" / name.replace("/", "_")[:100].replace("..", "dots")
    training = {"max_steps": 1}
    values = tiny(
        output, tasks=tasks, label=name, training=training, model={"toy": True, "hidden": 16, "layers": 1}
    )
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(values))
    for command in ("check", "run"):
        result = CliRunner(env={"COLUMNS": "400"}).invoke(app, [command, str(file)])
        assert result.exit_code == 0, (result.output, result.exception)
    assert name in result.output
    assert json.loads((output / "metrics.json").read_text())["label"] == name
