"""Bad input: each case stops with a message that says where, what, and how to go on; nothing is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import holdfast
from holdfast.cli import app
from holdfast.config import validate
from holdfast.errors import (
    DataError,
    PriorMismatchError,
    RunDirectoryError,
    StorageError,
    TrainingDivergedError,
    UnruledOperationError,
)
from holdfast.models import block_parameters, tiny_llama
from holdfast.runner import RunConfig, run
from holdfast.tasks import toy_tokenizer
from processes import started

ROWS = [{"prompt": "ab=", "completion": "a"}, {"prompt": "cd=", "completion": "c"}]
ALL_SAMPLES = {"name": "lrp", "samples": 8, "correct_only": False}


def holdfast_cli(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def config_of(values: dict[str, Any]) -> RunConfig:
    return validate(RunConfig, values, source="test")


def one_task(tiny: Any, output: Path, **sections: Any) -> dict[str, Any]:
    """The smallest run: one toy task, no zero-shot row."""
    values: dict[str, Any] = tiny(output, evaluation={"zero_shot": False}, **sections)
    values["tasks"] = {**values["tasks"], "order": ["copy"]}
    return values


def write_lines(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def jsonl_config(tiny: Any, folder: Path, train: list[str]) -> tuple[Path, Path]:
    """A configuration that reads one JSONL task with these training lines; and the training file."""
    file = write_lines(folder / "data" / "letters" / "train.jsonl", train)
    write_lines(folder / "data" / "letters" / "test.jsonl", [json.dumps(row) for row in ROWS])
    values = tiny(folder / "run", tasks={"source": "jsonl", "path": str(folder / "data")})
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    return config, file


def final_weights(output: Path) -> dict[str, torch.Tensor]:
    last = sorted((output / "tasks").glob("[0-9][0-9]-*"))[-1]
    return load_file(next((last / "model").glob("*.safetensors")))


def assert_same_run(a: Path, b: Path) -> None:
    weights_a, weights_b = final_weights(a), final_weights(b)
    assert weights_a.keys() == weights_b.keys()
    assert all(torch.equal(weights_a[name], weights_b[name]) for name in weights_a)
    matrix_a, matrix_b = (json.loads((x / "metrics.json").read_text())["matrix"] for x in (a, b))
    assert matrix_a == matrix_b


# data


def test_malformed_lines_are_named_with_file_and_line_all_at_once(tiny: Any, tmp_path: Path) -> None:
    good = json.dumps(ROWS[0])
    lines = [good, '{"prompt": "ab", "completion"', good, '{"prompt": "ab", "completion": " "}', "[1]"]
    config, file = jsonl_config(tiny, tmp_path, lines)
    result = holdfast_cli("check", str(config))
    assert result.exit_code == 2
    assert f"{file}:2: not JSON" in result.output
    assert f"{file}:4: empty completion: give the row an answer or leave it out" in result.output
    assert f"{file}:5: a row must be an object" in result.output
    assert f"{file}:1" not in result.output
    assert "Ready to run" not in result.output
    told = "leave them out with tasks.bad_rows=skip"
    assert result.output.count(told) == 1
    assert told in holdfast_cli("run", str(config)).output
    assert told not in holdfast_cli("check", str(config), "tasks.bad_rows=skip").output


def test_run_refuses_malformed_data_before_it_trains(tiny: Any, tmp_path: Path) -> None:
    config, file = jsonl_config(tiny, tmp_path, ["{"])
    result = holdfast_cli("run", str(config))
    assert result.exit_code == 2
    assert f"error: {file}:1: not JSON" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run" / "tasks").exists()


def test_wrong_column_lists_the_columns_that_are_there(tiny: Any, tmp_path: Path) -> None:
    config, file = jsonl_config(tiny, tmp_path, [json.dumps({"question": "ab=", "answer": "a"})])
    result = holdfast_cli("check", str(config))
    assert result.exit_code == 2
    assert f"{file}:1: no column 'prompt'; columns of this row: question, answer" in result.output
    assert "Say which column is which, such as tasks.columns.prompt=question" in result.output
    assert "bad_rows" not in result.output, "it would leave out all"


def test_columns_named_in_the_config_are_read(tiny: Any, tmp_path: Path) -> None:
    config, _ = jsonl_config(tiny, tmp_path, [json.dumps({"question": "ab=", "answer": "a"})])
    write_lines(tmp_path / "data/letters/test.jsonl", [json.dumps({"question": "ba=", "answer": "b"})])
    columns = ["tasks.columns.prompt=question", "tasks.columns.completion=answer"]
    assert holdfast_cli("check", str(config), *columns).exit_code == 0


def test_empty_data_set_is_named(tiny: Any, tmp_path: Path) -> None:
    config, file = jsonl_config(tiny, tmp_path, [])
    result = holdfast_cli("check", str(config))
    assert result.exit_code == 2
    assert f"{file}: the data set is empty" in result.output


def test_attributing_no_rows_is_refused() -> None:
    tokenizer = toy_tokenizer()
    with pytest.raises(DataError, match="there are no rows"):
        holdfast.attribute(tiny_llama(tokenizer, hidden=16, layers=1), tokenizer, [], progress=False)


def test_corrected_configuration_may_take_over_a_folder_in_which_nothing_began(
    tiny: Any, tmp_path: Path
) -> None:
    values = one_task(tiny, tmp_path / "r")
    wrong = {**values, "tasks": {**values["tasks"], "order": ["copi"]}}
    with pytest.raises(DataError, match=r"no task 'copi'\. Did you mean 'copy'"):
        run(config_of(wrong))
    assert run(config_of(values))["tasks"] == ["copy"]
    written = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())
    assert written["tasks"]["order"] == ["copy"]


# attribution


@pytest.mark.parametrize("importance", ["lrp", "inputs"])
def test_task_of_which_nothing_is_right_is_rated_by_all_rows_and_said_so(
    importance: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = toy_tokenizer()
    model = tiny_llama(tokenizer, hidden=16, layers=1)
    prior = holdfast.attribute(model, tokenizer, ROWS, importance=importance)
    said = " ".join(capsys.readouterr().err.split())
    assert "the model answers none of the samples right, so all of them are rated" in said
    assert (prior.meta["samples_used"], prior.meta["correct_only"], prior.meta["none_right"]) == (
        2,
        False,
        True,
    )
    every = {"name": importance, "correct_only": False}
    asked = holdfast.attribute(model, tokenizer, ROWS, importance=every, progress=False)
    assert all(torch.equal(prior.tensors[n], t) for n, t in asked.tensors.items())
    assert "none_right" not in asked.meta


def test_operation_without_a_rule_is_named_with_its_module() -> None:
    tokenizer = toy_tokenizer()
    model = tiny_llama(tokenizer, hidden=16, layers=1)

    class Strange(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.i0(x)

    model.model.layers[0].mlp.act_fn = Strange()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(
        UnruledOperationError, match=r"layers\.0\.mlp.*the operation '.*i0.*' has no attribution rule"
    ):
        holdfast.attribute(model, tokenizer, ROWS, importance=ALL_SAMPLES, progress=False)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_tied_embeddings_are_trained_attributed_and_reloaded_tied(tiny: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    strategy = {"name": "attribution", "importance": ALL_SAMPLES}
    model = {"toy": True, "hidden": 32, "layers": 2, "trainable": "all"}
    values = tiny(tmp_path / "r", strategy=strategy, model=model)
    values["tasks"] = {**values["tasks"], "order": ["copy", "head"]}
    run(config_of(values))
    for stage in ("01-copy", "02-head"):
        folder = tmp_path / "r" / "tasks" / stage
        record = json.loads((folder / "prior" / "prior.json").read_text())
        assert record["conservation_max_relative_error"] < 1e-4
        weights = load_file(folder / "prior" / "prior.safetensors")
        assert not [name for name in weights if "embed" in name or "lm_head" in name]
        loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "r/tasks/01-copy/model")
    assert not torch.equal(first.lm_head.weight, loaded.lm_head.weight), "the tied weight was not trained"


def save_prior_of_another_model(folder: Path) -> Path:
    other = tiny_llama(toy_tokenizer(), hidden=16, layers=1)
    tensors = {name: torch.ones(p.shape) for name, p in block_parameters(other).items()}
    return holdfast.ImportancePrior(tensors, {"importance": "uniform"}).save(folder)


def test_prior_from_another_model_is_found_by_check_and_before_training(tiny: Any, tmp_path: Path) -> None:
    prior = save_prior_of_another_model(tmp_path / "prior")
    strategy = {"name": "attribution", "initial_prior": str(prior)}
    values = tiny(tmp_path / "r", strategy=strategy)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    result = holdfast_cli("check", str(config))
    assert result.exit_code == 2
    assert "strategy.initial_prior: the prior does not fit the model (LlamaForCausalLM)" in result.output
    assert "model.layers.1.self_attn.q_proj.weight" in result.output  # a missing name
    assert "(16, 16) instead of (32, 32)" in result.output
    with pytest.raises(PriorMismatchError, match=r"missing \(7\).*of another shape \(7\)"):
        run(config_of(values))
    assert not (tmp_path / "r" / "zero_shot").exists()


# training that diverges


def test_infinite_learning_rate_stops_with_step_and_batch(tiny: Any, tmp_path: Path) -> None:
    training = {"epochs": 2, "batch_size": 8, "learning_rate": 1e30, "max_grad_norm": 0}
    config = config_of(one_task(tiny, tmp_path / "r", training=training))
    with pytest.raises(TrainingDivergedError, match=r"became nan at step \d+") as error:
        run(config)
    found = re.search(r"at step (\d+)\. The batch is saved in (\S+)\. Lower", str(error.value))
    assert found is not None
    with safe_open(found[2], "pt") as saved:
        assert saved.metadata()["step"] == found[1]
        assert saved.get_tensor("input_ids").shape[0] == 8
        assert set(saved.keys()) >= {"input_ids", "attention_mask", "labels"}
    with pytest.raises(TrainingDivergedError):  # still a run directory: it tries again, and tells again
        run(config)


def test_nan_in_a_weight_is_told_at_the_first_step(tmp_path: Path) -> None:
    from holdfast.tasks import Encoder, Example, Template
    from holdfast.training.loop import train
    from holdfast.training.options import TrainingOptions

    tokenizer = toy_tokenizer()
    model = tiny_llama(tokenizer, hidden=16, layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    rows = Encoder(tokenizer, Template(), encoder_decoder=False).many([Example("ab=", "a")] * 4)
    with pytest.raises(TrainingDivergedError, match="became nan at step 1"):
        train(model, rows, TrainingOptions(), tokenizer=tokenizer, folder=tmp_path / "checkpoints", seed=0)


def test_run_that_met_a_nan_is_resumed_and_ends_bit_identical(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from holdfast.training import bridge

    training = {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "checkpoint_steps": 3}
    whole = config_of(one_task(tiny, tmp_path / "whole", training=training))
    broken = config_of(one_task(tiny, tmp_path / "broken", training=training))
    run(whole)
    original, calls = bridge.completion_loss, [0]

    def nan_at_step_five(*args: Any) -> torch.Tensor:
        calls[0] += 1
        return original(*args) * (float("nan") if calls[0] == 5 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(bridge, "completion_loss", nan_at_step_five)
        with pytest.raises(TrainingDivergedError, match="at step 5"):
            run(broken)
    partial = tmp_path / "broken" / "tasks" / "01-copy.partial"
    assert (partial / "bad_batch.safetensors").exists()
    assert [p.name for p in (partial / "checkpoints").iterdir()] == ["checkpoint-3"]
    run(broken)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    assert not (tmp_path / "broken/tasks/01-copy/bad_batch.safetensors").exists()


# disk full


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of three tasks that the broken ones are held against."""
    from tiny_runs import tiny_run

    folder = tmp_path_factory.mktemp("whole") / "run"
    run(config_of(tiny_run(folder, strategy=FISHER)))
    return folder


FISHER = {"name": "attribution", "importance": {"name": "fisher", "samples": 8}}


def full_disk(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Make one kind of write fail as it does on a full disk, from the second task on."""
    import safetensors.torch

    if where == "fsync":
        original = os.fsync

        def fsync(descriptor: int) -> None:
            if "02-" in os.readlink(f"/proc/self/fd/{descriptor}"):
                raise OSError(28, "No space left on device")
            original(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
    elif where == "torch.save":
        original_save = torch.save

        def save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
            if "02-" in str(f):
                raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
            original_save(obj, f, *args, **kwargs)

        monkeypatch.setattr(torch, "save", save)
    else:
        original_file = safetensors.torch.save_file

        def save_file(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
            if "02-" in str(filename):
                raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
            original_file(tensors, filename, *args, **kwargs)

        monkeypatch.setattr(safetensors.torch, "save_file", save_file)
        import transformers.modeling_utils

        monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", save_file)


@pytest.mark.parametrize("where", ["fsync", "safetensors", "torch.save"])
def test_full_disk_keeps_finished_tasks_and_the_run_goes_on_later(
    where: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_run: Path
) -> None:
    config = config_of(tiny(tmp_path / "r", strategy=FISHER))
    with monkeypatch.context() as patch:
        full_disk(patch, where)
        with pytest.raises(StorageError, match=r"could not (be written|write).*[Ff]ree some space"):
            run(config)
    first = tmp_path / "r" / "tasks" / "01-copy"
    kept = {p: p.read_bytes() for p in first.rglob("*") if p.is_file()}
    assert not (tmp_path / "r" / "tasks" / "02-flip").exists()
    run(config)
    assert all(p.read_bytes() == content for p, content in kept.items()), "a finished task was redone"
    assert_same_run(whole_run, tmp_path / "r")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 600 KiB, where this machine lets one be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"needs the right to mount a small file system ({error})")
    if done.returncode:
        pytest.skip(f"needs the right to mount a small file system ({done.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_really_full_disk_stops_the_run_and_a_larger_one_lets_it_end(
    tiny: Any, small_disk: Path, whole_run: Path
) -> None:
    config = config_of(tiny(small_disk / "r", strategy=FISHER))
    with pytest.raises(StorageError, match=r"No space left|inline_container|PytorchStreamWriter"):
        run(config)
    grow = ["mount", "-o", "remount,size=100m", str(small_disk)]
    subprocess.run(grow, check=True)
    run(config)
    assert_same_run(whole_run, small_disk / "r")


# two processes, and ctrl-C


def wait_for(condition: Any, process: Any, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive(), "the run ended before it could be stopped"
        assert time.monotonic() < end, "the run did not come this far"
        time.sleep(0.01)


def test_second_process_is_refused_and_ctrl_c_saves_and_says_how_to_continue(
    tiny: Any, tmp_path: Path
) -> None:
    training = {"epochs": 100, "batch_size": 8, "learning_rate": 3e-3, "checkpoint_steps": 80}
    model = {"toy": True, "hidden": 16, "layers": 1}
    whole = one_task(tiny, tmp_path / "whole", training=training, model=model)
    run(config_of(whole))

    folder = tmp_path / "broken"
    file = tmp_path / "broken.yaml"
    file.write_text(yaml.safe_dump({**whole, "output": str(folder)}))
    err = tmp_path / "err"
    process = started("run", file, "label=stopped", cwd=tmp_path, out=tmp_path / "out", err=err)
    try:
        checkpoints = folder / "tasks" / "01-copy.partial" / "checkpoints"
        wait_for(lambda: (checkpoints / "checkpoint-80" / "seal.json").exists(), process)
        os.kill(process.pid, signal.SIGSTOP)  # so that it can't end while the second one tries
        second = holdfast_cli("run", str(file), "label=stopped")
        assert second.exit_code == 2
        assert f"another run is working here (process {process.pid})" in second.output
        assert "output=DIR" in second.output
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGCONT)
        process.join(240)
    finally:
        process.kill()
        process.join()
    said = err.read_text()
    assert process.exitcode == 130, said
    stopped = re.search(r"Stopped after step (\d+) of 400; saved\.", said)
    assert stopped is not None, said
    assert f"Continue with: holdfast run {file} label=stopped" in " ".join(said.split())
    assert "Traceback" not in said
    assert (checkpoints / f"checkpoint-{stopped[1]}" / "seal.json").exists()

    again = holdfast_cli("run", str(file), "label=stopped")
    assert again.exit_code == 0, again.output
    assert_same_run(tmp_path / "whole", folder)


def test_folder_that_can_not_be_made_is_told(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="can't be used as a run directory"):
        run(config_of(tiny(tmp_path / "file")))
