"""KPIG: replays rows whose answers need their instruction least, and trains to need it (He et al. 2025)."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast.config import Options
from holdfast.evaluation.answers import batch_for
from holdfast.hold.cost import Estimate
from holdfast.models import accepts, evaluating, is_encoder_decoder
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.memory import Memory, MemoryOptions, Rehearsal, RehearsalOptions, RowsOptions
from holdfast.tasks.opening import common_beginning
from holdfast.tasks.task import Example, TaskStream
from holdfast.training.verbs import model_inputs

_ROWS = 16  # rows whose gain is measured at once; no effect on what is chosen


class KpigOptions(Options):
    """What is kept, how it is chosen for replay, and how much a key part must matter."""

    name: Literal["kpig"] = "kpig"
    memory: RowsOptions = Field(default_factory=MemoryOptions)
    ratio: float = Field(0.2, gt=0, lt=1, description="share of a later task's training rows that are old")
    temperature: float = Field(
        1.0, gt=0, description="nats a token: a row is replayed in proportion to exp(-gain / temperature)"
    )
    weight: float = Field(0.1, ge=0, description="of the divergence between whole and masked instructions")


def divergence(whole_NV: Tensor, masked_NV: Tensor) -> Tensor:
    """Mean over N positions of the Jensen-Shannon divergence of two predictions: 0 to ln 2 nats."""
    p, q = (F.log_softmax(logits.float(), -1) for logits in (whole_NV, masked_NV))
    middle = torch.logaddexp(p, q) - math.log(2.0)
    kls = [F.kl_div(middle, each, reduction="sum", log_target=True) for each in (p, q)]
    return torch.stack(kls).sum() / 2 / max(len(p), 1)


def chosen(gains: Sequence[float], count: int, temperature: float, seed: str) -> list[int]:
    """`count` rows, drawn in proportion to exp(-gain / temperature): those of little gain more often."""
    least = min(gains)
    shares = [math.exp((least - gain) / temperature) for gain in gains]
    return random.Random(seed).choices(range(len(gains)), shares, k=count)


@register
class Kpig(Strategy):
    """Loss - weight JSD(p(y | x) || p(y | x without its key part)), and replay by information gain.

    The key part of a row is what tells its task: the tokens with which all prompts of the task begin (its
    instruction; the whole prompt where they share none). Masked, each of them is the tokenizer's unknown (or
    padding) token. A row's information gain is the mean over its answer of log p(y | x) - log p(y | masked
    x), in nats a token. What the model answers as well without its instruction it only half listens to:
    before each task the gain of all kept rows is measured anew, and what is replayed is drawn in proportion
    to exp(-gain / temperature). In training the divergence, which is bounded by ln 2, is pushed up.

    The paper's code and hyperparameters were not found. Its key parts are marked by GPT-4 in rewritten
    instructions, and it replays whole tasks of least gain: the key part by common beginning, the draw by
    rows, weight and temperature are ours. A forward pass more in each micro-batch. Extra state: 2 % of each
    task's rows.
    """

    name = "kpig"
    paper = "He et al. 2025, arXiv 2403.10056"
    summary = "replays rows whose answers need their instruction least, and trains to need it"
    Options = KpigOptions
    reads = ("input_ids", "attention_mask", "labels")
    rehearsal_free = False
    state = "per task"

    def __init__(self, options: KpigOptions) -> None:
        super().__init__(options)
        self.rehearsal: Rehearsal = Rehearsal(RehearsalOptions(memory=options.memory, ratio=options.ratio))
        self.lengths: dict[str, int] = {}  # of each task's key part, in tokens; 0: the whole prompt
        self._spans: dict[tuple[int, ...], tuple[int, int]] = {}

    @property
    def memory(self) -> Memory:
        """The kept rows."""
        return self.rehearsal.memory

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """Kept rows are small."""
        return Estimate()

    def begin(self, context: Context, stage: Stage) -> None:
        """Find the new tasks' key parts."""
        ids = [context.tokenizer.unk_token_id, context.tokenizer.pad_token_id]
        self._masked_id = next(i for i in ids if i is not None)
        self._decoding = is_encoder_decoder(context.model)
        for task in stage.tasks:
            texts = dict.fromkeys(tuple(context.encoder.text_ids(row.prompt)) for row in task.train)
            self.lengths[task.name] = len(common_beginning(texts))
        self._spans = {}

    def _span(self, context: Context, task: str, row: Example) -> tuple[int, int]:
        """Where the key part stands in a row's tokens: the first one, and how many."""
        before = len(context.encoder.frame(row.prompt)[0])
        return before, self.lengths[task] or len(context.encoder.text_ids(row.prompt))

    def _know(self, context: Context, task: str, rows: Sequence[Example]) -> None:
        for row, encoded in zip(rows, context.encoder.many(rows), strict=True):
            ids = encoded.prompt_ids if self._decoding else encoded.prompt_ids + encoded.completion_ids
            self._spans[tuple(ids)] = self._span(context, task, row)

    def examples(self, context: Context, stage: Stage) -> Sequence[Example]:
        """The stage's own rows, and those that are listened to least."""
        own = super().examples(context, stage)
        for task in stage.tasks:
            self._know(context, task.name, list(task.train))
        for task_name, row in self.memory.rows:
            self._know(context, task_name, [row])
        if not len(self.memory):
            return own
        gains = self._gains(context, self.memory.examples)
        wanted = round(len(own) * self.options.ratio / (1 - self.options.ratio))
        seed = f"kpig {context.seed} {stage.index}"
        old = [self.memory.examples[i] for i in chosen(gains, wanted, self.options.temperature, seed)]
        mixed = [*own, *old]
        random.Random(f"mix {seed}").shuffle(mixed)
        return mixed

    def masked(self, batch: Mapping[str, Any]) -> Tensor:
        """A batch's ``input_ids`` (S, T) without their key parts."""
        ids_ST, seen_ST = batch["input_ids"].clone(), batch["attention_mask"].bool()
        for ids, seen in zip(ids_ST, seen_ST, strict=True):
            first, length = self._spans.get(tuple(ids[seen].tolist()), (0, 0))
            at = seen.nonzero()[first : first + length, 0]
            ids[at] = self._masked_id
        return ids_ST

    @torch.no_grad()
    def _gains(self, context: Context, rows: Sequence[Example]) -> list[float]:
        """log p(y | x) - log p(y | masked x) of each row, a token."""
        model, encoded, found = context.model, context.encoder.many(rows), []
        with evaluating(model):
            for start in range(0, len(encoded), _ROWS):
                part = encoded[start : start + _ROWS]
                batch = batch_for(model, context.tokenizer, part, "right" if self._decoding else "left")
                whole = self._sure(model, batch)
                less = self._sure(model, {**batch, "input_ids": self.masked(batch)})
                found += (whole - less).tolist()
        return found

    def _sure(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean log-probability of each row's answer tokens, (S,)."""
        logits, labels = self._predictions(model, batch), batch["labels"]
        if not self._decoding:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none")
        return -losses.sum(1) / (labels != -100).sum(1)

    def _predictions(self, model: nn.Module, batch: Mapping[str, Any], length: int | None = None) -> Tensor:
        """Logits of the last positions."""
        inputs = model_inputs(batch)
        if not self._decoding:
            inputs = {**{k: v for k, v in inputs.items() if k != "labels"}, "use_cache": False}
            if length is not None and accepts(model, "logits_to_keep"):
                inputs["logits_to_keep"] = length
        result: Tensor = model(**inputs).logits
        return result if length is None else result[:, -length:]

    def loss(self, model: nn.Module, batch: Mapping[str, Any], outputs: Any, loss: Tensor) -> Tensor:
        """Less the divergence between the answers with and without key parts."""
        if not self.options.weight:
            return loss
        length = outputs.logits.shape[1]
        less = self._predictions(model, {**batch, "input_ids": self.masked(batch)}, length)
        whole, labels = outputs.logits, batch["labels"][:, -length:]
        if not self._decoding:  # position i predicts token i + 1
            whole, less, labels = whole[:, :-1], less[:, :-1], labels[:, 1:]
        answer = labels != -100
        return loss - self.options.weight * divergence(whole[answer], less[answer])

    def end(self, context: Context, stage: Stage) -> None:
        """Keep a few rows of what was learned."""
        self.rehearsal.learned(stage.tasks, context.seed, context.write)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The memory, and how long each task's key part is."""
        return {}, {"memory": self.memory.state_dict(), "lengths": dict(self.lengths)}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take them back."""
        self.memory.load_state_dict(values["memory"])
        self.lengths = dict(values["lengths"])
