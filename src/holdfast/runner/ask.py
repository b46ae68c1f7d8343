"""``holdfast ask``: questions to what a folder holds, one by one or a file of them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigError, DataError, StorageError
from holdfast.evaluation.answers import rooms_for_answers
from holdfast.folder import MANIFEST
from holdfast.learner import Learner
from holdfast.learner.config import STAGES
from holdfast.learner.skills import read_skills
from holdfast.models import context_length, onto_gpu
from holdfast.places import local_path
from holdfast.progress import Progress
from holdfast.storage import whole_lines
from holdfast.tasks.load import read_questions
from holdfast.tasks.rows import STANDARD, Columns
from holdfast.tasks.task import Example

GENERATED, BY_BASE = "generated", "generated_by_base"  # what is added to a row
_AT_ONCE = 128  # questions answered, sorted by length, from one write to the next


def load_to_ask(folder: Path, after: str | None, progress: Progress) -> Learner:
    """The learner of a folder, as it stands or as it was after one of its tasks, on a GPU where there is one.

    Raises
    ------
    HoldfastError
        There is no learner, or nothing of that name was learned.
    """
    number = None
    if after is not None:
        names = [skill.name for skill in read_skills(folder).skills]
        if after not in names:
            raise ConfigError(f"--after: nothing was learned as '{after}'; learned: {', '.join(names)}.")
        number = names.index(after) + 1
    learner = Learner.load(folder, progress=progress, after=number)
    onto_gpu(learner.model)
    return learner


def ask_file(
    learner: Learner,
    data: Path,
    out: Path,
    *,
    columns: Columns = STANDARD,
    base: bool,
    progress: Progress,
    **options: Any,
) -> int:
    """Answer a file's questions into a JSONL file of its rows with their answers; how many there were.

    Killed, the same call goes on: answers are kept in ``OUT.<digest>.partial`` as they come, the digest of
    rows, options and weights.

    Parameters
    ----------
    columns : Columns
        Other names of the questions' column.
    base : bool
        Also ask the model as it was before the first task.
    **options
        As of `Learner.answer`.

    Raises
    ------
    HoldfastError
        A question can't be read, a row has a column of an answer's name, or the output is there already.
    """
    if out.exists():
        raise StorageError(f"--out: {out} is there already, and is not written over. Give another name.")
    rows, questions = read_questions(local_path(data), columns)
    _refuse_answered(data, rows, base)
    with progress.bar(f"read {data.name}", total=len(questions)) as bar:
        for lost in lost_of(learner, questions, bar, options.get("max_new_tokens")):
            progress.say(f"{data}: {lost}")
    partial = out.with_name(f"{out.name}.{_digest(learner, rows, questions, base, options)}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    done = len(whole_lines(partial))
    if done:
        progress.say(f"{partial}: {done} of {len(questions)} are answered already")
    size = max(_AT_ONCE, learner.config.evaluation.batch_size)
    with partial.open("a", encoding="utf-8") as file, progress.bar(f"ask {data.name}", len(questions)) as bar:
        bar(done)
        for start in range(done, len(questions), size):
            part = questions[start : start + size]
            added = [{GENERATED: answer} for answer in learner.answer(part, **options)]
            if base:
                asked = {key: value for key, value in options.items() if key != "task"}
                for row, answer in zip(added, learner.answer(part, base=True, **asked), strict=True):
                    row[BY_BASE] = answer
            for row, more in zip(rows[start : start + size], added, strict=True):
                file.write(
                    json.dumps(_as_json(row | more), ensure_ascii=False, default=str, allow_nan=False) + "\n"
                )
            file.flush()
            bar(start + len(part))
    partial.replace(out)
    return len(questions)


def _refuse_answered(data: Path, rows: Sequence[Mapping[str, Any]], base: bool) -> None:
    for name in (GENERATED, BY_BASE)[: 2 if base else 1]:
        if at := [number for number, row in enumerate(rows, 1) if name in row]:
            raise DataError(
                f"{data}: {len(at)} of {len(rows)} rows, first row {at[0]}, have '{name}' already, which is "
                "what an answer is written as. Rename it or take it out of the file."
            )


def _as_json(value: Any) -> Any:
    """A row with null where a table has no number: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _as_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def lost_of(
    learner: Learner,
    questions: Sequence[Example],
    bar: Callable[[int], None] | None = None,
    max_new_tokens: int | None = None,
) -> Iterator[str]:
    """What is lost of some questions and answers: what is cut, tools that no template frames, and room."""
    encoder, template = learner.encoder, learner.config.template
    rows = encoder.questions(questions, bar)
    wanted = max_new_tokens or template.max_completion_tokens
    if short := sum(room < wanted for room in rooms_for_answers(learner.model, rows, wanted)):
        yield (
            f"{short} of {len(questions)} questions leave fewer than {wanted} tokens to their answer: the "
            f"model takes {context_length(learner.model)} in all."
        )
    if cut := sum(row.cut > 0 for row in rows):
        yield (
            f"{cut} of {len(questions)} questions are longer than template.max_prompt_tokens "
            f"({template.max_prompt_tokens}), as it was learned; their {template.keep} tokens are kept."
        )
    if unseen := sum(map(encoder.leaves_out_tools, questions)):
        yield (
            f"{unseen} of {len(questions)} questions have tools that the model isn't shown, as no chat "
            "template frames a text here. Ask in chat messages, or write them into the questions."
        )


def _digest(
    learner: Learner, rows: Sequence[Any], questions: Sequence[Example], base: bool, options: dict[str, Any]
) -> str:
    folder = learner.folder
    manifests = [folder.path / part / MANIFEST for part in folder.parts(STAGES)[: len(learner.learned)]]
    weights = [hashlib.sha256(manifest.read_bytes()).hexdigest() for manifest in manifests]
    identity = repr((weights, rows, questions, base, sorted(options.items())))
    return hashlib.sha256(identity.encode()).hexdigest()[:8]
