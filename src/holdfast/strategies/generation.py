"""Generation tokens: trained vectors behind which a model has learned to write a task's rows itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast.config import Options
from holdfast.errors import DataError
from holdfast.evaluation.predictions import file_safe
from holdfast.evaluation.writing import write_rows
from holdfast.folder import CHECKPOINTS
from holdfast.models import is_encoder_decoder
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.prompts.soft import Source, prepend, vocabulary_rows
from holdfast.tasks.encode import Encoded, Encoder
from holdfast.tasks.memory import WritingOptions
from holdfast.tasks.opening import Opening, opening_of
from holdfast.tasks.task import Example, Task

SUBMODULE = "generation_tokens"  # what is trained beside the model, as its own submodule


class DrawingOptions(WritingOptions):
    """How rows of earlier tasks are written: LAMOL draws among the 20 likeliest tokens."""

    top_p: float = Field(
        1.0, gt=0, le=1, description="prompts are drawn from the likeliest tokens up to this"
    )
    top_k: int | None = Field(20, ge=1, description="and from so many of them at most")


class GenerationOptions(Options):
    """What a model writes old rows from, and how many."""

    token: Literal["task", "global"] = Field(
        "task", description="a generation token for each task, or one for all"
    )
    ratio: float = Field(0.2, gt=0, description="gamma: written rows in all, as a share of a task's own")
    writing: DrawingOptions = Field(default_factory=DrawingOptions)


class GenerationTokens(nn.Module):
    """Vectors of the size of an input embedding, (N, D): one for each task, or a single one."""

    def __init__(self, rows_ND: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows_ND.clone())


def row_key(encoded: Encoded, encoder_decoder: bool) -> tuple[int, ...]:
    """What a row's real tokens in ``input_ids`` are."""
    return tuple(encoded.prompt_ids if encoder_decoder else encoded.prompt_ids + encoded.completion_ids)


def whole_rows(batch: Mapping[str, Any], encoder_decoder: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Each row's real tokens in ``input_ids``, and all that is to be written: with the answer behind them."""
    ids_ST, seen_ST = batch["input_ids"], batch["attention_mask"].bool()
    read = [ids[seen] for ids, seen in zip(ids_ST, seen_ST, strict=True)]
    if not encoder_decoder:
        return read, read
    answers = [labels[labels != -100] for labels in batch["labels"]]
    return read, [torch.cat(pair) for pair in zip(read, answers, strict=True)]


def writing_loss(
    model: Any, in_front_SND: Tensor, rows: Sequence[Tensor], pad_id: int, end_id: int
) -> Tensor:
    """Mean cross-entropy of all tokens of the rows behind the vectors, in a forward pass of its own.

    A causal model reads the vectors and goes on with the row. Of an encoder-decoder model the encoder reads
    the vectors and the end token, and the decoder writes the row.
    """
    width = max(len(row) for row in rows)
    ids_ST = torch.stack([F.pad(row, (0, width - len(row)), value=pad_id) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=ids_ST.device)
    seen_ST = torch.arange(width, device=ids_ST.device) < lengths[:, None]
    if is_encoder_decoder(model):
        end = ids_ST.new_full((len(rows), 1), end_id)
        labels_ST = ids_ST.masked_fill(~seen_ST, -100)
        logits = model(**prepend(model, in_front_SND, end, torch.ones_like(end)), labels=labels_ST).logits
    else:
        inputs = prepend(model, in_front_SND, ids_ST, seen_ST.long())
        first = in_front_SND.shape[1] - 1  # the last vector predicts the first token
        logits = model(**inputs, use_cache=False).logits[:, first:-1]
    return F.cross_entropy(logits[seen_ST].float(), ids_ST[seen_ST])


@dataclass
class Tasks:
    """The tasks that a model can write: how their prompts end, and the vectors that stand for them.

    Attributes
    ----------
    openings : dict of str to Opening
        Of each task in the order learned; without a shared beginning, which the vector stands for.
    rows : Tensor
        (N, D) float32; empty before the first task.
    """

    options: GenerationOptions
    openings: dict[str, Opening]
    rows: Tensor
    beginning: dict[str, Opening] = field(default_factory=dict)  # with those of the stage that is trained

    @classmethod
    def none(cls, options: GenerationOptions) -> Tasks:
        """Before the first task."""
        return cls(options, {}, torch.empty(0, 0))

    def number(self, task: str) -> int:
        """Which vector stands for a task."""
        return list(self.openings).index(task) if self.options.token == "task" else 0

    def begin(self, context: Context, stage: Stage) -> GenerationTokens:
        """The vectors to train, with those of the stage's tasks, which start from a random token's.

        Raises
        ------
        DataError
            As of `openings_with`.
        """
        self.beginning = self.openings_with(stage.tasks, context.encoder)
        known, count = len(self.rows), len(self.beginning) if self.options.token == "task" else 1
        seeds = (context.seed * 1000 + number for number in range(known, count))
        fresh = [vocabulary_rows(context.model, 1, seed) for seed in seeds]
        return GenerationTokens(torch.cat([*([self.rows] if self.openings else []), *fresh]))

    def openings_with(self, tasks: Sequence[Task], encoder: Encoder) -> dict[str, Opening]:
        """Those that there are, and of further tasks.

        Raises
        ------
        DataError
            Nothing tells where a prompt ends, or with a global token tasks end theirs otherwise.
        """
        openings = dict(self.openings)
        for task in tasks:
            opening = replace(opening_of(task.train, encoder, task.name), shared=())
            other = next(iter(openings.values()), opening)
            if self.options.token == "global" and opening != other:
                raise DataError(
                    f"task '{task.name}': its prompts begin or end otherwise than those of "
                    f"'{next(iter(openings))}', and with `token: global` they are written alike. "
                    "Use `strategy.token: task`."
                )
            openings[task.name] = opening
        return openings

    def end(self, tokens: GenerationTokens) -> None:
        """Keep what a stage has trained."""
        self.rows, self.openings = tokens.rows.detach().cpu().clone(), self.beginning

    def write(
        self, context: Context, stage: Stage, solver: Any, writer_of: Any, count: int
    ) -> list[tuple[str, Example]]:
        """Rows of all earlier tasks, `count` together and as many of each, as the model writes them now.

        Parameters
        ----------
        solver : model
            Answers the prompts, greedily.
        writer_of : callable
            (the vector of a task (D,)) -> the model that writes prompts behind it.
        """
        found: list[tuple[str, Example]] = []
        names = list(self.openings)
        for i, task in enumerate(names):
            share = count // len(names) + (i < count % len(names))
            if not share:
                continue
            with context.progress.bar(f"write rows of {task}", total=share) as bar:
                written = write_rows(
                    solver,
                    context.encoder,
                    self.openings[task],
                    self.options.writing,
                    count=share,
                    seed=f"{context.seed} {stage.index} {task}",
                    writer=writer_of(self.rows[self.number(task)]),
                    progress=bar,
                    kept=context.folder / CHECKPOINTS,
                )
            folder = Path(context.folder) / "written" / f"{i + 1:02d}-{file_safe(task)}"
            folder.mkdir(parents=True, exist_ok=True)
            written.save(folder)
            context.progress.say(f"  written for {task}: {written.said()}")
            found += [(task, row) for row in written.rows]
        return found

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The vectors, and how prompts end."""
        return {"tokens": self.rows}, {"openings": {n: o.record() for n, o in self.openings.items()}}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take them back."""
        self.rows = tensors["tokens"]
        self.openings = {n: Opening.of_record(record) for n, record in values["openings"].items()}


def same_for_all(vectors_ND: Tensor) -> Source:
    """Puts the same vectors in front of every input."""
    return lambda ids_BT, _: vectors_ND.to(ids_BT.device).expand(len(ids_BT), -1, -1)
