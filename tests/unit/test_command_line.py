"""Wrong and unusual words on the command line: each is told in a line, before any work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from command_line import holdfast_cli
from holdfast.cli.messages import told
from holdfast.config import differences

MISSING = ["--model", "missing", "--data", "missing"]


def refused(*words: str) -> str:
    result = holdfast_cli(*words)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    return result.output


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a file ``file``, a folder ``folder`` and a config ``mine.yaml``."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "mine.yaml").write_text("model: {toy: true}\ntasks: {source: toy}\nstrategy: ewc\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# where results go


@pytest.mark.parametrize(
    "words",
    [
        ["list", "orders", "--csv"],
        ["run", "missing.yaml", "--latex"],
        ["compare", "missing.yaml", "--csv"],
        ["harness", "missing", "--tasks", "t", "--csv"],
        ["explain", "missing", "why?", "--out"],
        ["ask", "missing", "--data", "missing.jsonl", "--out"],
        ["skills", "missing", "--report"],
        ["report", "missing", "--out"],
        ["prior", "show", "missing", "--csv"],
    ],
    ids=" ".join,
)
def test_file_that_can_not_be_written_is_told_before_anything_is_read(words: list[str], here: Path) -> None:
    assert "could not write folder: it is a folder. Give the path of a file." in refused(*words, "folder")
    told = refused(*words, "file/x")
    assert "could not write file/x: 'file' is a file, not a folder. Give another path." in told


@pytest.mark.parametrize(
    "words",
    [
        ["demo", "--out"],
        ["attribute", *MISSING, "--out"],
        ["prior", "merge", "missing", "missing", "--out"],
        ["skills", "missing", "--export"],
    ],
    ids=" ".join,
)
def test_folder_that_can_not_be_made_is_told_before_anything_is_read(words: list[str], here: Path) -> None:
    for path in ("file", "file/x"):
        assert "'file' is a file, not a folder. Give another path." in refused(*words, path)


@pytest.mark.parametrize("path", ["file", "file/x"])
def test_run_into_a_file_names_the_file_and_not_an_error_of_the_system(path: str, here: Path) -> None:
    assert f"'{path}' can't be used as a run directory ('file' is a file, not a folder)" in refused(
        "run", "mine.yaml", f"output={path}"
    )


def test_check_finds_a_file_above_the_output_as_the_run_would(here: Path) -> None:
    assert "output: 'file' is a file, not a folder." in refused("check", "mine.yaml", "output=file/x")


# configurations


def test_key_given_like_an_option_is_told_how_to_be_given(here: Path) -> None:
    for word in ("--strategy", "--strategy=ewc"):
        told = refused("run", "mine.yaml", word, "ewc")
        assert "No such option: --strategy. A key of the configuration is given as strategy=VALUE" in told
    assert "configuration" not in refused("skills", "folder", "--strategy", "ewc")
    assert "--csv" in refused("run", "mine.yaml", "--cvs", "x.csv")


def test_config_that_is_not_there_names_the_one_beside_it(here: Path) -> None:
    told = refused("check", "mien.yaml")
    assert "mien.yaml: can't be read (No such file or directory). Did you mean 'mine.yaml'?" in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping of sections (key: value), got nothing."),
        ("- a\n", "expected a mapping of sections (key: value), got a list."),
        ("mine\n", "expected a mapping of sections (key: value), got 'mine'."),
        ("model:\n\ttoy: true\n", "cannot start any token. Indent with spaces, not with tabs"),
    ],
)
def test_file_that_is_no_configuration_is_told_in_plain_words(text: str, message: str, here: Path) -> None:
    (here / "odd.yaml").write_text(text)
    assert message in refused("check", "odd.yaml")


def test_grid_and_config_taken_for_each_other_name_the_other_command(here: Path) -> None:
    (here / "grid.yaml").write_text("base: mine.yaml\nrows: [{name: a}]\n")
    assert "for `holdfast compare`" in refused("run", "grid.yaml")
    assert "for `holdfast run`" in refused("compare", "mine.yaml")


def test_another_strategy_is_one_difference_and_not_all_its_options() -> None:
    there = {"strategy": {"name": "ewc", "strength": 1.0}, "seed": 0}
    here = {"strategy": {"name": "osf", "rank": 4}, "seed": 1}
    assert list(differences(there, here)) == [("seed", 0, 1), ("strategy.name", "ewc", "osf")]
    same = {"strategy": {"name": "ewc", "strength": 2.0}, "seed": 0}
    assert list(differences(there, same)) == [("strategy.strength", 1.0, 2.0)]


# options that contradict each other, or mean nothing


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x.jsonl", "why?"], "ask: got --out without --data."),
        (["--data", "x.jsonl"], "ask: got --data without --out."),
        (["--data", "x.jsonl", "--out", "y.jsonl", "why?"], "ask: got questions and --data."),
        (["--column", "prompt=x", "why?"], "ask: got --column without --data."),
    ],
)
def test_ask_names_the_options_that_do_not_go_together(words: list[str], message: str, here: Path) -> None:
    assert message in refused("ask", "folder", *words)


def test_private_without_push_is_refused(here: Path) -> None:
    assert "give --push REPO too" in refused("skills", "folder", "--private")


def test_empty_name_of_a_skill_is_refused_and_not_replaced(here: Path) -> None:
    (here / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    told = refused("learn", "rows.jsonl", "--skills", "s", "--model", "folder", "--name", " ")
    assert "--name: a skill needs a name (got ' ')" in told


def test_report_of_a_file_says_that_it_is_none_of_a_folder_and_of_a_typo_what_is_near(here: Path) -> None:
    assert "file: a file, not a folder." in refused("report", "file")
    assert "no such folder." in (told := refused("report", "foldre"))
    assert "Did you mean 'folder'?" in told


# ctrl-C


def test_command_to_continue_with_can_be_pasted_into_a_shell(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("holdfast.runner.config.load_config", stop)
    result = holdfast_cli("run", "mine.yaml", "output=my run", "tasks.order=[copy, head]")
    assert result.exit_code == 130
    assert "holdfast run mine.yaml 'output=my run' 'tasks.order=[copy, head]'" in result.output


def test_ctrl_c_before_any_command_is_known_ends_without_a_traceback() -> None:
    code = (
        "import sys\n"
        "class Stops:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'holdfast.cli':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stops())\n"
        "from holdfast.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")


def test_ctrl_c_while_libraries_load_is_told_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("holdfast.cli.messages._quiet_libraries", stop)
    with pytest.raises(typer.Exit) as stopped, told("Go on."):
        pass
    assert stopped.value.exit_code == 130
    assert "Stopped. Go on." in capsys.readouterr().err
