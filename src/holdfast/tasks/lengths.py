"""What is cut from rows that are too long, and rows that no cut makes fit: told before training."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.tasks.encode import Encoded, Template


def inspect_lengths(
    rows: Sequence[Encoded], template: Template, limit: int | None
) -> tuple[list[str], list[str]]:
    """Remarks and problems about the lengths of some encoded rows, each a sentence.

    Parameters
    ----------
    limit : int, optional
        How many tokens the model takes, prompt and answer together, where it has a limit.
    """
    remarks, problems = [], []
    cut = [row for row in rows if row.cut]
    if cut:
        most = max(row.cut for row in cut)
        remarks.append(
            f"{len(cut)} of {len(rows)} prompts are longer than template.max_prompt_tokens "
            f"({template.max_prompt_tokens}); their {template.keep} tokens are kept, up to {most} are cut."
        )
    answers = sum(row.completion_cut > 0 for row in rows)
    if answers:
        remarks.append(
            f"{answers} completions are longer than template.max_completion_tokens = "
            f"{template.max_completion_tokens} and lose their end."
        )
    longest = max((len(row.prompt_ids) + len(row.completion_ids) for row in rows), default=0)
    if limit is not None and longest > limit:
        problems.append(
            f"the longest row has {longest} tokens, the model takes {limit}; "
            "lower template.max_prompt_tokens."
        )
    return remarks, problems
