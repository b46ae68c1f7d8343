"""Self-synthesised rehearsal: rows written in context, answered by the latest model, chosen by clusters."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from holdfast.config import Options
from holdfast.evaluation.predictions import file_safe
from holdfast.evaluation.writing import write_rows
from holdfast.folder import CHECKPOINTS
from holdfast.hold.cost import Cost, Estimate
from holdfast.models import is_encoder_decoder
from holdfast.models.adapters import bare_of
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.prompts.pool import check_feature, query
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.encode import collate_prompts
from holdfast.tasks.memory import Memory, MemoryOptions, WritingOptions, mix
from holdfast.tasks.opening import Opening, opening_of
from holdfast.tasks.task import Example, TaskStream

_ROWS = 32  # rows whose features are taken at once; no effect on what is chosen
_TOGETHER = 8  # rows that are written behind the same demonstrations


class SynthesisOptions(WritingOptions):
    """How the base writes in context."""

    temperature: float = Field(0.9, gt=0, description="of the prompts; answers are always greedy")
    top_p: float = Field(
        0.6, gt=0, le=1, description="prompts are drawn from the likeliest tokens up to this"
    )


class SsrOptions(Options):
    """How rows are written, and which of them are rehearsed."""

    name: Literal["ssr"] = "ssr"
    demonstrations: int = Field(
        20, ge=1, description="rows of a task that the base is shown, a few at a time"
    )
    shots: int = Field(2, ge=1, description="demonstrations in front of each written row")
    candidates: int = Field(200, ge=1, description="rows of each earlier task that are written")
    count: int = Field(100, ge=1, description="of these, rows that are rehearsed")
    clusters: int = Field(20, ge=1, description="C, of the candidates' features")
    ratio: float = Field(
        0.2, gt=0, lt=1, description="share of a later task's training rows that are written"
    )
    writing: SynthesisOptions = Field(default_factory=SynthesisOptions)

    @model_validator(mode="after")
    def _of_what_there_is(self) -> SsrOptions:
        for few, of in (("shots", "demonstrations"), ("count", "candidates")):
            if getattr(self, few) > getattr(self, of):
                numbers = f"`{few}: {getattr(self, few)}` are taken from `{of}: {getattr(self, of)}`"
                raise ValueError(f"{numbers}; give at most as many")
        if self.count == self.candidates:
            self.refuse_ignored(("clusters",), "where all `candidates` are rehearsed (`count` as many)")
        return self


def clustered(features_MK: Tensor, clusters: int, seed: int, rounds: int = 50) -> tuple[Tensor, Tensor]:
    """k-means: centres (C, K) and each row's cluster (M,).

    Starts from rows drawn by their squared distance to those drawn before (k-means++). A cluster that loses
    all its rows keeps its centre.
    """
    draw, centres = random.Random(seed), [features_MK[random.Random(seed).randrange(len(features_MK))]]
    while len(centres) < min(clusters, len(features_MK)):
        far = torch.cdist(features_MK, torch.stack(centres)).min(1).values.square()
        if not float(far.sum()):
            break  # all that is left stands on a centre
        centres.append(features_MK[draw.choices(range(len(far)), far.tolist())[0]])
    centres_CK = torch.stack(centres)
    nearest = torch.cdist(features_MK, centres_CK).argmin(1)
    for _ in range(rounds):
        means = [features_MK[nearest == c].mean(0) if bool((nearest == c).any()) else old
                 for c, old in enumerate(centres_CK)]  # fmt: skip
        centres_CK = torch.stack(means)
        before, nearest = nearest, torch.cdist(features_MK, centres_CK).argmin(1)
        if torch.equal(before, nearest):
            break
    return centres_CK, nearest


def selected(features_MK: Tensor, clusters: int, count: int, seed: int) -> list[int]:
    """`count` rows, of each cluster in proportion to its size, those nearest to its centre; in order."""
    if len(features_MK) <= count:
        return list(range(len(features_MK)))
    centres_CK, nearest = clustered(features_MK, clusters, seed)
    away = (features_MK - centres_CK[nearest]).norm(dim=1)
    shares = [count * int((nearest == c).sum()) / len(nearest) for c in range(len(centres_CK))]
    wanted = [int(share) for share in shares]
    most_cut = sorted(range(len(shares)), key=lambda c: (wanted[c] - shares[c], c))
    for c in most_cut[: count - sum(wanted)]:
        wanted[c] += 1
    found: list[int] = []
    for c, number in enumerate(wanted):
        rows = (nearest == c).nonzero()[:, 0].tolist()
        found += sorted(rows, key=lambda i: (float(away[i]), i))[:number]
    return sorted(found)


@register
class Ssr(Strategy):
    """Mixes in rows that the base writes in context and that the model, as it is, answers.

    Of each task a few demonstrations are kept. Before each later task the model from before the first one is
    shown `shots` of them at a time and writes more prompts (in-context learning); the latest model answers
    these, so that a row says what it still can; k-means on the base's features (mean last hidden state over
    the question) makes C clusters, and of each, in proportion to its size, the rows nearest to its centre are
    rehearsed. The demonstrations themselves are not trained on again. The authors' scripts (custom/icl_gen):
    two shots of 20 demonstrations (1 % of a task), temperature 0.9, top-p 0.6, C 20, 200 rows rehearsed (10 %
    of a task, as 100 of 1000 are).

    Deviations: the base's own answers, which the paper lets the latest model refine, are not written at all.
    The authors write three times behind each of 380 pairs of demonstrations, with a penalty on repetitions
    (1.2), and cluster the embeddings of SimCSE.
    What fails the format, repeats, or copies a demonstration is left out and counted in the ``memory.json``
    files under ``written``. The base must write prompts of a form that it sees twice; where it can't, little
    is kept, and it is said. An encoder-decoder model's decoder goes on from the demonstrations. Needs the
    base (`Context.base_model`) at the start of a task. Extra state: the demonstrations.
    """

    name = "ssr"
    paper = "Huang et al. 2024, arXiv 2403.01244"
    summary = (
        "rehearses rows that the base writes in context and the latest model answers, chosen by clusters"
    )
    Options = SsrOptions
    rehearsal_free = False
    in_context = True
    state = "per task"

    def __init__(self, options: SsrOptions) -> None:
        super().__init__(options)
        self.memory = Memory(MemoryOptions(count=options.demonstrations))
        self.openings: dict[str, Opening] = {}

    def check(self, model: nn.Module) -> None:
        """See that the model gives features."""
        check_feature(bare_of(model), "hidden")

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """The base, while rows are written."""
        size = sum(p.numel() * p.element_size() for p in bare_of(model).parameters())
        return Estimate([Cost("the model before the first task, while rows are written", size)])

    def extra_rows(self, stage: Stage) -> int:
        """Those that are mixed in."""
        own = sum(len(task.train) for task in stage.tasks)
        return 0 if stage.first else round(own * self.options.ratio / (1 - self.options.ratio))

    def begin(self, context: Context, stage: Stage) -> None:
        """See where the new tasks' prompts end, before anything is trained."""
        self._new = {task.name: opening_of(task.train, context.encoder, task.name) for task in stage.tasks}

    def examples(self, context: Context, stage: Stage) -> Sequence[Example]:
        """The stage's own rows, and those that are written of earlier tasks."""
        own = super().examples(context, stage)
        if not self.openings:
            return own
        base = bare_of(context.base_model()).to(next(context.model.parameters()).device).eval()
        old = [row for task in self.openings for row in self._written(context, base, task)]
        if not old:
            return own
        return mix(own, old, self.options.ratio, random.Random(f"ssr {context.seed} {stage.index}"))

    def _written(self, context: Context, base: Any, task: str) -> list[Example]:
        """Rows of a task: candidates behind changing demonstrations, and of these the chosen ones."""
        options, encoder, opening = self.options, context.encoder, self.openings[task]
        kept = [row for name, row in self.memory.rows if name == task]
        demonstrations, draw = encoder.many(kept), random.Random(f"ssr {context.seed} {task}")
        candidates: dict[str, Example] = {}
        rounds = -(-options.candidates // _TOGETHER)
        with context.progress.bar(f"write rows of {task}", total=rounds) as bar:
            for number in range(rounds):
                shown = draw.sample(demonstrations, min(options.shots, len(demonstrations)))
                ids = [i for row in shown for i in (*row.prompt_ids, *row.completion_ids)]
                written = write_rows(
                    context.model,
                    encoder,
                    replace(opening, before=(*ids, *opening.before)),
                    options.writing,
                    count=_TOGETHER,
                    seed=f"{context.seed} {task} {number}",
                    known=kept,
                    writer=base,
                    kept=context.folder / CHECKPOINTS,
                )
                candidates |= {repr(row.prompt): row for row in written.rows}
                folder = Path(context.folder) / "written" / file_safe(task) / f"{number + 1:03d}"
                folder.mkdir(parents=True, exist_ok=True)
                written.save(folder)
                bar(number + 1, rounds)
        rows = list(candidates.values())
        features_MK = self._features(context, base, rows)
        chosen = selected(features_MK, options.clusters, options.count, context.seed)
        context.progress.say(f"  written for {task}: {len(rows)} rows, {len(chosen)} of them rehearsed")
        return [rows[i] for i in chosen]

    @staticmethod
    def _features(context: Context, base: Any, examples: Sequence[Example]) -> Tensor:
        """Mean last hidden states of the questions in the base, (M, K)."""
        rows, parts = context.encoder.many(examples), []
        device = next(base.parameters()).device
        for start in range(0, len(rows), _ROWS):
            batch = collate_prompts(
                rows[start : start + _ROWS],
                context.tokenizer.pad_token_id,
                encoder_decoder=is_encoder_decoder(base),
            )
            ids_BT, mask_BT = batch["input_ids"].to(device), batch["attention_mask"].bool().to(device)
            parts.append(query(base, ids_BT, mask_BT, "hidden").cpu())
        return torch.cat(parts) if parts else torch.empty(0, 1)

    def end(self, context: Context, stage: Stage) -> None:
        """Keep demonstrations of what was learned."""
        for task in stage.tasks:
            self.memory.add(task, context.seed)
        self.openings |= self._new

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The demonstrations, and how each task's prompts begin and end."""
        openings = {name: opening.record() for name, opening in self.openings.items()}
        return {}, {"memory": self.memory.state_dict(), "openings": openings}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take them back."""
        self.memory.load_state_dict(values["memory"])
        self.openings = {n: Opening.of_record(record) for n, record in values["openings"].items()}
