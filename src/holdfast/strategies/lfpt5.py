"""LFPT5: one large soft prompt solves and writes; its own old rows keep it close to what it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.hold.cost import Cost, Estimate, trained_bytes, trained_numbers
from holdfast.models import is_encoder_decoder
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.generation import (
    GenerationOptions,
    Tasks,
    row_key,
    same_for_all,
    whole_rows,
    writing_loss,
)
from holdfast.strategies.prompts.soft import (
    Prompt,
    Prompted,
    check_promptable,
    learn,
    save_adapter,
    vocabulary_rows,
)
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.encode import Encoder
from holdfast.tasks.task import Example, Task, TaskStream
from holdfast.training.teacher import Teacher


class Lfpt5Options(GenerationOptions):
    """The prompt, the weights of its losses, and what is written."""

    name: Literal["lfpt5"] = "lfpt5"
    tokens: int = Field(300, ge=1, description="vectors of the prompt")
    weight: float = Field(0.25, gt=0, description="lambda_lm, of the loss on whole rows")
    distillation: float = Field(0.01, ge=0, description="lambda_kl, on written rows")


@register
class Lfpt5(Strategy):
    """x reads [P, x]; loss + lambda_lm L_lm + lambda_kl KL(old || now) on rows that it has written itself.

    One prompt P of 300 vectors in front of a frozen model is trained on through all tasks. It learns to
    answer, and behind a task's generation token to write the whole row (L_lm). Before each new task it
    writes rows of the earlier ones, which are learned beside the new ones; on these it also stays close to
    the answers of the prompt before the task. 300, lambda_lm 0.25 and lambda_kl 0.01 are those of the
    authors' Classification.sh (summaries: 0.1, 0.04; NER: 0.1, 0.03 or 0.06), which trains T5-v1.1-large,
    adapted to text, with Adafactor at 0.5: set ``training.learning_rate`` (1e-2 to 1e-1 on the toy suite).
    The paper is few-shot and gives a new kind of task a prompt of its own.

    Deviations: those of `lamol`, whose writing it shares; written rows are a fifth of a task's own (theirs: 2
    of each class); their code has 1 - lambda_kl before the other losses. P starts from embeddings of random
    tokens. Two forward passes more, and one on written rows, in each micro-batch. Extra state: the prompt,
    and a vector a task.
    """

    name = "lfpt5"
    paper = "Qin & Joty 2022, arXiv 2110.07298"
    summary = (
        "one large soft prompt answers and writes rows of earlier tasks, with KL to the old prompt there"
    )
    Options = Lfpt5Options
    loss_trains = True
    reads = ("input_ids", "attention_mask", "labels")
    writes = True
    state = "per task"
    inference = "constant"

    def __init__(self, options: Lfpt5Options) -> None:
        super().__init__(options)
        self.tasks = Tasks.none(options)
        self.prompt: Tensor | None = None  # (tokens, D)
        self.teacher: Teacher | None = None
        self._token_of: dict[tuple[int, ...], int] = {}  # of written rows

    def check(self, model: nn.Module) -> None:
        """See that prompts can be put in front of the model's input."""
        check_promptable(model, self.name)

    def _fresh(self, model: nn.Module, seed: int) -> Prompt:
        return Prompt(vocabulary_rows(model, self.options.tokens, seed))

    def check_tasks(self, tasks: Sequence[Task], encoder: Encoder) -> None:
        """See that rows of all of them can be written behind their tokens."""
        self.tasks.openings_with(tasks, encoder)

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """The prompt and a token are all that is trained; the teacher is as large."""
        prompt = self._fresh(model, 0)
        size = vocabulary_rows(model, 1, 0).numel()
        teacher = Cost("teacher (the prompt before the task)", trained_bytes(prompt, each=4))
        return Estimate([teacher], trained_numbers(prompt) + size)

    def extra_rows(self, stage: Stage) -> int:
        """A share of the task's own rows."""
        return 0 if stage.first else self._count(stage)

    def _count(self, stage: Stage) -> int:
        return round(self.options.ratio * sum(len(task.train) for task in stage.tasks))

    def begin(self, context: Context, stage: Stage) -> None:
        """Put the prompt in front, as the last task left it, and give the new task a token."""
        model = context.model
        new = self._fresh(model, context.seed) if self.prompt is None else Prompt(self.prompt)
        tokens = self.tasks.begin(context, stage)
        self._new, self._tokens = new, tokens
        self._training = learn(model, nn.ModuleList([new, tokens]), lambda ids, _: self._solving(len(ids)))
        self.teacher = None if stage.first else Teacher(model)
        self._pad, self._end = context.tokenizer.pad_token_id, context.tokenizer.eos_token_id
        names = list(self.tasks.beginning)
        self._number = names.index(stage.tasks[-1].name) if self.options.token == "task" else 0

    def _solving(self, rows: int) -> Tensor:
        solving: Tensor = self._new().expand(rows, -1, -1)
        return solving

    def examples(self, context: Context, stage: Stage) -> Sequence[Example]:
        """The stage's own rows, and those that the prompt as it is writes of earlier tasks."""
        own = super().examples(context, stage)
        self._token_of = {}
        if stage.first:
            return own
        prompt_ND, model = self._new().detach(), context.model

        def writer(vector_D: Tensor) -> Prompted:
            return Prompted(model, same_for_all(torch.cat([prompt_ND, vector_D[None].to(prompt_ND)])))

        self._training.remove()  # here the wrappers put the prompt in front
        try:
            solver = Prompted(model, same_for_all(prompt_ND))
            written = self.tasks.write(context, stage, solver, writer, self._count(stage))
        finally:
            parts = nn.ModuleList([self._new, self._tokens])
            self._training = learn(model, parts, lambda ids, _: self._solving(len(ids)))
        for task, row in written:
            key = row_key(context.encoder(row), is_encoder_decoder(model))
            self._token_of[key] = self.tasks.number(task)
        return [*own, *(row for _, row in written)]

    def loss(self, model: nn.Module, batch: Mapping[str, Any], outputs: Any, loss: Tensor) -> Tensor:
        """With the loss on whole rows, and the KL on those that were written."""
        options = self.options
        read, rows = whole_rows(batch, is_encoder_decoder(model))
        keys = [tuple(row.tolist()) for row in read]
        numbers = torch.tensor([self._token_of.get(key, self._number) for key in keys]).to(rows[0].device)
        in_front = torch.cat([self._solving(len(rows)), self._tokens.rows[numbers][:, None]], dim=1)
        loss = loss + options.weight * writing_loss(model, in_front, rows, self._pad, self._end)
        old = torch.tensor([key in self._token_of for key in keys], device=rows[0].device)
        if self.teacher is None or not options.distillation or not bool(old.any()):
            return loss
        part = {name: value[old] for name, value in batch.items()}
        away = self.teacher.penalty(model, part, outputs.logits[old], 1.0)
        return loss + options.distillation * away

    def end(self, context: Context, stage: Stage) -> None:
        """Keep prompt and tokens, and leave the model as it was."""
        self._training.remove()
        self.tasks.end(self._tokens)
        self.prompt, self.teacher = self._new().detach().cpu().clone(), None

    def route(self, model: Any, task: str | None) -> Any:
        """The model with the prompt."""
        return model if self.prompt is None else Prompted(model, same_for_all(self.prompt))

    def export(self, context: Context, folder: Path) -> None:
        """Write the prompt as a PEFT adapter."""
        if self.prompt is None:
            return super().export(context, folder)
        save_adapter(context.model, self.prompt, folder)
        context.tokenizer.save_pretrained(folder)
        return None

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Prompt, tokens, and how each task's prompts end."""
        if self.prompt is None:
            return {}, {}
        tensors, values = self.tasks.state_dict()
        return tensors | {"prompt": self.prompt}, values

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take them back."""
        if tensors:
            self.prompt = tensors["prompt"]
            self.tasks.load_state_dict(tensors, values)
