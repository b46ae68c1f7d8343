"""A folder that grows by parts, each committed as a whole: one owner at a time, torn parts are named."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from holdfast import world
from holdfast.errors import RunDirectoryError, StorageError
from holdfast.manifest import problem_of, write_manifest
from holdfast.storage import is_disk_error, sha256, write_json, write_text

PARTIAL = ".partial"
MANIFEST = "manifest.json"
CONFIG = "config.yaml"  # what a folder was told
ENVIRONMENT = "environment.json"
LOCK = "run.lock"
GONE = ".gone"
CHECKPOINTS = "checkpoints"  # in a part that is being written: what a killed one goes on from
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}
THINNED = "not-kept.txt"  # in a part some files of which were deleted on purpose


class Folder:
    """Parts of a folder, such as ``tasks/01-june``.

    A part is written into ``<part>.partial``, gets a ``manifest.json`` with the digest of each of its files,
    and is then renamed: the rename is the commit. Whatever a kill leaves behind is either a part that its
    manifest vouches for, or it is redone.

    Attributes
    ----------
    path : Path
    notes : list of str
        What was found to be torn, for the user.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        self._lock: IO[str] | None = None

    def lock(self, what: str) -> None:
        """Make this process the owner, until `release`, or until it ends in any way.

        Of several processes of one launch rank 0 holds the lock for all.

        Raises
        ------
        RunDirectoryError
            Another process is; the message names it.
        """

        def take() -> None:
            self._lock = lock(self.path / LOCK, what)

        world.first(take)

    def release(self) -> None:
        """Give the folder up; a second call does nothing."""
        if self._lock is not None:
            with suppress(OSError):
                self._lock.truncate(0)  # nobody works here now: the folder says nothing about who did
            self._lock.close()
            self._lock = None

    def parts(self, within: str) -> list[str]:
        """The committed parts in a sub-folder, in the order of their numbers."""
        folder = self.path / within
        found = in_order(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        names = [p.name for p in found]
        return [f"{within}/{name}" for name in names if name[0] != "." and not name.endswith(PARTIAL)]

    def partial(self, within: str) -> list[str]:
        """The parts there that were begun and not committed, without their ending."""
        folder = self.path / within
        found = in_order(folder.glob(f"*{PARTIAL}")) if folder.is_dir() else []
        return [f"{within}/{p.name.removesuffix(PARTIAL)}" for p in found]

    def problem(self, part: str, only: Collection[str] | None = None) -> str | None:
        """What is wrong with a committed part, or with some of its files; None where they are as written."""
        return problem_of(self.path / part, MANIFEST, only)

    def completed(self, parts: Sequence[str]) -> int:
        """How many of the leading parts are on disk and intact.

        The first one that is torn, and everything after it, finished or only begun, is deleted so that it is
        redone; what was found is told in `notes`.

        Raises
        ------
        RunDirectoryError
            It can't be redone, as the part before it is `thinned`; nothing is deleted.
        """
        count, self.notes = world.first(lambda: (self._completed(parts), self.notes))
        return count

    def _completed(self, parts: Sequence[str]) -> int:
        count = 0
        for part in parts:
            if not (self.path / part).exists():
                break
            problem = self.problem(part)
            if problem is not None:
                self.notes.append(f"{self.path / part}: {problem}; this stage is redone.")
                break
            count += 1
        # what was begun later began from what is redone
        made = (*parts[count:], *(part + PARTIAL for part in parts[count + 1 :]))
        torn = [part for part in made if (self.path / part).exists()]
        if torn and count and self.thinned(parts[count - 1]):
            what = self.notes[-1].partition(";")[0] if self.notes else f"{self.path / parts[count]}: missing"
            raise RunDirectoryError(
                f"{what}. What it began with is not kept ({self.path / parts[count - 1] / THINNED}), so it "
                "can't be redone. Bring it back from a backup, or choose a new folder."
            )
        for part in torn:
            shutil.rmtree(self.path / part)
        behind = [part for part in torn if not part.endswith(PARTIAL) and part != parts[count]]
        if behind:
            self.notes.append(
                f"{self.path / parts[count]}: missing or changed, so what went on from it is redone too: "
                f"{', '.join(behind)}."
            )
        return count

    def thin(self, part: str, heavy: Callable[[str], bool], why: str) -> None:
        """Delete files of a committed part; its manifest vouches for the others, and a note says why.

        Parameters
        ----------
        heavy : callable
            From a file's path within the part to whether it goes.
        """
        world.first(lambda: self._thin(self.path / part, heavy, why))

    def _thin(self, path: Path, heavy: Callable[[str], bool], why: str) -> None:
        try:
            named = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return  # torn, which is told where the part is needed
        if not (path / THINNED).exists():
            write_text(path / THINNED, why + "\n")
        left = {file: digest for file, digest in named.items() if not heavy(file)}
        left[THINNED] = sha256(path / THINNED)
        if left != named:
            write_json(path / MANIFEST, left)  # from here on nothing misses them, whenever they go
        for file in [p for p in path.rglob("*") if p.is_file() and heavy(str(p.relative_to(path)))]:
            file.unlink()

    def thinned(self, part: str) -> bool:
        """Whether files of a part were deleted by `thin`."""
        return (self.path / part / THINNED).exists()

    def remove(self, part: str) -> None:
        """Take a part away as a whole, committed or not: a kill leaves it as it was, or gone."""
        world.first(lambda: self._remove(part))

    def _remove(self, part: str) -> None:
        path = self.path / part
        path = path if path.exists() else path.with_name(path.name + PARTIAL)
        self._sweep(path.parent)
        os.rename(path, path.with_name(f".{path.name}{GONE}"))
        self._sweep(path.parent)

    def _sweep(self, folder: Path) -> None:
        """Delete what was taken away, now or before a kill."""
        for gone in folder.glob(f".*{GONE}"):
            shutil.rmtree(gone)

    @contextmanager
    def part(self, name: str) -> Iterator[Path]:
        """The folder to write a part into; committed when the block ends without an error.

        What an interrupted attempt left there is kept for the block to continue from; what lies in
        `CHECKPOINTS` serves for nothing else, and is deleted at the commit. Of several processes each has
        the block; rank 0 makes the folder, and commits it once all are through.

        Raises
        ------
        StorageError
            The disk is full or fails; finished parts are untouched. Other errors of the block are its own.
        """
        partial = self.path / (name + PARTIAL)
        try:
            world.first(lambda: self._begin(partial))
            yield partial
            world.barrier()
            world.first(lambda: self._commit(partial, name))
        except Exception as error:
            if not _is_of_writing(error, partial.parent):
                raise
            raise StorageError(
                f"{partial}: could not be written ({error}). Finished stages are untouched; free some space "
                "and run the same command again to continue."
            ) from error

    def _begin(self, partial: Path) -> None:
        partial.mkdir(parents=True, exist_ok=True)
        self._sweep(partial.parent)

    def _commit(self, partial: Path, name: str) -> None:
        shutil.rmtree(partial / CHECKPOINTS, ignore_errors=True)
        for file in list(partial.rglob(".*.tmp")):
            file.unlink()  # of a write that was killed
        for file in (p for p in partial.rglob("*") if p.is_file()):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        write_manifest(partial, MANIFEST)
        os.rename(partial, self.path / name)  # the commit


def in_order(parts: Iterable[Path]) -> list[Path]:
    """Parts by the number that their names begin with: as text ``100-x`` stands before ``11-x``."""

    def place(part: Path) -> tuple[bool, int, str]:
        number = part.name.partition("-")[0]
        known = number.isascii() and number.isdigit()
        return not known, int(number) if known else 0, part.name

    return sorted(parts, key=place)


def _is_of_writing(error: Exception, folder: Path) -> bool:
    """Whether an error is of the disk, or of a file in a folder; a script's block may raise any other."""
    if not isinstance(error, OSError):
        return is_disk_error(error)
    file = error.filename
    inside = isinstance(file, str) and Path(file).absolute().is_relative_to(folder.absolute())
    return inside or error.errno in _DISK


def lock(path: Path, what: str) -> IO[str]:
    """Lock a file for this process; closing it drops the lock, and so does being killed.

    Parameters
    ----------
    what : str
        What the owner does, such as "run".

    Raises
    ------
    RunDirectoryError
        Another process holds it, and the message names the process; or the file is a symbolic link.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if path.is_symlink():
            raise RunDirectoryError(
                f"{path}: is a symbolic link, which would be written through. Remove it."
            ) from error
        if error.errno not in (errno.EROFS, errno.EACCES) or not path.is_file():
            raise
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)  # who only asks needs no more
    file = os.fdopen(descriptor, "r+")  # held as long as the owner works
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = file.read().strip() or "unknown"
        file.close()
        raise RunDirectoryError(
            f"{path.parent}: another {what} is working here (process {owner}). Wait for it, stop it, or give "
            f"this one a folder of its own{'' if what == 'learner' else ' with output=DIR'}."
        ) from None
    with suppress(OSError):  # on a full disk too a folder can be asked, and a task taken back
        file.truncate(0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return file
