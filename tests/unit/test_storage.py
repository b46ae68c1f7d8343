"""Files are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast import storage
from holdfast.errors import StorageError
from holdfast.models import save_model
from holdfast.models.adapters import recompress
from holdfast.tasks import toy_tokenizer
from holdfast.training.checkpoints import seal_checkpoint
from tiny_models import tiny_model


def test_written_files_read_back(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "new/folder/a.json", {"ü": 1})
    storage.write_tensors(tmp_path / "b.safetensors", {"w": torch.arange(6.0).view(2, 3).T}, {"k": "v"})
    assert json.loads((tmp_path / "new/folder/a.json").read_text(encoding="utf-8")) == {"ü": 1}
    assert torch.equal(load_file(tmp_path / "b.safetensors")["w"], torch.arange(6.0).view(2, 3).T)
    assert storage.sha256(tmp_path / "new/folder/a.json") == storage.sha256(tmp_path / "new/folder/a.json")


@pytest.fixture
def umask_of_a_group() -> Iterator[None]:
    """New files are their owner's, readable by the group (0640)."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mode & 0o777 for p in folder.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("umask_of_a_group")
def test_weights_may_be_read_by_whoever_the_umask_lets_read_other_files(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "a.json", 1)
    storage.write_tensors(tmp_path / "a.safetensors", {"w": torch.ones(1)})
    with storage.atomic_write(tmp_path / "b.safetensors") as temporary:
        storage.save_tensors(temporary, {"w": torch.ones(1)})
    assert modes(tmp_path) == dict.fromkeys(("a.json", "a.safetensors", "b.safetensors"), 0o640)


@pytest.mark.usefixtures("umask_of_a_group")
@pytest.mark.parametrize("lora", [False, True])
def test_a_saved_model_may_be_read_by_whoever_the_umask_lets_read_other_files(
    lora: bool, tmp_path: Path
) -> None:
    model = tiny_model("llama-lora" if lora else "llama")
    save_model(model, toy_tokenizer(), tmp_path)
    found = modes(tmp_path)
    assert ("adapter_model.safetensors" if lora else "model.safetensors") in found
    assert set(found.values()) == {0o640}
    if lora:
        recompress(tmp_path, 2)
        assert set(modes(tmp_path).values()) == {0o640}


@pytest.mark.usefixtures("umask_of_a_group")
def test_a_checkpoint_may_be_read_by_whoever_the_umask_lets_read_other_files(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")  # as the Trainer does
    seal_checkpoint(tmp_path)
    assert modes(tmp_path) == {"model.safetensors": 0o640, "seal.json": 0o640}


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_failure_leaves_the_previous_file_and_no_litter(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_json(tmp_path / "a.json", "old")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(StorageError, match=r"could not write .*a\.json.*No space left on device.*untouched"):
        storage.write_json(tmp_path / "a.json", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == "old"


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the kernel fails the write, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def torch_save(path: Path, size: int) -> None:
    with storage.atomic_write(path) as temporary:
        torch.save({"w": torch.ones(size)}, temporary)


def torch_save_legacy(path: Path, size: int) -> None:
    with storage.atomic_write(path) as temporary:
        torch.save({"w": torch.ones(size)}, temporary, _use_new_zipfile_serialization=False)


def tensors(path: Path, size: int) -> None:
    storage.write_tensors(path, {"w": torch.ones(size)})


def text(path: Path, size: int) -> None:
    storage.write_text(path, "x" * size)


@pytest.mark.parametrize("write", [torch_save, torch_save_legacy, tensors, text])
@pytest.mark.parametrize("size", [200, 100_000])  # torch's message depends on the size
def test_write_that_the_system_fails_is_a_storage_error(
    write: Callable[[Path, int], None], size: int, tmp_path: Path
) -> None:
    write(tmp_path / "a", 100)
    old = (tmp_path / "a").read_bytes()
    with (
        largest_file(100),
        pytest.raises(StorageError, match=r"could not write .*untouched.*Free some space"),
    ):
        write(tmp_path / "a", size)
    assert (tmp_path / "a").read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    write(tmp_path / "a", size)


def test_errors_of_torch_that_are_no_disk_errors_pass_through() -> None:
    assert not storage.is_disk_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def put_pipe(path: Path) -> None:
    os.mkfifo(path)


def put_link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def put_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 7))  # a /dev/full of the test's own
    except OSError as error:
        pytest.skip(f"needs the right to make a device ({error})")


def put_link_to_folder(path: Path) -> None:
    path.with_name("folder").mkdir()
    path.symlink_to("folder")


@pytest.mark.parametrize("put", [put_pipe, put_link_to_pipe, put_device, put_link_to_folder])
@pytest.mark.parametrize("write", [torch_save, tensors, text])
def test_what_is_no_file_is_never_replaced(
    write: Callable[[Path, int], None], put: Callable[[Path], None], tmp_path: Path
) -> None:
    put(tmp_path / "a")
    before = [(p.name, os.lstat(p).st_ino) for p in sorted(tmp_path.iterdir())]
    with pytest.raises(StorageError, match=r"could not write .*a: it is a (folder|device).*path of a file"):
        write(tmp_path / "a", 10)
    with pytest.raises(StorageError, match="it is a"):
        storage.save_tensors(tmp_path / "a", {"w": torch.ones(1)})
    assert [(p.name, os.lstat(p).st_ino) for p in sorted(tmp_path.iterdir())] == before


def test_link_to_a_file_is_replaced_and_the_file_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("old")
    (tmp_path / "a").symlink_to("mine")
    storage.write_text(tmp_path / "a", "new")
    assert ((tmp_path / "a").read_text(), (tmp_path / "mine").read_text()) == ("new", "old")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_other_errors_pass_through_and_leave_no_litter(error: type[BaseException], tmp_path: Path) -> None:
    def interrupted() -> None:
        with storage.atomic_write(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_nan_is_refused_rather_than_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(tmp_path / "a.json", {"x": float("nan")})


def test_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not write"):
        storage.write_json(tmp_path / "file" / "a.json", 1)
