"""Rows that a model writes itself: prompts drawn from an opening, answered greedily, and filtered."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from holdfast import world
from holdfast.evaluation.answers import (
    by_length,
    decoder_start,
    greedy,
    log_likelihoods,
    plain_greedy,
    prompts_for,
    rooms_for_answers,
)
from holdfast.evaluation.transcript import Transcript
from holdfast.models import evaluating
from holdfast.storage import write_json, write_text
from holdfast.tasks.encode import Encoded, Encoder
from holdfast.tasks.memory import WritingOptions
from holdfast.tasks.opening import Opening
from holdfast.tasks.task import Example

ROWS = "memory.jsonl"
RECORD = "memory.json"
Progress = Callable[[int, int, str], None]  # rows kept, rows wanted, what is being done
_ASKED = 8  # rows by whose likelihood a model is known again
_LEADING = 2048  # tokens of a vocabulary that are sorted first


@dataclass
class Written:
    """Rows that a model wrote, and what became of those that it also wrote.

    Attributes
    ----------
    asked, written : int
        How many rows were wanted, and how many were written for them.
    empty : int
        Left out: no text behind what all prompts of the task begin with, or no answer.
    unfinished : int
        Left out: a prompt without its closing, or an answer without an end token.
    cut : int
        Kept, without an end: answers and texts that have none within their tokens.
    repeated, copied : int
        Left out: the prompt of another row of these, or of a row that the task was learned from.
    unsure : int
        Left out: answers below the mean log-probability that the options ask for.
    opening, closing : str
        What the model was given to go on from, and what ended a prompt.
    """

    asked: int
    opening: str = ""
    closing: str = ""
    written: int = 0
    empty: int = 0
    unfinished: int = 0
    repeated: int = 0
    copied: int = 0
    unsure: int = 0
    cut: int = 0
    rows: list[Example] = field(default_factory=list, repr=False)
    confidence: list[float] = field(default_factory=list, repr=False)

    def said(self) -> str:
        """In one line."""
        reasons = ("empty", "unfinished", "repeated", "copied", "unsure")
        left_out = [f"{count} {reason}" for reason in reasons if (count := getattr(self, reason))]
        said = f"{len(self.rows)} of {self.written} rows kept"
        if self.cut:
            said += f", {self.cut} of them cut"
        if left_out:
            said += f" (left out: {', '.join(left_out)})"
        return said if self.rows else f"{said}; there is nothing of this task to replay"

    def save(self, folder: Path) -> None:
        """Write ``memory.jsonl``, a row a line, and ``memory.json``, the counts."""
        lines = [
            json.dumps({**row.record(), "confidence": sure}, ensure_ascii=False) + "\n"
            for row, sure in zip(self.rows, self.confidence, strict=True)
        ]
        write_text(folder / ROWS, "".join(lines))
        counts = {key: value for key, value in asdict(self).items() if key not in ("rows", "confidence")}
        write_json(folder / RECORD, {**counts, "kept": len(self.rows)})


def write_rows(
    model: Any,
    encoder: Encoder,
    opening: Opening,
    options: WritingOptions,
    *,
    count: int,
    seed: str,
    known: Sequence[Example] = (),
    batch_size: int = 16,
    progress: Progress | None = None,
    writer: Any = None,
    kept: Path | None = None,
) -> Written:
    """Let a model write rows: it goes on from an opening to its closing, and answers what it wrote.

    The same weights, opening and seed give the same rows, whatever the batch size (up to rounding in the
    model): each row has random numbers of its own.

    Parameters
    ----------
    count : int
        How many rows are wanted; fewer are given where ``options.tries * count`` weren't enough.
    known : sequence of Example
        Rows that must not come back: one with the same prompt is left out.
    progress : callable, optional
        Called with the rows kept so far, `count`, and what is being done.
    writer : optional
        Who writes the prompts, where it isn't the model that answers them.
    kept : Path, optional
        A folder for what the model has said so far, batch by batch: a killed call that is made again goes on
        behind it, and gives the same rows. The caller deletes it.
    """
    before, behind = (str(encoder.tokenizer.decode(list(ids))) for ids in (opening.given, opening.closing))
    written = Written(count, before, behind)
    known_rows = encoder.many(known)
    not_again = {tuple(row.completion_ids if opening.raw else row.prompt_ids) for row in known_rows}
    file = None
    if kept is not None:
        sums = [_known_by(who, encoder, opening, known_rows) for who in (model, writer) if who is not None]
        depends_on = (sums, seed, count, opening, options, encoder.template, batch_size, world.size())
        name = hashlib.sha256(repr((depends_on, sorted(not_again))).encode()).hexdigest()
        file = kept / f"written-{name[:16]}.jsonl"
    said = Transcript(file)
    work = _Writing(model, encoder, opening, options, batch_size, said, not_again, written, progress)
    most = options.tries * count
    while len(written.rows) < count and written.written < most:
        # a round is as large as it takes by what was left out so far: rounds of a few rows take as long as of
        # many, and batches don't decide which rows are written
        tried = written.written / max(len(written.rows), 1) if written.written else 1.0
        missing = math.ceil((count - len(written.rows)) * min(tried, options.tries))
        size = min(max(missing, 8), most - written.written)
        prompts = work.drawn(writer or model, _uniform(f"{seed} {written.written}", size, work.room))
        written.written += size
        work.keep_sure(list(work.sound_texts(prompts) if opening.raw else work.answered(prompts)))
    del written.rows[count:], written.confidence[count:]
    written.cut = sum(not row.ended for row in written.rows)
    return written


def _known_by(model: Any, encoder: Encoder, opening: Opening, rows: Sequence[Encoded]) -> list[float]:
    """What tells one model from another, prompts in front of it included: how likely it finds a few rows."""
    end = encoder.tokenizer.eos_token_id
    asked = [*rows[:_ASKED], Encoded([*opening.given] or [end], [end])]
    found: list[float] = log_likelihoods(model, encoder.tokenizer, asked).tolist()
    return found


def _uniform(seed: str, rows: int, steps: int) -> Tensor:
    """Random numbers in [0, 1), float64, (rows, steps): those of a row depend on no other row."""
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7]))
    return torch.rand(rows, steps, generator=generator, dtype=torch.float64)


def choose(
    logits_BV: Tensor, drawn_B: Tensor, temperature: float, top_p: float, top_k: int | None = None
) -> Tensor:
    """Draw a token of each row from its nucleus by inverting the distribution function.

    The nucleus is the smallest set of likeliest tokens whose probability is at least `top_p` (Holtzman et
    al. 2020, arXiv 1904.09751), or the `top_k` likeliest tokens of it.

    Parameters
    ----------
    drawn_B : Tensor
        One number in [0, 1) a row.

    Returns
    -------
    Tensor
        Token ids, (B,) int64.
    """
    # a stable sort of a whole vocabulary takes as long as a small model: mostly its first tokens are enough
    p_BV = (logits_BV.double() / temperature).softmax(-1)
    order_BK, sure_B1 = _largest(logits_BV, _LEADING)
    total_BK, last_B1 = _nucleus(p_BV, order_BK, top_p, top_k)
    if bool((last_B1 >= sure_B1).any()):
        order_BK = p_BV.sort(descending=True, stable=True).indices
        total_BK, last_B1 = _nucleus(p_BV, order_BK, top_p, top_k)
    target_B1 = drawn_B.to(total_BK)[:, None] * total_BK.gather(-1, last_B1)
    place_B1 = (total_BK <= target_B1).sum(-1, keepdim=True).minimum(last_B1)
    return order_BK.gather(-1, place_B1)[:, 0]


def _largest(logits_BV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The tokens of the largest logits in the order of a stable sort, and of how many that is sure, (B, 1).

    Those that are as large as the last of them may have been chosen from among more.
    """
    found_BK = logits_BV.topk(min(count, logits_BV.shape[-1]), -1).indices.sort(-1).values
    sorted_BK, place_BK = logits_BV.gather(-1, found_BK).sort(descending=True, stable=True)
    sure_B1 = (sorted_BK > sorted_BK[:, -1:]).sum(-1, keepdim=True)
    if count >= logits_BV.shape[-1]:
        sure_B1.fill_(logits_BV.shape[-1])
    return found_BK.gather(-1, place_BK), sure_B1


def _nucleus(p_BV: Tensor, order_BK: Tensor, top_p: float, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Cumulative probabilities of tokens in order, and where the nucleus ends, (B, 1)."""
    total_BK = p_BV.gather(-1, order_BK).cumsum(-1)
    last_B1 = (total_BK < top_p).sum(-1, keepdim=True)
    if top_k is not None:
        last_B1 = last_B1.clamp(max=top_k - 1)
    return total_BK, last_B1.clamp(max=total_BK.shape[-1] - 1)


class _Draw(LogitsProcessor):
    """Leaves greedy generation the token that `choose` drew."""

    def __init__(self, drawn_BT: Tensor, options: WritingOptions) -> None:
        self.drawn_BT, self.options, self.step = drawn_BT, options, 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        options = self.options
        ids = choose(scores, self.drawn_BT[:, self.step], options.temperature, options.top_p, options.top_k)
        self.step += 1
        return torch.full_like(scores, float("-inf")).scatter_(1, ids[:, None], 0.0)


class _Closed(StoppingCriteria):
    """Stops a row that ends in the closing."""

    def __init__(self, closing: Sequence[int], draw: _Draw) -> None:
        self.closing, self.draw = torch.tensor(closing), draw

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        size = len(self.closing)
        if self.draw.step < size:  # what is there from before counts for nothing
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return (input_ids[:, -size:] == self.closing.to(input_ids.device)).all(1)


@torch.no_grad()
def _draw(
    model: Any, encoder: Encoder, opening: Opening, drawn_BT: Tensor, options: WritingOptions
) -> list[list[int]]:
    """What a model writes behind an opening, once for each row of random numbers."""
    tokenizer, rows = encoder.tokenizer, len(drawn_BT)
    extra: dict[str, Any] = {}
    if encoder.encoder_decoder:  # the decoder goes on from the opening, and the encoder has read nothing
        given = [tokenizer.eos_token_id]
        ids = torch.tensor([[decoder_start(model), *opening.given]] * rows)
        extra["decoder_input_ids"] = ids.to(next(model.parameters()).device)
        before = ids.shape[1]
    else:
        given = opening.given
        before = len(opening.given)
    draw = _Draw(drawn_BT, options)
    with evaluating(model), plain_greedy(model, tokenizer, drawn_BT.shape[1]):
        output = model.generate(
            **prompts_for(model, tokenizer, [Encoded(given, [])] * rows),
            **extra,
            logits_processor=[draw],
            stopping_criteria=[_Closed(opening.closing, draw)],
        )
    return [list(ids) for ids in output[:, before:].tolist()]


@dataclass
class _Writing:
    """Rows on their way from a drawn prompt to one that is kept.

    Attributes
    ----------
    said : Transcript
        Of the model, batch by batch.
    known : collection of tuple of int
        The tokens of rows that must not come back.
    written : Written
        What becomes of them.
    """

    model: Any
    encoder: Encoder
    opening: Opening
    options: WritingOptions
    batch_size: int
    said: Transcript
    known: Collection[tuple[int, ...]]
    written: Written
    progress: Progress | None = None
    seen: set[tuple[int, ...]] = field(default_factory=set)

    @property
    def room(self) -> int:
        """How many tokens may follow the opening: no more than the template lets a prompt have."""
        template, opening = self.encoder.template, self.opening
        if opening.raw:
            return template.max_prompt_tokens + template.max_completion_tokens + 1
        rest = template.max_prompt_tokens - len(opening.shared)
        return max(1, rest) + (0 if opening.part_of_text else len(opening.closing))

    def drawn(self, writer: Any, drawn_BT: Tensor) -> list[list[int]]:
        """What is written behind the opening, a row for each of random numbers."""
        found: list[list[int]] = []
        for part_BT in drawn_BT.split(self.batch_size):
            found += self.said(partial(_draw, writer, self.encoder, self.opening, part_BT, self.options))
            self._tell("texts" if self.opening.raw else "prompts", len(found), len(drawn_BT))
        return found

    def sound_texts(self, texts: Sequence[list[int]]) -> Iterator[tuple[Example, Encoded]]:
        """The running texts that are whole and new; the others are counted."""
        encoder, written = self.encoder, self.written
        for ids in texts:
            end = _find(ids, [encoder.tokenizer.eos_token_id])
            text = _whole(encoder.text_of(ids[:end]), end)
            if end is None and self.options.cut != "kept":
                written.unfinished += 1
            elif not text.strip():
                written.empty += 1
            else:
                example = Example.text(text, ended=end is not None)
                row = encoder(example)
                if self._is_new(tuple(row.completion_ids)):
                    yield example, row

    def answered(self, prompts: Sequence[list[int]]) -> Iterator[tuple[Example, Encoded]]:
        """The prompts that are whole and new with greedy answers that are whole; the others are counted."""
        encoder, written = self.encoder, self.written
        rows = list(self._sound_prompts(prompts))
        chat = bool(rows) and encoder.asks_in_turns(rows[0][0].prompt)
        stops = encoder.stop_ids(chat=chat)
        for (example, row), ids in zip(rows, self._answers([row for _, row in rows], stops), strict=True):
            end = next((i for i, token in enumerate(ids) if token in stops), None)
            whole = ids if end is None else ids[: end + 1]
            text = _whole(encoder.answer_of(whole), end)
            if end is None and self.options.cut != "kept":
                written.unfinished += 1
            elif not text.strip():
                written.empty += 1
            else:
                answer = Example(example.prompt, text, ended=end is not None)
                yield answer, Encoded(row.prompt_ids, list(whole))

    def _sound_prompts(self, prompts: Sequence[list[int]]) -> Iterator[tuple[Example, Encoded]]:
        encoder, opening, written = self.encoder, self.opening, self.written
        limit = max(1, encoder.template.max_prompt_tokens - len(opening.shared))
        for ids in prompts:
            end = _find(ids, opening.closing)
            if end is None and opening.cut and encoder.tokenizer.eos_token_id not in ids:
                end = limit
            if end is None:
                written.unfinished += 1
                continue
            body = [*opening.shared, *ids[:end], *(opening.closing if opening.part_of_text else ())]
            if not encoder.text_of(ids[:end]).strip():
                written.empty += 1
                continue
            prompt = opening.prompt(encoder.text_of(body))
            row = encoder(Example(prompt, "?"))
            if self._is_new(tuple(row.prompt_ids)):
                yield Example(prompt, ""), row

    def _answers(self, rows: Sequence[Encoded], stops: Sequence[int]) -> list[list[int]]:
        """Greedy answers, in batches of all processes."""
        room = self.encoder.template.max_completion_tokens + self.encoder.completion_frame_size
        # of all, so that batches decide nothing
        room = min(rooms_for_answers(self.model, rows, room), default=room)
        found: list[list[int]] = [[] for _ in rows]
        done = 0
        for indices in by_length(rows, self.batch_size * world.size()):
            part = [rows[i] for i in indices]
            answers = self.said(partial(self._greedy, part, room, stops))
            for i, ids in zip(indices, answers, strict=True):
                found[i] = ids
            done += len(indices)
            self._tell("answers", done, len(rows))
        return found

    def _greedy(self, rows: Sequence[Encoded], room: int, stops: Sequence[int]) -> list[list[int]]:
        tokenizer, size = self.encoder.tokenizer, self.batch_size
        return greedy(self.model, tokenizer, rows, batch_size=size, max_new_tokens=room, stop_ids=stops)

    def keep_sure(self, sound: Sequence[tuple[Example, Encoded]]) -> None:
        """Keep rows with how likely the model finds them, but for those below what the options ask for."""
        options, written = self.options, self.written
        for first in range(0, len(sound), self.batch_size):
            part = sound[first : first + self.batch_size]
            rows = [row for _, row in part]
            sums = self.said(partial(self._likelihoods, rows))
            for (example, row), total in zip(part, sums, strict=True):
                mean = total / len(row.completion_ids)
                if options.unsure is not None and mean < options.unsure:
                    written.unsure += 1
                else:
                    written.rows.append(example)
                    written.confidence.append(mean)
            self._tell("likelihoods", first + len(part), len(sound))

    def _likelihoods(self, rows: Sequence[Encoded]) -> list[float]:
        found: list[float] = log_likelihoods(self.model, self.encoder.tokenizer, rows).tolist()
        return found

    def _is_new(self, key: tuple[int, ...]) -> bool:
        """Whether it is neither copied nor written before, which are counted; it is then seen."""
        if key in self.known:
            self.written.copied += 1
        elif key in self.seen:
            self.written.repeated += 1
        else:
            self.seen.add(key)
            return True
        return False

    def _tell(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            kept = min(len(self.written.rows), self.written.asked)
            self.progress(kept, self.written.asked, f"{what} {done} of {total}")


def _whole(text: str, end: int | None) -> str:
    """A text that was cut, without the piece of a letter that its last tokens may be."""
    return text if end is not None else text.rstrip("\N{REPLACEMENT CHARACTER}")


def _find(ids: Sequence[int], closing: Sequence[int]) -> int | None:
    """Where the closing begins; None where it isn't there."""
    size = len(closing)
    return next((i for i in range(len(ids) - size + 1) if tuple(ids[i : i + size]) == tuple(closing)), None)
