"""Files that are written whole or not at all: temporary file, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast import world
from holdfast.errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def atomic_write(*paths: str | os.PathLike[str]) -> Iterator[Any]:
    """Write one or several files of a folder so that a crash leaves the old ones or the new ones.

    Yields a temporary path beside each target; write to it by any means. When the block ends, every
    temporary file is flushed to disk and only then renamed over its target. With several targets a crash
    between two renames is possible: let one carry the digest of the other.

    Parameters
    ----------
    *paths : path
        The targets. Their folders are made if needed.

    Yields
    ------
    Path or tuple of Path
        One temporary path, or as many as there are targets.

    Raises
    ------
    StorageError
        The disk is full, the folder can't be written, or a target is there and is no file (nor a link to
        one): a device would be replaced. The previous files are untouched and the temporary ones are gone.
    """
    targets = tuple(Path(path) for path in paths)
    temporary = tuple(p.with_name(f".{p.name}.{secrets.token_hex(4)}.tmp") for p in targets)
    for target in targets:
        refuse_what_can_not_be_written(target)
    try:
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary[0] if len(temporary) == 1 else temporary
        for path in temporary:
            _flush(path)
        for path, target in zip(temporary, targets, strict=True):
            os.replace(path, target)
        for folder in {target.parent for target in targets}:
            with contextlib.suppress(OSError):  # the files are in place; some file systems can't sync folders
                _flush(folder)
    except Exception as error:
        for path in temporary:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        if not is_disk_error(error):
            raise
        names = ", ".join(str(target) for target in targets)
        raise StorageError(
            f"could not write {names}: {error}. What was there before is untouched. "
            "Free some space or check the folder's permissions, then repeat the command."
        ) from error
    except BaseException:  # ctrl-C: leave no litter either
        for path in temporary:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise


def as_utf8(text: str) -> str:
    """A text that may be of a file's name, with what is no UTF-8 in it spelt out."""
    return text.encode(errors="backslashreplace").decode()


# what torch.save says on a full disk, by size of the tensors and by format
_TORCH_WRITES = (
    "PytorchStreamWriter",
    "inline_container",
    "unexpected pos",
    "iostream error",
    "write(): fd",
)


def is_disk_error(error: Exception) -> bool:
    """Whether writing failed below Python: safetensors and torch wrap the system's error in their own."""
    if isinstance(error, RuntimeError):  # all other errors of torch are of this class too
        return any(text in str(error) for text in _TORCH_WRITES)
    if type(error).__name__ == "SafetensorError":  # of reading, too
        return "deserializ" not in str(error)
    return isinstance(error, OSError)


def refuse_what_is_no_file(path: Path) -> None:
    """Raise `StorageError` where a path is there and is no regular file: writing would replace a device."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # nothing there, or nothing that can be seen: writing tells
        return
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device, a pipe or a socket"
        raise StorageError(f"could not write {path}: it is {kind}. Give the path of a file.")


def refuse_what_can_not_be_written(path: Path) -> None:
    """`refuse_what_is_no_file`, and where a file stands in place of a folder above the path."""
    if why := not_a_folder(path.parent):
        raise StorageError(f"could not write {path}: {why}. Give another path.")
    refuse_what_is_no_file(path)


def not_a_folder(path: Path) -> str:
    """Which file stands in a folder's place, or in that of one above it, as a phrase; "" where none does."""
    for place in (path, *path.parents):
        try:
            if place.exists():
                return "" if place.is_dir() else f"'{place}' is a file, not a folder"
        except (OSError, ValueError):  # a path that no file system takes, or that may not be seen
            continue
    return ""


def why_no_folder(path: Path, error: OSError) -> str:
    """Why a folder could not be made: `not_a_folder`, or what the system says."""
    return not_a_folder(path) or str(error.strerror)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def text_lines(text: str) -> list[str]:
    """The lines of a file. What else Unicode calls the end of a line, such as U+2028, is part of a text."""
    return text.replace("\r\n", "\n").split("\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file atomically, in rank 0 alone; raises `StorageError` as `atomic_write` does."""
    if not world.leads():
        return
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that is appended to; half a line, of a write that was killed, is taken off it."""
    if not path.exists():
        return []
    with path.open("r+b") as file:
        written = file.read()
        whole = written[: written.rfind(b"\n") + 1]
        file.truncate(len(whole))
    return whole.decode("utf-8").split("\n")[:-1]


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` as indented JSON, atomically.

    Raises
    ------
    StorageError
        As `atomic_write`.
    ValueError
        `obj` holds a NaN or an infinity, which JSON doesn't know.
    """
    write_text(path, json_text(obj))


def json_text(obj: Any) -> str:
    """The JSON that `write_json` writes: indented, non-ASCII kept, no NaN, newline at the end."""
    return json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as one safetensors file, as `write_text` does a text."""
    if not world.leads():
        return
    with atomic_write(path) as temporary:
        save_tensors(temporary, tensors, metadata)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file at a path that `atomic_write` gave.

    Raises
    ------
    StorageError
        There is something there that is no file; safetensors would put a file in its place.
    """
    from safetensors.torch import save_file

    refuse_what_is_no_file(path)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        path,
        metadata=dict(metadata) if metadata else None,
    )
    give_usual_mode(path)


def give_usual_mode(path: Path) -> None:
    """Give a file, or the weights in a folder, the mode that any new file gets there: what the umask says.

    safetensors writes files that their owner alone can read.
    """
    whole = path.is_dir()
    new = (path if whole else path.parent) / f".{secrets.token_hex(4)}.tmp"
    with contextlib.suppress(OSError):  # the weights are whole; some file systems know no modes
        new.touch()
        try:
            mode = stat.S_IMODE(new.stat().st_mode)
        finally:
            new.unlink()
        for file in path.rglob("*.safetensors") if whole else (path,):
            file.chmod(mode)


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
