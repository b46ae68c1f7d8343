"""A manifest vouches for the files it names, as they were written, and for nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from holdfast.manifest import problem_of, write_manifest
from holdfast.training.checkpoints import SEAL, is_sound, latest_checkpoint, seal_checkpoint

NAME = "manifest.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "stage/below").mkdir(parents=True)
    (tmp_path / "stage/a.json").write_text("1")
    (tmp_path / "stage/below/b.bin").write_bytes(bytes(100))
    write_manifest(tmp_path / "stage", NAME)
    return tmp_path / "stage"


def test_folder_as_it_was_written_has_no_problem(folder: Path) -> None:
    assert problem_of(folder, NAME) is None
    assert set(json.loads((folder / NAME).read_text())) == {"a.json", "below/b.bin"}
    write_manifest(folder, NAME)  # again: it doesn't name itself
    assert problem_of(folder, NAME) is None


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda f: (f / "below/b.bin").write_bytes(bytes(99)), r"below/b\.bin is torn or was changed"),
        (lambda f: (f / "a.json").unlink(), r"a\.json is missing"),
        (lambda f: (f / NAME).unlink(), r"manifest\.json is missing or torn"),
        (lambda f: (f / NAME).write_text('{"a.json": '), r"manifest\.json is missing or torn"),
        (lambda f: (f / NAME).write_text("[" * 100_000), r"manifest\.json is missing or torn"),
        (lambda f: (f / NAME).write_bytes(b"\xff\xfe"), r"manifest\.json is missing or torn"),
    ],
)
def test_every_change_is_found(change, problem: str, folder: Path) -> None:
    change(folder)
    found = problem_of(folder, NAME)
    assert found is not None
    assert re.match(problem, found)


@pytest.mark.parametrize("text", ["{}", "[]", '"x"', "null", "1", '["a.json"]', '{"a.json": 1}'])
def test_json_of_another_shape_vouches_for_nothing(text: str, folder: Path) -> None:
    (folder / NAME).write_text(text)
    assert problem_of(folder, NAME) == "manifest.json is not a list of files with their digests"


@pytest.mark.parametrize("file", ["a\0b", "x" * 5000, "below"])
def test_name_that_no_file_can_have_is_a_problem_and_no_traceback(file: str, folder: Path) -> None:
    (folder / NAME).write_text(json.dumps({file: "0" * 64}))
    assert problem_of(folder, NAME) is not None


def test_files_may_be_looked_at_alone_if_the_manifest_names_them(folder: Path) -> None:
    (folder / "below/b.bin").write_bytes(b"changed")
    (folder / "later.json").write_text("2")
    assert problem_of(folder, NAME, only=["a.json"]) is None
    assert problem_of(folder, NAME, only=["below/b.bin"]) is not None
    assert problem_of(folder, NAME, only=["later.json"]) == "manifest.json doesn't name later.json"


@pytest.mark.parametrize("seal", ["{}", "[]", '"x"', "null", ""])
def test_seal_of_nothing_makes_no_checkpoint_sound(seal: str, tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "w").write_text("1")
        seal_checkpoint(tmp_path / f"checkpoint-{step}")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    (tmp_path / "checkpoint-2" / SEAL).write_text(seal)
    assert not is_sound(tmp_path / "checkpoint-2")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
