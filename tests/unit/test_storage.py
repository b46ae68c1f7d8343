"""Files are written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from holdfast import storage
from holdfast.errors import StorageError


def test_written_files_read_back(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "new/folder/a.json", {"ü": 1})
    storage.write_tensors(tmp_path / "b.safetensors", {"w": torch.arange(6.0).view(2, 3).T}, {"k": "v"})
    assert json.loads((tmp_path / "new/folder/a.json").read_text(encoding="utf-8")) == {"ü": 1}
    assert torch.equal(load_file(tmp_path / "b.safetensors")["w"], torch.arange(6.0).view(2, 3).T)
    assert storage.sha256(tmp_path / "new/folder/a.json") == storage.sha256(tmp_path / "new/folder/a.json")


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_full_device_while_writing_tensors_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = storage.save_tensors
    monkeypatch.setattr(storage, "save_tensors", lambda path, *rest: real(Path("/dev/full"), *rest))
    with pytest.raises(StorageError, match="untouched"):
        storage.write_tensors(tmp_path / "a.safetensors", {"w": torch.ones(10)})
    assert not list(tmp_path.iterdir())


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
