"""Data files as rows with their places: JSON Lines, JSON, CSV, TSV, Parquet, plain text."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from holdfast.storage import text_lines
from holdfast.tasks.problems import Problems

Placed = tuple[str, object]  # where a row stands, such as "train.jsonl:17", and the row
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
Cells = tuple[int, list[str]]  # the line that a row of a table begins in, and its cells
Fault = tuple[int, str]  # a line, and what is wrong there
_LONGEST_CELL = 2**31 - 1
_LINE_END = re.compile(r"\r\n|\n|\r")
_QUOTED = re.compile(r'"[^"]*"')
_HEAD = re.compile(r'(?:"[^"]*"|[^"\n])*')


def read_rows(path: Path, problems: Problems) -> list[Placed]:
    """The rows of a file, by its suffix; what can't be read is noted with its line.

    Cells of CSV and TSV are texts, as they stand: ``007`` stays so, and ``NA`` is a label like any other.
    """
    readers: dict[str, Callable[[Path, Problems], list[Placed]]] = {
        ".json": _json,
        ".csv": _table,
        ".tsv": _table,
        ".parquet": _parquet,
        ".txt": _paragraphs,
    }
    return readers.get(path.suffix.lower(), _json_lines)(path, problems)


def read_json(path: Path, problems: Problems) -> Any:
    """The value of a JSON file; None, and a problem, where it can't be read."""
    raw = _bytes(path, problems)
    if raw is None:
        return None
    try:
        return parse_json(raw)
    except json.JSONDecodeError as error:
        problems.add(f"{path}:{error.lineno}", f"not JSON ({error.msg})")
    except ValueError as error:
        problems.add(path, str(error))
    return None


def parse_json(raw: bytes) -> Any:
    """The value of a JSON text.

    Raises
    ------
    ValueError
        It is no JSON, or of a kind that nobody means; `json.JSONDecodeError` where a place can be named.
    """
    try:
        text = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
        return json.loads(text, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1})") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read (nested too deeply)") from error
    except (json.JSONDecodeError, _TwiceError):
        raise
    except ValueError as error:  # an integer of more than 4,300 digits
        raise ValueError("not JSON that can be read (an integer of thousands of digits)") from error


class _TwiceError(ValueError):
    """A key of an object is given twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise _TwiceError(f"the key '{twice}' is given twice in one object")
    return made


def _bytes(path: Path, problems: Problems) -> bytes | None:
    try:
        raw = path.read_bytes()
    except OSError as error:
        problems.add(path, f"can't be read: {error.strerror or error}")
        return None
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):  # the marks of UTF-16
        problems.add(path, "UTF-16, not UTF-8. Save the file in the encoding UTF-8")
        return None
    return raw


def _json_lines(path: Path, problems: Problems) -> list[Placed]:
    rows: list[Placed] = []
    raw = _bytes(path, problems) or b""
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            rows.append((where, parse_json(line)))
        except json.JSONDecodeError as error:
            problems.add_row(where, f"not JSON ({error}): {line.decode('utf-8')[:60]!r}")
        except ValueError as error:
            said = str(error)
            problems.add_row(
                where, said.replace(")", " of the line)") if said.startswith("not UTF") else said
            )
    return rows


def _json(path: Path, problems: Problems) -> list[Placed]:
    """A list of rows; or JSON Lines, which many files of this name are."""
    raw = _bytes(path, problems)
    if raw is None:
        return []
    lines = [line for line in map(bytes.strip, raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")) if line]
    whole = sum(line.startswith(b"{") and line.endswith(b"}") for line in lines)
    if 2 * whole > len(lines):  # in a list each such line but the last would end with a comma
        return _json_lines(path, problems)
    before = len(problems)
    value = read_json(path, problems)
    if len(problems) > before:
        return []
    if not isinstance(value, list):
        kind = "an object" if isinstance(value, dict) else type(value).__name__
        problems.add(path, f"must be a list of rows, or a row a line, got {kind}")
        return []
    return [(f"{path} row {number}", row) for number, row in enumerate(value, start=1)]


def _table(path: Path, problems: Problems) -> list[Placed]:
    """Rows of a table with a head; each is placed by the line that it begins in."""
    raw = _bytes(path, problems)
    if raw is None:
        return []
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problems.add(f"{path}:{line}", "not UTF-8. Save the table in the encoding UTF-8")
        return []
    placed, fault = _cells_in(text, _delimiter(path, text))
    if fault:
        problems.add(f"{path}:{fault[0]}", f"not a table: {fault[1]}")
        return []
    rows: list[Placed] = []
    head: list[str] | None = None
    for line, cells in placed:
        where = f"{path}:{line}"
        if head is None:
            head = [name.strip() for name in cells]
            if twice := [name for i, name in enumerate(head) if name in head[:i]]:
                problems.add(where, f"the column '{twice[0]}' stands in the head twice")
                return []
        elif len(cells) != len(head):
            problems.add_row(where, f"{len(cells)} cells, but the head has {len(head)} columns")
        else:
            rows.append((where, dict(zip(head, cells, strict=True))))
    return rows


def _cells_in(text: str, sign: str) -> tuple[list[Cells], Fault | None]:
    """The cells of a table, or the line where they can't be told apart.

    Between tabs a quotation mark may be text like any other. It is where quoted cells make no table, or one
    of them swallows lines, and without quoting every line has as many cells as the head.
    """
    placed, fault = _quoted(text, sign)
    swallowed = any("\n" in cell and sign in cell for _, cells in placed for cell in cells)
    if sign == "\t" and (fault or swallowed):
        lines = enumerate(_LINE_END.split(text), start=1)
        plain = [(number, line.split(sign)) for number, line in lines if line]
        if len({len(cells) for _, cells in plain}) == 1:
            return plain, None
    return placed, fault


def _quoted(text: str, sign: str) -> tuple[list[Cells], Fault | None]:
    placed: list[Cells] = []
    line = 1
    longest = csv.field_size_limit(_LONGEST_CELL)
    try:
        cells_of = csv.reader(io.StringIO(text, newline=""), delimiter=sign, strict=True)
        for cells in cells_of:
            if cells:
                placed.append((line, cells))
            line = cells_of.line_num + 1
    except csv.Error as error:
        return placed, (line, str(error))
    finally:
        csv.field_size_limit(longest)
    return placed, None


def _delimiter(path: Path, text: str) -> str:
    """The first of the usual ones that stands in the head outside of quotes."""
    usual = "\t,;|" if path.suffix.lower() == ".tsv" else ",;\t|"
    head = _HEAD.match(text.lstrip("\r\n"))
    names = _QUOTED.sub("", head[0]) if head else ""
    return next((sign for sign in usual if sign in names), usual[0])


def _paragraphs(path: Path, problems: Problems) -> list[Placed]:
    """Running text: what stands between empty lines is a row."""
    raw = _bytes(path, problems)
    if raw is None:
        return []
    try:
        lines = text_lines(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problems.add(f"{path}:{line}", "not UTF-8. Save the text in the encoding UTF-8")
        return []
    rows: list[Placed] = []
    begun: list[str] = []
    for number, words in enumerate([*lines, ""], start=1):
        if words.strip():
            begun.append(words)
        elif begun:
            rows.append((f"{path}:{number - len(begun)}", {"text": "\n".join(begun)}))
            begun = []
    return rows


def _parquet(path: Path, problems: Problems) -> list[Placed]:
    import pyarrow
    from datasets import Dataset
    from pyarrow import parquet

    try:
        with path.open("rb") as file:
            dataset = Dataset(parquet.read_table(file))
    except (OSError, pyarrow.ArrowException, ValueError) as error:
        said = getattr(error, "strerror", None) or str(error).splitlines()[0]
        problems.add(path, f"can't be read: {said}")
        return []
    return list(rows_of(dataset, str(path)))


def is_saved(root: Path) -> bool:
    """Whether ``save_to_disk`` of ``datasets`` wrote a folder."""
    return (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()


def load_saved(root: Path) -> dict[str, Any]:
    """The splits of such a folder; a data set without splits is ``train``. Whatever ``datasets`` raises."""
    from datasets import DatasetDict, load_from_disk

    data = load_from_disk(str(root))
    return (
        {str(split): part for split, part in data.items()}
        if isinstance(data, DatasetDict)
        else {"train": data}
    )


def rows_of(dataset: Any, where: str) -> Iterator[Placed]:
    """The rows of a ``datasets.Dataset``, as `as_written`."""
    return ((f"{where} row {number}", row) for number, row in enumerate(as_written(dataset), start=1))


def as_written(dataset: Any) -> Iterator[dict[str, Any]]:
    """The rows of a ``datasets.Dataset`` as people write them: class labels by their names, no padding.

    Arrow gives every object of a column the keys of all of them. So a null in a tool's arguments can't be
    told from a key that another row has, and is left out as well.
    """
    labels = {
        column: feature.names for column, feature in dataset.features.items() if hasattr(feature, "int2str")
    }
    for row in dataset:
        named = {column: _without_padding(value) for column, value in row.items()}
        for column, names in labels.items():
            value = named[column]  # -1 marks a hidden label in test splits of the hub
            named[column] = names[value] if value is not None and value >= 0 else None
        yield named


def _without_padding(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_padding(inner) for key, inner in value.items() if inner is not None}
    return [_without_padding(inner) for inner in value] if isinstance(value, list) else value
