"""LAMOL: one model answers and writes rows, and writes those of earlier tasks before each new one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.hold.cost import Cost, Estimate, trained_numbers
from holdfast.models import is_encoder_decoder
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.generation import (
    SUBMODULE,
    GenerationOptions,
    Tasks,
    row_key,
    same_for_all,
    whole_rows,
    writing_loss,
)
from holdfast.strategies.prompts.soft import Prompted, check_embeddable, vocabulary_rows
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.encode import Encoder
from holdfast.tasks.task import Example, Task, TaskStream


class LamolOptions(GenerationOptions):
    """How much writing counts, and what is written."""

    name: Literal["lamol"] = "lamol"
    weight: float = Field(0.25, gt=0, description="lambda, of the loss on whole rows")


@register
class Lamol(Strategy):
    """Loss of the answer + lambda times the loss of the whole row behind its generation token.

    Before each task after the first, the model as it is writes ratio x (rows of the task) rows of the earlier
    tasks, as many of each, and learns them beside the new ones: each behind its own task's token, or all
    behind one (`token: global`). No row is kept; what the model has lost it can't write. Rows that fail the
    format (no end of the prompt, an empty or endless answer) or repeat one are left out and counted in
    ``written/*/memory.json``. lambda 0.25, the 20 likeliest tokens and both kinds of token are in the
    authors' settings.py, gamma in their README (0.2; 0.05 is its default), with AdamW at 6.25e-5 and 9
    epochs on GPT-2.

    Deviations: a token is a trained vector beside the embeddings, so that the vocabulary stays as it is.
    Prompts are drawn and then answered greedily in the format of a question, by the same code as a generated
    memory (`holdfast.evaluation.writing`); the paper draws the answer too. The paper's ANS token is what ends
    a prompt under the template. With `token: global` the task of a row isn't asked for: all earlier tasks'
    prompts must end alike. A forward pass more in each micro-batch. Extra state: a vector a task.
    """

    name = "lamol"
    paper = "Sun et al. 2020, arXiv 1909.03329"
    summary = "the model writes rows of earlier tasks itself before each new one, and learns them again"
    Options = LamolOptions
    loss_trains = True
    reads = ("input_ids", "attention_mask", "labels")
    looks = False
    writes = True
    state = "per task"

    def __init__(self, options: LamolOptions) -> None:
        super().__init__(options)
        self.tasks = Tasks.none(options)
        self._token_of: dict[tuple[int, ...], int] = {}

    def check(self, model: nn.Module) -> None:
        """See that a vector can stand in front of what the model reads."""
        check_embeddable(model, self.name)

    def check_tasks(self, tasks: Sequence[Task], encoder: Encoder) -> None:
        """See that rows of all of them can be written behind their tokens."""
        self.tasks.openings_with(tasks, encoder)

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """The vectors, with gradients and AdamW's states; the logits of a second forward pass aside."""
        size = vocabulary_rows(model, 1, 0).numel()
        tokens = len(stream) if self.options.token == "task" else 1
        return Estimate([Cost("generation tokens", 16 * size * tokens)], trained_numbers(model) + size)

    def extra_rows(self, stage: Stage) -> int:
        """gamma times the task's own rows."""
        return 0 if stage.first else self._count(stage)

    def _count(self, stage: Stage) -> int:
        return round(self.options.ratio * sum(len(task.train) for task in stage.tasks))

    def begin(self, context: Context, stage: Stage) -> None:
        """Give the new task a token, beside those that the model has."""
        self._tokens = self.tasks.begin(context, stage).to(next(context.model.parameters()).device)
        context.model.add_module(SUBMODULE, self._tokens)
        self._pad, self._end = context.tokenizer.pad_token_id, context.tokenizer.eos_token_id
        names = list(self.tasks.beginning)
        self._new = names.index(stage.tasks[-1].name) if self.options.token == "task" else 0

    def examples(self, context: Context, stage: Stage) -> Sequence[Example]:
        """The stage's own rows, and those that the model writes of earlier tasks."""
        own = super().examples(context, stage)
        self._token_of = {}
        if stage.first:
            return own
        model = context.model

        def writer(vector_D: Tensor) -> Prompted:
            return Prompted(model, same_for_all(vector_D[None]))

        written = self.tasks.write(context, stage, model, writer, self._count(stage))
        for task, row in written:
            key = row_key(context.encoder(row), is_encoder_decoder(model))
            self._token_of[key] = self.tasks.number(task)
        return [*own, *(row for _, row in written)]

    def loss(self, model: nn.Module, batch: Mapping[str, Any], outputs: Any, loss: Tensor) -> Tensor:
        """With that of whole rows, each behind its task's token."""
        read, rows = whole_rows(batch, is_encoder_decoder(model))
        numbers = [self._token_of.get(tuple(row.tolist()), self._new) for row in read]
        in_front_S1D = self._tokens.rows[torch.tensor(numbers, device=rows[0].device)][:, None]
        return loss + self.options.weight * writing_loss(model, in_front_S1D, rows, self._pad, self._end)

    def stage_state_dict(self) -> Mapping[str, Tensor]:
        """The tokens: a checkpoint of a PEFT model holds its adapter alone."""
        return {"tokens": self._tokens.rows.detach()}

    def load_stage_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take them back."""
        with torch.no_grad():
            self._tokens.rows.copy_(tensors["tokens"])

    def end(self, context: Context, stage: Stage) -> None:
        """Keep the tokens, and leave the model as it was."""
        self.tasks.end(self._tokens)
        delattr(context.model, SUBMODULE)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tokens, and how each task's prompts end."""
        return self.tasks.state_dict()

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take them back."""
        self.tasks.load_state_dict(tensors, values)
