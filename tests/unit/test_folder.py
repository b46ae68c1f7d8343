"""A folder of parts: one owner, a manifest that vouches, and what a kill leaves behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from holdfast.errors import RunDirectoryError, StorageError
from holdfast.folder import LOCK, MANIFEST, Folder
from kills import Killed, kill_when


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def write(folder: Folder, name: str, text: str = "x") -> Path:
    with folder.part(name) as path:
        (path / "deep").mkdir(exist_ok=True)
        (path / "deep" / "file").write_text(text)
    return folder.path / name


def test_part_is_committed_with_the_digests_of_all_its_files(folder: Folder) -> None:
    part = write(folder, "tasks/01-a")
    assert folder.parts("tasks") == ["tasks/01-a"]
    assert folder.partial("tasks") == []
    assert list(json.loads((part / MANIFEST).read_text())) == ["deep/file"]
    assert folder.problem("tasks/01-a") is None


def test_part_that_raises_is_not_committed_and_keeps_what_it_wrote(folder: Folder) -> None:
    def fail() -> None:
        with folder.part("tasks/01-a") as path:
            (path / "checkpoint").write_text("x")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert (folder.parts("tasks"), folder.partial("tasks")) == ([], ["tasks/01-a"])
    with folder.part("tasks/01-a") as path:
        assert (path / "checkpoint").read_text() == "x"


def test_disk_error_says_that_finished_parts_are_untouched(folder: Folder) -> None:
    def fill() -> None:
        with folder.part("tasks/01-a"):
            raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"No space left.*Finished stages are untouched"):
        fill()


def test_parts_stand_in_the_order_of_their_numbers_beyond_a_hundred_too(folder: Folder) -> None:
    numbers = [1, 9, 10, 11, 99, 100, 101, 1000]
    for number in reversed(numbers):
        with folder.part(f"tasks/{number:02d}-t"):
            pass
    (folder.path / "tasks" / "by-hand").mkdir()
    assert folder.parts("tasks") == [*(f"tasks/{number:02d}-t" for number in numbers), "tasks/by-hand"]
    for number in (100, 12):
        (folder.path / "tasks" / f"{number}-u.partial").mkdir()
    assert folder.partial("tasks") == ["tasks/12-u", "tasks/100-u"]


def test_a_folder_that_can_t_be_written_to_can_be_locked_to_read_it(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.lock("learner")
    folder.release()
    opened = os.open

    def read_only(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_RDWR:
            raise OSError(30, "Read-only file system")
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", read_only)
    folder.lock("learner")
    with pytest.raises(RunDirectoryError, match="another learner is working here"):
        Folder(folder.path).lock("learner")
    folder.release()
    (folder.path / "run.lock").unlink()
    with pytest.raises(OSError, match="Read-only"):
        folder.lock("learner")


def test_a_folder_on_a_full_disk_can_be_locked(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    folder.release()
    monkeypatch.setattr(os, "pwrite", full)
    folder.lock("learner")
    with pytest.raises(RunDirectoryError, match="another learner is working here"):
        Folder(folder.path).lock("learner")


def test_errors_of_a_script_s_own_files_and_connections_are_its_own(folder: Folder, tmp_path: Path) -> None:
    def fail(error: OSError) -> None:
        with folder.part("tasks/01-a") as path:
            if isinstance(error, PermissionError):
                error.filename = str(path / "checkpoint")
            raise error

    for error in (FileNotFoundError(2, "No such file", str(tmp_path / "rows")), ConnectionError("network")):
        with pytest.raises(type(error)) as raised:
            fail(error)
        assert raised.value is error
    with pytest.raises(StorageError, match=r"could not be written \(.*Permission denied"):
        fail(PermissionError(13, "Permission denied"))


def test_leftovers_of_killed_writes_and_checkpoints_are_not_committed(folder: Folder) -> None:
    with folder.part("tasks/01-a") as path:
        (path / "checkpoints" / "checkpoint-3").mkdir(parents=True)
        (path / "checkpoints" / "checkpoint-3" / "seal.json").write_text("{}")
        (path / "model").mkdir()
        for name in (".metrics.json.ab12.tmp", "model/.model.safetensors.cd34.tmp"):
            (path / name).write_text("half")
        (path / ".hidden").write_text("kept")
        (path / "mine.tmp").write_text("kept")
    left = {p.name for p in (folder.path / "tasks/01-a").rglob("*")}
    assert left == {".hidden", "mine.tmp", MANIFEST, "model"}
    assert set(json.loads((folder.path / "tasks/01-a" / MANIFEST).read_text())) == {".hidden", "mine.tmp"}


@pytest.mark.parametrize("manifest", ["{}", "[]", "", "null", '"deep/file"', '{"deep/file"', None])
def test_manifest_that_names_no_file_vouches_for_nothing(manifest: str | None, folder: Folder) -> None:
    part = write(folder, "tasks/01-a")
    if manifest is None:
        (part / MANIFEST).unlink()
    else:
        (part / MANIFEST).write_text(manifest)
    assert "manifest.json" in (folder.problem("tasks/01-a") or "")
    assert folder.completed(["tasks/01-a"]) == 0
    assert not part.exists()
    assert len(folder.notes) == 1
    assert "this stage is redone" in folder.notes[0]


def test_missing_or_changed_file_is_named(folder: Folder) -> None:
    part = write(folder, "tasks/01-a")
    (part / "deep" / "file").write_text("y")
    assert folder.problem("tasks/01-a") == "deep/file is torn or was changed (its digest differs)"
    (part / "deep" / "file").unlink()
    assert folder.problem("tasks/01-a") == "deep/file is missing"


@pytest.mark.parametrize("begun", ["", ".partial"], ids=["finished", "begun"])
def test_parts_after_a_torn_one_are_redone_too(begun: str, folder: Folder) -> None:
    names = [f"tasks/0{i}-{i}" for i in (1, 2, 3)]
    parts = [write(folder, name) for name in names]
    last = parts[2].rename(f"{parts[2]}{begun}")
    assert folder.completed(names[:2]) == 2
    (parts[1] / "deep" / "file").write_text("y")
    assert folder.completed(names) == 1
    assert [part.exists() for part in (*parts[:2], last)] == [True, False, False]
    told = [note for note in folder.notes if "so what went on from it is redone too: tasks/03-3." in note]
    assert len(told) == (begun == "")


def test_parts_behind_one_that_is_gone_are_not_deleted_without_a_word(folder: Folder) -> None:
    names = [f"tasks/0{i}-{i}" for i in (1, 2, 3)]
    parts = [write(folder, name) for name in names]
    shutil.rmtree(parts[1])
    assert folder.completed(names) == 1
    (note,) = folder.notes
    assert note.endswith("02-2: missing or changed, so what went on from it is redone too: tasks/03-3.")


@pytest.mark.parametrize("committed", [True, False])
def test_part_is_taken_away_whole(committed: bool, folder: Folder) -> None:
    part = write(folder, "tasks/01-a")
    if not committed:
        part = part.rename(part.with_name("01-a.partial"))
    folder.remove("tasks/01-a")
    assert not list((folder.path / "tasks").iterdir())


def test_removal_that_is_killed_leaves_no_litter_for_ever(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, "tasks/01-a")
    write(folder, "tasks/02-b")
    with monkeypatch.context() as patch:
        kill_when(patch, "shutil.rmtree", 1)
        with pytest.raises(Killed):
            folder.remove("tasks/02-b")
    assert folder.parts("tasks") == ["tasks/01-a"]
    assert folder.partial("tasks") == []
    write(folder, "tasks/02-b")
    assert sorted(p.name for p in (folder.path / "tasks").iterdir()) == ["01-a", "02-b"]


def test_lock_is_for_one_owner_until_it_is_released(folder: Folder) -> None:
    folder.lock("learner")
    assert (folder.path / LOCK).read_text() == str(os.getpid())
    second = Folder(folder.path)
    told = rf"another run is working here \(process {os.getpid()}\).*output=DIR"
    with pytest.raises(RunDirectoryError, match=told):
        second.lock("run")
    folder.release()
    folder.release()
    assert (folder.path / LOCK).read_bytes() == b""
    second.lock("run")
    second.release()


def test_lock_that_is_a_symbolic_link_is_refused_and_its_target_untouched(folder: Folder) -> None:
    target = folder.path / "precious"
    target.write_text("mine")
    (folder.path / LOCK).symlink_to(target)
    with pytest.raises(RunDirectoryError, match="symbolic link"):
        folder.lock("learner")
    assert target.read_text() == "mine"
