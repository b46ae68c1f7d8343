"""Progressive Prompts: a new soft prompt a task, in front of the earlier ones (Razdaibiedina et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from holdfast.config import Options
from holdfast.hold import Handle
from holdfast.hold.cost import Estimate, trained_numbers
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.prompts.soft import (
    Prompt,
    Prompted,
    check_promptable,
    learn,
    save_adapter,
    vocabulary_rows,
)
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.task import TaskStream


class ProgPromptOptions(Options):
    """How long a task's prompt is, and how it is trained."""

    name: Literal["prog-prompt"] = "prog-prompt"
    tokens: int = Field(10, ge=1, description="vectors of each task's prompt")
    reparametrise: bool = Field(True, description="train it through a residual network, dropped afterwards")
    bottleneck: int | None = Field(None, ge=1, description="width of that network (default 800)")

    @model_validator(mode="after")
    def _only_what_applies(self) -> ProgPromptOptions:
        if self.bottleneck is not None and not self.reparametrise:
            raise ValueError("`bottleneck` applies with `reparametrise: true` only")
        return self


@register
class ProgPrompt(Strategy):
    """Task k reads [P_k, ..., P_2, P_1, x]: P_k is trained, P_1 ... P_k-1 and the whole model are frozen.

    P_k starts from the embeddings of random tokens. In training P_k = E_k + W2 tanh(W1 E_k + b1) + b2, with
    one network a task; afterwards P_k alone is kept. Order, start, network and width are as in the authors'
    code, which trains T5-large with 10 tokens a prompt at a learning rate of 0.3 for 10 epochs: far above
    what suits weights, so set ``training.learning_rate``. Deviation: no early stopping.

    A test of task i has P_i ... P_1 in front, bit for bit as they were after task i, so nothing is forgotten.
    A task that isn't learned yet gets all prompts there are. Each task's [P_k, ..., P_1] is also written as a
    PEFT adapter, ``prompt/``. Extra state: one prompt a task; the input grows by one prompt a task.
    """

    name = "prog-prompt"
    paper = "Razdaibiedina et al. 2023, arXiv 2301.12314"
    summary = "a soft prompt a task in front of a frozen model; each sees those learned before"
    Options = ProgPromptOptions
    needs_task_identity = True
    state = "per task"
    inference = "per task"
    begins_as_before = False  # a prompt more is in front

    def __init__(self, options: ProgPromptOptions) -> None:
        super().__init__(options)
        self.prompts: dict[str, Tensor] = {}  # by task, in the order learned; each (tokens, D)
        self._new: Prompt | None = None
        self._training = Handle()

    def check(self, model: nn.Module) -> None:
        """See that prompts can be put in front of the model's input."""
        check_promptable(model, self.name)

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """A prompt and its network are all that is trained."""
        return Estimate(trained=trained_numbers(self._fresh(model, 0)))

    def _fresh(self, model: nn.Module, seed: int) -> Prompt:
        options = self.options
        rows_ND = vocabulary_rows(model, options.tokens, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Prompt(rows_ND, (options.bottleneck or 800) if options.reparametrise else None)

    def begin(self, context: Context, stage: Stage) -> None:
        """Put a new prompt in front of the earlier ones."""
        new = self._new = self._fresh(context.model, context.seed * 1000 + len(self.prompts))
        earlier = self._joined(self.prompts) if self.prompts else new.rows.detach()[:0]

        def source(ids_BT: Tensor, question_BT: Tensor) -> Tensor:
            prompt_ND = torch.cat([new(), earlier.to(ids_BT.device)])
            return prompt_ND.expand(len(ids_BT), -1, -1)

        self._training = learn(context.model, new, source)

    def end(self, context: Context, stage: Stage) -> None:
        """Keep the prompt, without its network, and write the adapter."""
        assert self._new is not None
        self._training.remove()
        with torch.no_grad():
            self.prompts[stage.name] = self._new().cpu().clone()
        self._new = None
        save_adapter(context.model, self._joined(self.prompts), context.folder / "prompt")

    def route(self, model: Any, task: str | None) -> Any:
        """The model with the prompts that the task was learned with."""
        if not self.prompts:
            return model
        names = list(self.prompts)
        known = names[: names.index(task) + 1] if task in names else names
        joined = self._joined({name: self.prompts[name] for name in known})
        return Prompted(model, lambda ids_BT, _: joined.to(ids_BT.device).expand(len(ids_BT), -1, -1))

    def export(self, context: Context, folder: Path) -> None:
        """Write all prompts as one PEFT adapter: earlier tasks answer otherwise than with their own alone."""
        save_adapter(context.model, self._joined(self.prompts), folder)
        context.tokenizer.save_pretrained(folder)

    @staticmethod
    def _joined(prompts: Mapping[str, Tensor]) -> Tensor:
        """The newest first: (tokens times tasks, D)."""
        return torch.cat(list(prompts.values())[::-1])

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All prompts, and the order of their tasks."""
        return dict(self.prompts), {"tasks": list(self.prompts)}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take them back."""
        self.prompts = {task: tensors[task] for task in values["tasks"]}
