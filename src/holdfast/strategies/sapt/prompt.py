"""SAPT with soft prompts: a prompt a task, mixed by shared attention (Zhao et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.errors import ConfigError
from holdfast.hold.cost import Estimate, trained_numbers
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.prompts.soft import Prompt, Prompted, check_promptable, learn, vocabulary_rows
from holdfast.strategies.protocol import Strategy, register
from holdfast.strategies.sapt.attention import Attended, AttentionOptions
from holdfast.tasks.task import TaskStream


class SaptPromptOptions(AttentionOptions):
    """The prompts, and the attention."""

    name: Literal["sapt-prompt"] = "sapt-prompt"
    tokens: int = Field(10, ge=1, description="L, vectors of each task's prompt")


@register
class SaptPrompt(Strategy):
    """x reads [sum_i a_i P_i, x], a = softmax(q k_i): all tasks' prompts, by a row's input.

    As `sapt-lora` with prompts of L vectors for LoRAs, in front of a frozen model: task t trains P_t, its key
    and the network of the query, with attentive reflection on rows of earlier tasks. The task is never told,
    and the input grows by L vectors whatever the number of tasks. L 10 is the default of the authors'
    run_t5.py; their scripts for prompts are not published. Set a learning rate that suits prompts (0.3 for
    T5-large in prompt tuning; 1e-2 to 1e-1 on the toy suite). Prompts start from embeddings of random tokens.
    Extra state: a prompt, a key and the rows a task.
    """

    name = "sapt-prompt"
    paper = "Zhao et al. 2024, arXiv 2401.08295"
    summary = "one soft prompt a task, all mixed by attention from the input, in front of a frozen model"
    Options = SaptPromptOptions
    reads = ("input_ids", "attention_mask", "labels")
    looks = False
    rehearsal_free = False
    state = "per task"
    inference = "per task"
    begins_as_before = False  # the attention has one more key

    def __init__(self, options: SaptPromptOptions) -> None:
        super().__init__(options)
        self.attended = Attended(options)
        self.prompts: list[Tensor] = []  # of each task, (L, D)

    def check(self, model: nn.Module) -> None:
        """See that prompts can be put in front of the model's input."""
        check_promptable(model, self.name)

    def _fresh(self, model: nn.Module, seed: int) -> Prompt:
        return Prompt(vocabulary_rows(model, self.options.tokens, seed))

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """A prompt and the attention are all that is trained."""
        trained = [self._fresh(model, 0), self.attended.fresh(model, 0)]
        return Estimate(trained=sum(trained_numbers(module) for module in trained))

    def begin(self, context: Context, stage: Stage) -> None:
        """Put the mixed prompts in front, with a new one among them."""
        new = self._new = self._fresh(context.model, context.seed * 1000 + len(self.prompts))
        device = next(context.model.parameters()).device
        old = [prompt.to(device) for prompt in self.prompts]
        attention = self.attended.begin(context, stage)

        def source(ids_BT: Tensor, _: Tensor) -> Tensor:
            return mixed(self.attended.shares, torch.stack([*old, new()]))

        self._training = learn(context.model, nn.ModuleList([new, attention]), source)

    def watch(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Attend."""
        self.attended.watch(model, batch)

    def loss(self, model: nn.Module, batch: Mapping[str, Any], outputs: Any, loss: Tensor) -> Tensor:
        """With reflection."""
        return self.attended.loss(loss)

    def end(self, context: Context, stage: Stage) -> None:
        """Keep the prompt, the attention, and rows to reflect on."""
        self._training.remove()
        self.prompts.append(self._new().detach().cpu().clone())
        self.attended.learned()
        self.attended.remember(context, stage)

    def route(self, model: Any, task: str | None) -> Any:
        """The model with its prompts mixed for each row; `task` is never given."""
        if not self.prompts:
            return model
        shares_of = self.attended.answering(model)
        prompts_NLD = torch.stack(self.prompts).to(next(model.parameters()).device)
        return Prompted(model, lambda ids_BT, asked_BT: mixed(shares_of(ids_BT, asked_BT), prompts_NLD))

    def export(self, context: Context, folder: Path) -> None:
        """Refuse: no plain model attends."""
        raise ConfigError(
            "export: strategy 'sapt-prompt' mixes its prompts by the input, which no plain Hugging Face "
            "folder can say. The frozen model is the one that you started from; go on with the learner "
            "itself (holdfast.Learner.load)."
        )

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The prompts, the attention, and what it reflects on."""
        tensors, values = self.attended.state_dict()
        return tensors | {f"prompt:{i}": prompt for i, prompt in enumerate(self.prompts)}, values

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take them back."""
        count = sum(name.startswith("prompt:") for name in tensors)
        self.prompts = [tensors[f"prompt:{i}"] for i in range(count)]
        self.attended.load_state_dict(tensors, values)


def mixed(shares_BN: Tensor, prompts_NLD: Tensor) -> Tensor:
    """sum_i a_i P_i of each row, (B, L, D)."""
    return torch.einsum("bn,nld->bld", shares_BN, prompts_NLD.to(shares_BN))
