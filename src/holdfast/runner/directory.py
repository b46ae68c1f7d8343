"""The run directory: one owner at a time, stages committed as a whole, torn files found and named."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml
from pydantic import ValidationError

from holdfast.errors import RunDirectoryError, StorageError
from holdfast.runner.config import RunConfig
from holdfast.storage import is_disk_error, sha256, write_json, write_text

PARTIAL = ".partial"
MANIFEST = "manifest.json"


class RunDirectory:
    """A folder that one run writes.

    A stage is written into ``<stage>.partial``, gets a ``manifest.json`` with the digest of each of its
    files, and is then renamed: the rename is the commit. Whatever a kill leaves behind is either a folder
    that its manifest vouches for, or it is redone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None
        self.notes: list[str] = []

    @classmethod
    @contextmanager
    def open(cls, config: RunConfig, environment: dict[str, Any]) -> Iterator[RunDirectory]:
        """Lock the directory for this process, and make sure that it belongs to this configuration.

        Raises
        ------
        RunDirectoryError
            Another process runs there, or the directory holds another configuration or something else.
        """
        directory = cls(Path(config.output))
        try:
            directory.path.mkdir(parents=True, exist_ok=True)
            directory._acquire()
        except OSError as error:
            raise RunDirectoryError(
                f"output: '{config.output}' can't be used as a run directory ({error.strerror})."
            ) from error
        try:
            directory._claim(config, environment)
            yield directory
        finally:
            directory._release()

    def _acquire(self) -> None:
        self._lock = lock(self.path / "run.lock", "run")

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()  # closing drops the lock; so does being killed
            self._lock = None

    def _claim(self, config: RunConfig, environment: dict[str, Any]) -> None:
        mine = config.model_dump(mode="json")
        path = self.path / "config.yaml"
        if path.exists():
            different = sorted(_differences(mine, _completed(yaml.safe_load(path.read_text()))))
            if different and self._has_begun():
                raise RunDirectoryError(
                    f"{self.path}: holds a run with another configuration; different: "
                    f"{', '.join(different)}. Give this run its own directory with output=DIR, or delete the "
                    "old one."
                )
            if not different:
                return
        ours = {"run.lock", "environment.json", "config.yaml"}  # what a run leaves that never began
        strangers = [p.name for p in self.path.iterdir() if p.name not in ours and p.name[0] != "."]
        if strangers:
            raise RunDirectoryError(
                f"{self.path}: not empty and not a run directory (found {', '.join(sorted(strangers)[:5])}). "
                "Choose a new or empty folder with output=DIR."
            )
        write_json(self.path / "environment.json", environment)
        write_text(path, yaml.safe_dump(mine, sort_keys=False, allow_unicode=True))

    @classmethod
    def conflicts(cls, config: RunConfig) -> list[str]:
        """What differs from the run that has begun in the configuration's directory; nothing if none has.

        A look from outside: it neither locks nor writes.
        """
        directory = cls(Path(config.output))
        path = directory.path / "config.yaml"
        if not path.exists() or not directory._has_begun():
            return []
        theirs = _completed(yaml.safe_load(path.read_text()))
        return sorted(_differences(config.model_dump(mode="json"), theirs))

    def _has_begun(self) -> bool:
        """Whether any stage was begun: before that a corrected configuration may take the folder over."""
        return any((self.path / name).exists() for name in ("tasks", "zero_shot", "zero_shot" + PARTIAL))

    def completed(self, stages: list[str]) -> int:
        """How many of the leading stages are on disk and intact.

        The first stage that is torn, and everything after it, is deleted so that it is redone; what was
        found is told in `notes`.
        """
        count = 0
        for stage in stages:
            if not (self.path / stage).exists():
                break
            problem = _problem(self.path / stage)
            if problem is not None:
                self.notes.append(f"{self.path / stage}: {problem}; this stage is redone.")
                break
            count += 1
        for stage in stages[count:]:
            if (self.path / stage).exists():
                shutil.rmtree(self.path / stage)
        return count

    @contextmanager
    def stage(self, name: str) -> Iterator[Path]:
        """The folder to write a stage into; committed when the block ends without an error.

        What an interrupted attempt left there (checkpoints) is kept for the block to continue from.

        Raises
        ------
        StorageError
            The disk is full or fails; finished stages are untouched.
        """
        partial = self.path / (name + PARTIAL)
        try:
            partial.mkdir(parents=True, exist_ok=True)
            yield partial
            shutil.rmtree(partial / "checkpoints", ignore_errors=True)
            files = [p for p in _files(partial) if p.name != MANIFEST]
            for file in files:
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            write_json(partial / MANIFEST, {str(p.relative_to(partial)): sha256(p) for p in files})
            os.rename(partial, self.path / name)  # the commit
        except Exception as error:
            if not is_disk_error(error):
                raise
            raise StorageError(
                f"{partial}: could not be written ({error}). Finished stages are untouched; free some space "
                "and run the same command again to continue."
            ) from error


def lock(path: Path, what: str) -> IO[str]:
    """Lock a file for this process; closing it drops the lock, and so does being killed.

    Parameters
    ----------
    what : str
        What the owner does, such as "run".

    Raises
    ------
    RunDirectoryError
        Another process holds it; the message names the process.
    """
    file = open(path, "a+")  # noqa: SIM115  (held for the life of the run)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise RunDirectoryError(
            f"{path.parent}: another {what} is working here (process {owner}). Wait for it, stop it, or give "
            "this one a directory of its own with output=DIR."
        ) from None
    file.seek(0)
    file.truncate()
    file.write(str(os.getpid()))
    file.flush()
    return file


def _completed(recorded: Any) -> Any:
    """A recorded configuration with the defaults of options that are newer than it."""
    try:
        return RunConfig.model_validate(recorded).model_dump(mode="json")
    except ValidationError:  # then its differences tell why
        return recorded


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _problem(folder: Path) -> str | None:
    try:
        digests: dict[str, str] = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or torn"
    for name, digest in digests.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != digest:
            return f"{name} is torn or was changed (its digest differs)"
    return None


def _differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from _differences(a.get(key), b.get(key), f"{where}.{key}" if where else key)
    elif a != b and where != "output":
        yield f"{where} ({b!r} there, {a!r} here)"
