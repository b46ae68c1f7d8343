"""The command line as a user types it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from command_line import holdfast_cli
from holdfast import Learner
from holdfast.importance.registry import REGISTRY
from holdfast.records import Faithfulness
from holdfast.strategies import STRATEGIES
from holdfast.tasks import TOY_TASKS, list_orders, toy_suite, toy_tokenizer
from tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
COMMANDS = ("demo", "run", "compare", "attribute", "report", "check", "list")


def config_file(folder: Path, values: dict[str, Any]) -> Path:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(scope="module")
def head_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task ``head`` as a folder with train.jsonl and test.jsonl."""
    folder = tmp_path_factory.mktemp("data") / "head"
    folder.mkdir()
    (task,) = toy_suite(["head"], train_rows=24, test_rows=12)
    for name, part in (("train", task.train), ("test", task.test)):
        rows = [json.dumps({"prompt": e.prompt, "completion": e.completion}) for e in part]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return folder


# help


def test_help_teaches_by_example_and_names_every_command() -> None:
    result = holdfast_cli("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.output
    for example in ("holdfast demo", "holdfast run   configs/toy.yaml", "holdfast attribute --model"):
        assert example in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_shows_an_example(command: str) -> None:
    result = holdfast_cli(command, "--help")
    assert result.exit_code == 0
    assert re.search(rf"holdfast {command} \S", result.output.split("Usage:")[1].split("\n", 1)[1])


def test_help_does_not_lose_what_stands_in_brackets() -> None:
    shown = holdfast_cli("harness", "--help").output
    assert "pip install 'holdfast[harness]'" in shown
    assert "evaluation.harness=[arc_easy]" in shown


def test_no_arguments_show_the_help() -> None:
    assert "holdfast check configs/toy.yaml" in holdfast_cli().output


def test_unknown_command_is_refused() -> None:
    result = holdfast_cli("runn", "x.yaml")
    assert result.exit_code == 2
    assert "No such command 'runn'" in result.output


def test_help_as_a_process_is_quick_because_torch_is_not_loaded() -> None:
    code = (
        "import sys\nfrom holdfast.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "holdfast demo" in done.stdout


# check


def test_check_lists_every_config_error_at_once_with_what_is_allowed(tiny: Any, tmp_path: Path) -> None:
    values = tiny(tmp_path / "r")
    values["training"] = {"learning_rte": 1e-3, "optimizer": "adam", "epochs": "many", "batch_size": 0}
    values["strategy"] = {"name": "attribution", "importance": {"name": "fisher", "top_k": 3}}
    values["templat"] = {}
    result = holdfast_cli("check", config_file(tmp_path, values))
    assert result.exit_code == 2
    assert "6 problems in the configuration" in result.output
    for line in (
        "training.learning_rte: unknown key. Did you mean 'learning_rate'? Allowed here: batch_size,",
        "training.optimizer: Input should be 'adamw', 'sgd' or 'adafactor' (got 'adam'). Did you mean",
        "training.epochs: Input should be a valid number, unable to parse string as a number (got 'many')",
        "training.batch_size: Input should be greater than or equal to 1 (got 0)",
        "templat: unknown key. Did you mean 'template'?",
    ):
        assert line in result.output
    assert re.search(
        r"strategy\.\S*importance\.\S*top_k: unknown key\..* Allowed here: .*samples", result.output
    )


def test_check_names_the_strategies_for_an_unknown_one(tiny: Any, tmp_path: Path) -> None:
    result = holdfast_cli("check", config_file(tmp_path, tiny(tmp_path / "r", strategy="atribution")))
    assert result.exit_code == 2
    assert "strategy: no such choice: 'atribution'. Did you mean 'attribution'? Allowed: " in result.output
    line = next(line for line in result.output.splitlines() if "no such choice" in line)
    assert all(f"'{name}'" in line for name in STRATEGIES)


def test_check_refuses_an_option_that_does_not_apply(tiny: Any, tmp_path: Path) -> None:
    model = {"toy": True, "hidden": 32, "layers": 2, "trainable": "all", "lora": {"r": 2}}
    strategy = {"name": "attribution", "mechanism": {"name": "gate", "shape": "paper", "quantile": 0.1}}
    result = holdfast_cli(
        "check", config_file(tmp_path, tiny(tmp_path / "r", model=model, strategy=strategy))
    )
    assert result.exit_code == 2
    assert "`trainable` does not apply with `lora`: only the adapters are trained" in result.output
    assert "`quantile` applies to `shape: soft` only, not to `paper`" in result.output


def test_check_names_missing_sections_and_missing_files(tmp_path: Path) -> None:
    result = holdfast_cli("check", config_file(tmp_path, {"output": "r"}))
    assert result.exit_code == 2
    for section in ("model", "tasks", "strategy"):
        assert f"{section}: required, but not given." in result.output
    result = holdfast_cli("check", tmp_path / "nothing.yaml")
    assert result.exit_code == 2
    assert "nothing.yaml: can't be read (No such file or directory)" in result.output


def test_check_tells_where_the_yaml_is_broken(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model:\n  toy: [true\n")
    result = holdfast_cli("check", file)
    assert result.exit_code == 2
    assert f"{file}: not valid YAML" in result.output
    assert "line 3" in result.output


def test_check_finds_unknown_tasks_a_missing_model_and_a_bad_output_together(
    tiny: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    values = tiny(tmp_path / "file", model={"path": str(tmp_path / "no-model")})
    values["tasks"] = {"source": "toy", "order": ["copy", "filp", "head"]}
    result = holdfast_cli("check", config_file(tmp_path, values))
    assert result.exit_code == 2
    assert "problem: tasks.order: no task 'filp'. Did you mean 'flip'?" in result.output
    assert "no Hugging Face model at" in result.output
    assert "is a file, not a folder" in result.output
    assert "Ready to run" not in result.output


def test_check_counts_prompts_over_the_limit_and_says_what_happens_to_them(tiny: Any, tmp_path: Path) -> None:
    values = tiny(tmp_path / "r", template={"max_prompt_tokens": 10, "keep": "last"})
    values["tasks"] = {**values["tasks"], "order": ["copy"]}
    result = holdfast_cli("check", config_file(tmp_path, values))
    assert result.exit_code == 0
    assert (
        "note: copy: 40 of 40 prompts are longer than template.max_prompt_tokens (10); "
        "their last tokens are kept, up to 2 are cut." in result.output
    )


def test_check_refuses_rows_longer_than_the_model_takes(tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "long"
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        (folder / f"{part}.jsonl").write_text(json.dumps({"prompt": "a" * 600, "completion": "b"}))
    values = tiny(tmp_path / "r", template={"max_prompt_tokens": 600})
    values["tasks"] = {"source": "jsonl", "path": str(tmp_path / "data")}
    result = holdfast_cli("check", config_file(tmp_path, values))
    assert result.exit_code == 2
    assert "long: the longest row (prompt and answer) has 603 tokens, the model takes 512" in result.output


def test_check_of_a_good_config_estimates_and_writes_nothing(tiny: Any, tmp_path: Path) -> None:
    strategy = {"name": "attribution", "importance": {"name": "lrp", "aggregate": "topk"}}
    result = holdfast_cli("check", config_file(tmp_path, tiny(tmp_path / "r", strategy=strategy)))
    assert result.exit_code == 0, result.output
    assert "Ready to run." in result.output
    for what in ("parameters", "weights", "optimizer state", "prior", "protection", "per-sample maps"):
        assert what in result.output
    assert re.search(r"optimizer steps\W+24 \(8, 8, 8 by stage\)", result.output)  # 32 rows / 8, 2 epochs
    assert re.search(r"answers generated\W+up to 96 \(24 in each of 4 rounds\)", result.output)
    assert not (tmp_path / "r").exists()


# run


def test_run_with_overrides_and_the_table_at_the_end(tiny: Any, tmp_path: Path) -> None:
    file = config_file(tmp_path, tiny(tmp_path / "r"))
    other = tmp_path / "the other"
    overrides = [f"output={other}", "label=mine", "strategy=ewc", "strategy.strength=1e4", "seed=3"]
    overrides += ["tasks.order=[copy, flip]", "training.max_steps=2", f"--csv={tmp_path / 'table.csv'}"]
    result = holdfast_cli("run", file, *overrides)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "table.csv").read_text().splitlines()[1].startswith("mine,")
    assert "learning accuracy" in result.output
    assert "mine" in result.output
    assert f"Run directory: {other}   Report: holdfast report '{other}'" in result.output
    written = yaml.safe_load((other / "config.yaml").read_text())
    assert written["strategy"]["name"] == "ewc"
    assert written["strategy"]["strength"] == 1e4
    assert written["seed"] == 3
    metrics = json.loads((other / "metrics.json").read_text())
    assert metrics["tasks"] == ["copy", "flip"]
    assert (metrics["finished"], metrics["seed"], metrics["label"]) == (True, 3, "mine")
    steps = [json.loads(p.read_text())["steps"] for p in sorted(other.glob("tasks/*/training.json"))]
    assert steps == [2, 2]
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epochs", "'training.epochs': expected key=value"),
        ("seed.x=1", "seed is 0, not a section"),
        ("training.epochs=[1", "the value is not valid YAML"),
        ("training.epoch=3", "training.epoch: unknown key. Did you mean 'epochs'?"),
        ("strategy.strength=1", "strategy.strength: unknown key."),
    ],
)
def test_wrong_override_is_told(override: str, message: str, tiny: Any, tmp_path: Path) -> None:
    result = holdfast_cli("run", config_file(tmp_path, tiny(tmp_path / "r")), override)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "r").exists()


# list


@pytest.mark.parametrize(
    ("what", "names"),
    [("strategies", STRATEGIES), ("tasks", TOY_TASKS), ("orders", list_orders()), ("importances", REGISTRY)],
)
def test_list_shows_everything_that_can_be_named(what: str, names: dict[str, Any]) -> None:
    result = holdfast_cli("list", what)
    assert result.exit_code == 0
    for name in names:
        assert re.search(rf"^\W*{re.escape(name)}\b", result.output, re.MULTILINE), name


def test_list_of_something_else_says_what_there_is() -> None:
    result = holdfast_cli("list", "models")
    assert result.exit_code == 2
    assert "'strategies', 'tasks', 'orders', 'importances'" in result.output


# attribute


def test_attribute_writes_a_prior_and_says_how_it_was_made(
    trained: Path, head_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "prior"
    model = trained / "tasks" / "01-head" / "model"
    result = holdfast_cli(
        *("attribute", "--model", model, "--data", head_data, "--out", out),
        *("--importance", "lrp", "--set", "rules=paper"),
    )
    assert result.exit_code == 0, result.output
    assert f"Prior: {out} (14 tensors," in result.output
    record = json.loads((out / "prior.json").read_text())
    assert record["conservation_max_relative_error"] < 1e-4
    assert record["samples_seen"] == 24
    assert 1 <= record["samples_used"] <= 24
    assert record["options"]["rules"] == "paper"
    assert record["importance"] == "lrp"
    assert record["tasks"] == ["head"]
    assert record["seconds"] > 0
    tensors = load_file(out / "prior.safetensors")
    assert len(tensors) == 14  # seven linear maps in each of two blocks
    assert sum(t.numel() for t in tensors.values()) == record["elements"]
    assert not (out / "faithfulness.json").exists()


def test_attribute_tests_faithfulness(trained: Path, head_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "prior"
    result = holdfast_cli(
        *("attribute", "--model", trained / "tasks/01-head/model", "--data", head_data, "--out", out),
        *("--importance", "fisher", "--set", "samples=8", "--test-faithfulness"),
    )
    assert result.exit_code == 0, result.output
    measured = json.loads((out / "faithfulness.json").read_text())
    assert measured["task"] == "head"
    assert measured["percent"][0] == 0.0
    curves = measured["curves"]
    assert set(curves) == {"importance", "random", "magnitude"}
    assert all(len(curve) == len(measured["percent"]) for curve in curves.values())
    intact = {curve[0] for curve in curves.values()}
    assert len(intact) == 1, "with nothing zeroed all choices are the same model"
    assert intact.pop() >= 50, "the model has not learned its task: the curves say nothing"
    assert all(min(curve) < curve[0] for curve in curves.values()), "zeroing 30 % changed nothing"
    assert "importance:" in result.output
    again = ("attribute", "--model", trained / "tasks/01-head/model", "--data", head_data, "--out", out)
    assert holdfast_cli(*again, "--importance", "fisher", "--set", "samples=8").exit_code == 0
    assert (out / "faithfulness.json").exists(), "the prior is the same"
    other = holdfast_cli(*again, "--importance", "magnitude")
    assert other.exit_code == 2
    assert "finished prior that was made otherwise" in " ".join(other.output.split())
    assert (out / "faithfulness.json").exists(), "nothing was touched"
    framed = ("--set", "template.prompt='{bos}{prompt}?'")
    replaced = holdfast_cli(*again, "--importance", "fisher", "--set", "samples=8", *framed)
    assert replaced.exit_code == 0, replaced.output
    assert "of another model, data or template, or stored otherwise; replaced" in " ".join(
        replaced.output.split()
    )
    assert not (out / "faithfulness.json").exists(), "it was measured with another prior"


def test_attribute_takes_the_template_of_a_run_and_set_wins(
    trained: Path, head_data: Path, tmp_path: Path, tiny: Any
) -> None:
    framed = {"prompt": "{prompt}?", "max_prompt_tokens": 6}
    file = config_file(tmp_path, tiny(tmp_path / "r", template=framed))
    model = trained / "tasks" / "01-head" / "model"

    def prior(*arguments: object) -> bytes:
        common = ("attribute", "--model", model, "--data", head_data, "--out", tmp_path / "p")
        result = holdfast_cli(*common, "--importance", "fisher", "--set", "samples=4", *arguments)
        assert result.exit_code == 0, result.output
        return (tmp_path / "p" / "prior.safetensors").read_bytes()

    typed = [part for key, value in framed.items() for part in ("--set", f"template.{key}='{value}'")]
    plain = prior()
    assert prior("--config", trained) == plain, "that run has the default template"
    assert prior("--config", file) == prior(*typed) != plain
    back = ("--set", "template.prompt='{bos}{prompt}'", "--set", "template.max_prompt_tokens=512")
    assert prior("--config", file, *back) == plain


def test_attribute_takes_the_template_of_a_folder_of_skills(
    trained: Path, head_data: Path, tmp_path: Path
) -> None:
    framed = {"prompt": "{prompt}?", "max_prompt_tokens": 6}
    training = {"max_steps": 1}
    with (
        Learner(
            tiny_model("llama"),
            toy_tokenizer(),
            "sequential",
            folder=tmp_path / "s",
            training=training,
            template=framed,
        ) as learner,
        learner.task("may", [{"prompt": "a", "completion": "b"}]) as stage,
    ):
        stage.train()
    model = trained / "tasks" / "01-head" / "model"
    common = (
        "attribute",
        "--model",
        model,
        "--data",
        head_data,
        "--importance",
        "fisher",
        "--set",
        "samples=4",
    )
    typed = [part for key, value in framed.items() for part in ("--set", f"template.{key}='{value}'")]
    for out, how in (("p", ("--config", tmp_path / "s")), ("q", typed)):
        result = holdfast_cli(*common, "--out", tmp_path / out, *how)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "p/prior.safetensors").read_bytes() == (tmp_path / "q/prior.safetensors").read_bytes()


def test_attribute_tests_answers_as_the_run_does(
    trained: Path, head_data: Path, tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = config_file(tmp_path, tiny(tmp_path / "r", evaluation={"max_new_tokens": 3, "batch_size": 7}))
    seen: list[Any] = []

    def measured(*_: Any, options: Any, **__: Any) -> Faithfulness:
        seen.append((options.max_new_tokens, options.batch_size))
        return Faithfulness(percent=[], curves={})

    monkeypatch.setattr("holdfast.runner.faithfulness.measure_faithfulness", measured)
    model, out = trained / "tasks" / "01-head" / "model", tmp_path / "p"
    result = holdfast_cli(
        *("attribute", "--model", model, "--data", head_data, "--out", out, "--importance", "magnitude"),
        *("--config", file, "--set", "evaluation.batch_size=5", "--test-faithfulness"),
    )
    assert result.exit_code == 0, result.output
    assert seen == [(3, 5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--importance", "fischer"], "no such choice: 'fischer'. Did you mean 'fisher'?"),
        (["--set", "weightin=uniform"], "weightin: unknown key. Did you mean 'weighting'?"),
        (["--set", "weighting=uniform", "--set", "correct_only=true"], "`correct_only` applies to"),
        (["--dtype", "int8"], "model.dtype: Input should be 'float32'"),
        (["--data", "nowhere"], "no file or folder 'nowhere' (looked in /"),
        (["--model", "./nowhere"], "no Hugging Face model at './nowhere'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: can't be read (No such file or directory)"),
        (
            ["--config", "tests"],
            "--config takes the folder of a run or of skills, or a file for `holdfast run`.",
        ),
        (["--config", str(ROOT / "README.md")], "--config takes the folder of a run"),
        (["--config", str(ROOT / "configs/compare/toy.yaml")], "a grid (it has base and rows)"),
    ],
)
def test_attribute_tells_what_is_wrong(
    arguments: list[str], message: str, trained: Path, head_data: Path, tmp_path: Path
) -> None:
    given = {
        "--model": str(trained / "tasks/01-head/model"),
        "--data": str(head_data),
        "--out": str(tmp_path / "p"),
    }
    options = [part for pair in given.items() if pair[0] not in arguments for part in pair]
    result = holdfast_cli("attribute", *options, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "p").exists()


def test_faithfulness_without_test_rows_is_refused_before_any_work(
    trained: Path, head_data: Path, tmp_path: Path
) -> None:
    result = holdfast_cli(
        *("attribute", "--model", trained / "tasks/01-head/model", "--data", head_data / "train.jsonl"),
        *("--out", tmp_path / "p", "--importance", "fisher", "--test-faithfulness"),
    )
    assert result.exit_code == 2
    assert "--test-faithfulness needs test rows: put a test file beside the training file" in result.output
    assert not (tmp_path / "p").exists()


# report


def test_report_does_not_replace_what_is_no_file(trained: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.html").symlink_to("pipe")
    for out in ("pipe", "link.html"):
        before = os.lstat(tmp_path / out).st_ino
        result = holdfast_cli("report", trained, "--out", tmp_path / out)
        assert result.exit_code == 2
        assert f"could not write {tmp_path / out}: it is a device, a pipe or a socket" in result.output
        assert os.lstat(tmp_path / out).st_ino == before


def test_report_writes_one_file(trained: Path, tmp_path: Path) -> None:
    before = set(trained.rglob("*"))
    out = tmp_path / "page.html"
    result = holdfast_cli("report", trained, "--out", out, "--title", "two tasks")
    assert result.exit_code == 0, result.output
    assert f"Report: {out}" in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    page = out.read_text()
    assert "two tasks" in page
    assert "copy" in page
    assert set(trained.rglob("*")) == before


def test_report_of_no_run_is_refused(tmp_path: Path) -> None:
    result = holdfast_cli("report", tmp_path, "--out", tmp_path / "page.html")
    assert result.exit_code == 2
    assert str(tmp_path) in result.output
    assert not (tmp_path / "page.html").exists()


# as a process


def test_module_run_as_a_process_checks_and_returns_its_status(tiny: Any, tmp_path: Path) -> None:
    file = config_file(tmp_path, tiny(tmp_path / "r"))
    command = [sys.executable, "-m", "holdfast", "check", str(file), "training.epochs=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "training.epochs: Input should be greater than 0 (got 0)" in done.stderr
    assert "Traceback" not in done.stderr
