"""General text from a file, to be learned in a small share of the rows: what a model was pretrained on."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from holdfast.config import Options
from holdfast.errors import ConfigError
from holdfast.storage import text_lines
from holdfast.tasks.task import Example


class GeneralOptions(Options):
    """A file of text, and how much of it."""

    file: str = Field(description="a text a line; of a .jsonl file the column text")
    share: float = Field(0.01, gt=0, lt=1, description="of all rows that a task trains on")


def read_texts(path: str) -> list[Example]:
    """The texts of a file, as rows that are learned whole.

    Raises
    ------
    ConfigError
        The file can't be read, a line of it is no object with a text, or it has no text at all.
    """
    where = f"general.file: {path}"
    try:
        lines = text_lines(Path(path).expanduser().read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: can't be read as UTF-8 text ({error}).") from error
    texts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.endswith(".jsonl"):
            line = _text_in(line)
            if not line:
                raise ConfigError(f'{where}:{number}: not an object with a text, such as {{"text": "..."}}.')
        texts.append(line)
    if not any(text.strip() for text in texts):
        raise ConfigError(f"{where}: there is no text in it. Give a file with a text a line.")
    return [Example.text(text) for text in texts if text.strip()]


def _text_in(line: str) -> str:
    """The column text of a line of JSON; "" where there is none."""
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        return ""
    return text if isinstance(text, str) else ""


def with_texts(rows: Sequence[Example], texts: Sequence[Example], share: float, seed: str) -> list[Example]:
    """Rows and texts in random order, `share` of them texts; each text once before any comes again."""
    draw, wanted, taken = random.Random(seed), round(len(rows) * share / (1 - share)), list[Example]()
    while len(taken) < wanted:
        taken += draw.sample(list(texts), min(len(texts), wanted - len(taken)))
    mixed = [*rows, *taken]
    draw.shuffle(mixed)
    return mixed
