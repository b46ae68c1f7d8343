"""The model card of what a learner has learned: what, what was kept of it, and how that was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from holdfast.learner.asked import ends
from holdfast.learner.skills import Skill, Skills
from holdfast.quantities import MISSING, number
from holdfast.storage import write_text

CARD = "README.md"


def model_card(
    known: Skills, *, base_model: str | None, adapter: bool, title: str, encoder_decoder: bool = False
) -> str:
    """Markdown with the hub's metadata in front.

    Parameters
    ----------
    known : Skills
        A learner's folder as it stands.
    base_model : str, optional
        Hub id; a path of somebody's own machine is no one's business, and is left out by the caller.
    adapter : bool
        Whether what is uploaded is a PEFT adapter.
    title : str
    encoder_decoder : bool
        Whether an encoder reads what is asked.
    """
    head: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text2text-generation" if encoder_decoder else "text-generation",
        "tags": ["holdfast", "continual-learning"],
    }
    if base_model is not None:
        head["base_model"] = base_model
    lines = ["---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", "", f"# {title}", ""]
    what = f"`{base_model}`" if base_model else "a language model"
    lines += [
        f"{what[0].upper()}{what[1:]}, which learned {len(known.skills)} task"
        f"{'' if len(known.skills) == 1 else 's'} one after another with [holdfast](https://pypi.org/project/"
        f"holdfast/), under the method *{known.method}*.",
        "",
        "## What was learned, and what is kept of it",
        "",
    ]
    lines += _table(known.skills)
    lines += ["", *_measured(known)]
    return "\n".join(lines) + "\n"


def _table(skills: Sequence[Skill]) -> list[str]:
    away = any(skill.kl_base is not None for skill in skills)
    head = ["task", "training rows", "metric", "test rows", "then", "now", "moved"]
    lines = [_line([*head, *(["KL to base"] if away else [])])]
    lines.append(_line(["---", "---:", "---", *["---:"] * (len(head) - 3 + away)]))
    for skill in skills:
        cells = [
            skill.name,
            MISSING if skill.train_rows is None else str(skill.train_rows),
            skill.metric or MISSING,
            str(skill.test_rows),
            *(number(value) for value in (skill.then, skill.now, skill.drift)),
        ]
        lines.append(_line([*cells, *([number(skill.kl_base, 3)] if away else [])]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _measured(known: Skills) -> list[str]:
    lines = ["## How it was measured", ""]
    tested = [skill for skill in known.skills if skill.test_rows]
    if tested:
        unseen = all(skill.met == 0 for skill in tested)
        rows = "test rows that ask nothing that training rows ask" if unseen else "the test rows"
        lines.append(
            f"*Then* is the score in percent on {rows}, right after the task was "
            "learned; *now*, on the same rows, after the last task. *Moved* is the share of them that is "
            "answered otherwise now than then, right or wrong. A score by perplexity is 100 / perplexity."
        )
        if met := [f"{s.name}: {s.met} of {s.test_rows}" for s in tested if s.met]:
            lines += [
                "",
                "Some test rows ask what is asked in rows that were trained on "
                f"({', '.join(met)}, at least); of those the score tells what was seen.",
            ]
        if unknown := [s.name for s in tested if s.met is None]:
            lines += ["", f"Whether training rows ask the same was not recorded of {', '.join(unknown)}."]
    else:
        lines.append("No rows were kept aside, so nothing was scored.")
    if any(skill.kl_base is not None for skill in known.skills):
        lines += [
            "",
            "*KL to base* is KL(base || model after the task) in nats a token, on text that the base wrote "
            "itself: how far the model is from the base in general.",
        ]
    elif not known.harness:
        lines += ["", "What became of other abilities of the base was not measured."]
    if known.harness:
        lines += ["", "Scores of EleutherAI's lm-eval:", "", _line(["task and metric", "base", "now"])]
        lines.append(_line(["---", "---:", "---:"]))
        lines += [
            _line([name, *(number(value, 3) for value in ends(values))])
            for name, values in known.harness.items()
        ]
    if known.base is not None:
        lines += ["", f"The base itself was held from the start, by {known.base.train_rows} rows of its own."]
    return lines


def write_card(folder: Path, card: str) -> None:
    """Put the card into an exported folder, in place of the one that PEFT leaves there."""
    write_text(folder / CARD, card)
