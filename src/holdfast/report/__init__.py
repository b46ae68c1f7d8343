"""The report: one self-contained HTML page about one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from holdfast.errors import DataError, StorageError
from holdfast.storage import write_text


def write_report(runs: Sequence[str | Path], out: str | Path, title: str | None = None) -> Path:
    """Write one HTML file that shows and compares runs; it opens offline and loads nothing.

    Parameters
    ----------
    runs : sequence of path
        Output folders of ``holdfast run`` (also unfinished ones: shown as far as they got), of
        ``holdfast attribute`` and of ``holdfast compare`` (with its runs), in any mix.
    out : path
        The file to write. It appears whole or not at all.
    title : str, optional
        The page's title; "holdfast report" by default.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    DataError
        No folder was given, one is no run, attribution or sweep, or one of its files is torn.
    StorageError
        `out` can't be written, or is a run's own file; what was there before survives.
    """
    from holdfast.report.page import build
    from holdfast.report.read import read

    if not runs:
        raise DataError("No run was given. Name at least one output folder of `holdfast run`.")
    if not _may_be_written_over(Path(out)):
        raise StorageError(f"{out}: is there, and is no page. Give the report a name of its own.")
    page = build([read(Path(run)) for run in runs], title)
    write_text(out, page)
    return Path(out)


def _may_be_written_over(file: Path) -> bool:
    """Whether there is no file, an empty one, or a page; and no run's configuration, say."""
    if not file.is_file() or file.suffix.lower() in (".html", ".htm"):
        return True
    with file.open("rb") as there:
        begins = there.read(64)
    return not begins or begins.lstrip().lower().startswith(b"<!doctype html")
