"""A table as CSV, for programs, and as LaTeX, for papers."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from holdfast.quantities import MISSING

Cells = Sequence[object]
_NUMBER = re.compile(r"[+−]?\d[\d,]*(\.\d+)?(e[+−]?\d+)?")
_LATEX = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": "$-$",
    "±": r"$\pm$",
    "→": r"$\to$",
    "Δ": r"$\Delta$",
    "λ": r"$\lambda$",
    "–": "--",
    "·": r"$\cdot$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "≤": r"$\le$",
    "\u00a0": "~",
}


def csv_text(head: Cells, rows: Sequence[Cells]) -> str:
    """Comma-separated, a line a row; numbers with a plain minus, and nothing where a dash stands."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_plain(cell) for cell in head])
    writer.writerows([_plain(cell) for cell in row] for row in rows)
    return out.getvalue()


def _plain(cell: object) -> str:
    if cell is None:
        return ""
    text = " ".join(str(cell).split())
    if text == MISSING:
        return ""
    return text.replace("−", "-").replace(",", "") if _NUMBER.fullmatch(text) else text


def latex_text(head: Cells, rows: Sequence[Cells], caption: str = "") -> str:
    """A ``tabular`` of plain LaTeX, its first column to the left and the others to the right.

    Characters that LaTeX reads as its own are escaped; a caption stands above it as a comment.
    """
    lines = [f"% {line}" for line in caption.splitlines()]
    lines += [f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", "\\hline", _line(head), "\\hline"]
    lines += [_line(row) for row in rows]
    return "\n".join([*lines, "\\hline", "\\end{tabular}", ""])


def _line(cells: Cells) -> str:
    texts = (" ".join(str("" if cell is None else cell).split()) for cell in cells)
    line = " & ".join("".join(_LATEX.get(sign, sign) for sign in text) for text in texts) + r" \\"
    return "{}" + line if line[0] in "[*" else line  # or the line break above would take it as its own
