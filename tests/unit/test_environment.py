"""The revision of a checkout, without running what the checkout's configuration names."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.environment import describe_environment, revision_of


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "a.txt").write_text("one")
    (folder / ".gitattributes").write_text("*.txt filter=trap")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def test_revision_says_whether_tracked_files_were_changed(checkout: Path, tmp_path: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    (checkout / "untracked").write_text("x")
    (checkout / "below").mkdir()
    assert revision_of(checkout) == revision_of(checkout / "below") == head
    (checkout / "a.txt").touch()  # another time, the same content
    assert revision_of(checkout) == head
    (checkout / "a.txt").write_text("two")
    assert revision_of(checkout) == f"{head}-dirty"
    assert revision_of(tmp_path) is None
    assert revision_of(tmp_path / "gone") is None


def fsmonitor(folder: Path, trap: Path) -> None:
    git(folder, "config", "core.fsmonitor", str(trap))


def clean_filter(folder: Path, trap: Path) -> None:
    git(folder, "config", "filter.trap.clean", str(trap))
    git(folder, "config", "filter.trap.required", "true")


def process_filter(folder: Path, trap: Path) -> None:
    git(folder, "config", "filter.trap.process", str(trap))


def hook(folder: Path, trap: Path) -> None:
    (folder / ".git/hooks").mkdir(exist_ok=True)
    (folder / ".git/hooks/post-index-change").symlink_to(trap)


@pytest.mark.parametrize("lay", [fsmonitor, clean_filter, process_filter, hook])
def test_no_program_that_a_repository_names_is_run(
    lay: Callable[[Path, Path], None], checkout: Path, tmp_path: Path
) -> None:
    sprung, trap = tmp_path / "sprung", tmp_path / "trap"
    trap.write_text(f"#!/bin/sh\ntouch '{sprung}'\ncat\n")
    trap.chmod(0o755)
    head = git(checkout, "rev-parse", "HEAD")
    lay(checkout, trap)
    (checkout / "a.txt").write_text("two")  # as long as before: git must look into it
    assert revision_of(checkout) == f"{head}-dirty"
    assert not sprung.exists()
    # the first alone may not write its index
    for command in (["describe", "--always", "--dirty"], ["add", "a.txt"]):
        subprocess.run(["git", "-C", str(checkout), *command], check=False)
    assert sprung.exists(), "the trap itself doesn't work"


def test_environment_says_what_a_run_needs() -> None:
    found = describe_environment(7)
    assert (found["seed"], set(found["git"])) == (7, {"working_directory", "holdfast"})
    assert found["packages"]["torch"] is not None
    assert found["command"][0]
