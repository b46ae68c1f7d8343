"""Answers of a model: batched greedy generation, and ranking of a closed list of options."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast import world
from holdfast.models import context_length, evaluating, first_position, is_encoder_decoder, unwrapped
from holdfast.tasks.encode import Encoded, collate, collate_prompts

Progress = Callable[[int, int], None]
# rows, at most how many tokens each one's answer, what ends one, progress: greedy answers as token ids
Greedy = Callable[[Sequence[Encoded], Sequence[int], Sequence[int], Progress | None], list[list[int]]]
T = TypeVar("T")
_CELLS = 2**26  # numbers in the logits of one batch whose likelihoods are taken: a few are held at once


def by_length(rows: Sequence[Encoded], size: int) -> list[list[int]]:
    """Batches of indices, longest prompts first: little padding, and memory runs out early or never."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].prompt_ids))
    return [order[i : i + size] for i in range(0, len(order), size)]


def _of_all(answers: list[T]) -> list[T]:
    """The answers of all processes: each has those of its batches, and nothing for other rows.

    The batches are those of one process, so each answer is the same bit for bit whoever gives it.
    """
    if world.size() == 1:
        return answers
    return [max(given, key=len) for given in zip(*world.gather(answers), strict=True)]


def batch_for(
    model: nn.Module, tokenizer: Any, rows: Sequence[Encoded], side: Literal["right", "left"] = "right"
) -> dict[str, Tensor]:
    """Rows as a batch that the model takes, where the model is (`collate`)."""
    batch = collate(
        rows,
        tokenizer.pad_token_id,
        encoder_decoder=is_encoder_decoder(model),
        side=side,
        first_position=first_position(model),
    )
    return _to(model, batch)


def prompts_for(model: nn.Module, tokenizer: Any, rows: Sequence[Encoded]) -> dict[str, Tensor]:
    """Prompts as a batch that the model's ``generate`` takes, where the model is (`collate_prompts`)."""
    batch = collate_prompts(
        rows,
        tokenizer.pad_token_id,
        encoder_decoder=is_encoder_decoder(model),
        first_position=first_position(model) or None,  # from 0 it counts itself
    )
    return _to(model, batch)


def _to(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {k: v.to(device) for k, v in batch.items()}


def _unwrapping(model: Any) -> Iterator[Any]:
    """The model, and what each wrapper around it holds (prompts in front of an adapter on a base)."""
    model = unwrapped(model)  # what is compiled has its settings inside
    yield model
    while hasattr(model, "get_base_model"):
        model = model.get_base_model()
        yield model


def decoder_start(model: Any) -> int | None:
    """The token that an encoder-decoder model's decoder begins with."""
    *_, inner = _unwrapping(model)
    start = getattr(inner.generation_config, "decoder_start_token_id", None)
    return start if start is not None else getattr(inner.config, "decoder_start_token_id", None)


@contextmanager
def plain_greedy(
    model: Any, tokenizer: Any, max_new_tokens: int, stop_ids: Sequence[int] | None = None
) -> Iterator[None]:
    """Put the model's own generation settings aside.

    Passing a configuration to ``model.generate`` is not enough: what it leaves open (repetition penalty,
    suppressed tokens ...) is filled in from the model's own.
    """
    from transformers import GenerationConfig

    holders = [m for m in {id(m): m for m in _unwrapping(model)}.values() if "generation_config" in vars(m)]
    own = [m.generation_config for m in holders]
    plain = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id if stop_ids is None else list(stop_ids),
        bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=decoder_start(model),
    )
    try:
        for holder in holders:
            holder.generation_config = plain
        yield
    finally:
        for holder, config in zip(holders, own, strict=True):
            holder.generation_config = config


def rooms_for_answers(model: nn.Module, rows: Sequence[Encoded], wanted: int) -> list[int]:
    """How many tokens of an answer fit behind each row's prompt, at most `wanted` and at least one."""
    limit = context_length(model)
    if limit is None:
        return [wanted] * len(rows)
    taken = [0 if is_encoder_decoder(model) else len(row.prompt_ids) for row in rows]
    return [max(1, min(wanted, limit - tokens)) for tokens in taken]


def longer_than_context(model: nn.Module, rows: Sequence[Encoded]) -> list[int]:
    """Numbers of the rows, counted from 0, whose prompt alone has more tokens than the model takes."""
    limit = context_length(model)
    return [i for i, row in enumerate(rows) if limit is not None and len(row.prompt_ids) > limit]


def _by_room(rows: Sequence[Encoded], size: int, rooms: Sequence[int]) -> list[list[int]]:
    """As `by_length`, with rows that leave less room than others in batches of their own."""
    most = max(rooms, default=0)
    parts = [[i for i, room in enumerate(rooms) if (room < most) == short] for short in (True, False)]
    return [[part[i] for i in batch] for part in parts for batch in by_length([rows[i] for i in part], size)]


def _until(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """The tokens before the first that ends an answer (a decoder's start token may be such a one)."""
    end = next((i for i, token in enumerate(ids) if i and token in stop_ids), len(ids))
    return ids[:end]


def generate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    max_new_tokens: int,
    stop_ids: Sequence[int] | None = None,
    kept_ids: Collection[int] = (),
    progress: Progress | None = None,
    engine: Greedy | None = None,
) -> list[str]:
    """The texts of `greedy`'s answers, in the order of `rows`.

    Parameters
    ----------
    max_new_tokens : int
        At most; fewer where a prompt leaves less of the model's context, or one in the same batch does.
    stop_ids : sequence of int, optional
        Tokens that end an answer; the tokenizer's end token when omitted.
    kept_ids : collection of int
        Special tokens that are part of an answer. All others are left out.
    engine : callable, optional
        Gives the answers in place of `greedy`.
    """
    stop_ids = [tokenizer.eos_token_id] if stop_ids is None else list(stop_ids)
    dropped = {*tokenizer.all_special_ids, *stop_ids} - {*kept_ids}
    if engine is not None:
        answers = engine(rows, rooms_for_answers(model, rows, max_new_tokens), stop_ids, progress)
    else:
        answers = greedy(
            model,
            tokenizer,
            rows,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            progress=progress,
        )
    said = ([token for token in _until(ids, stop_ids) if token not in dropped] for ids in answers)
    return [tokenizer.decode(ids, skip_special_tokens=False).strip() for ids in said]


@torch.no_grad()
def greedy(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    max_new_tokens: int,
    stop_ids: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Greedy answers as token ids, in the order of `rows`; what follows an end token is padding.

    The key-value cache is used, nothing is sampled, and the model's own generation settings (sampling,
    penalties) are put aside: the same weights always give the same answers. `max_new_tokens` and
    `stop_ids` are those of `generate`.
    """
    encoder_decoder = is_encoder_decoder(model)
    answers: list[list[int]] = [[] for _ in rows]
    done = 0
    rooms = rooms_for_answers(model, rows, max_new_tokens)
    for indices in world.part(_by_room(rows, batch_size, rooms)):
        batch = prompts_for(model, tokenizer, [rows[i] for i in indices])
        room = min(rooms[i] for i in indices)
        with evaluating(model), plain_greedy(model, tokenizer, room, stop_ids):
            output = model.generate(**batch)
        start = 0 if encoder_decoder else batch["input_ids"].shape[1]
        for index, ids in zip(indices, output[:, start:].tolist(), strict=True):
            answers[index] = ids
        done += len(indices)
        if progress is not None:
            progress(min(done * world.size(), len(rows)), len(rows))
    return _of_all(answers)


@torch.no_grad()
def log_likelihoods(model: Any, tokenizer: Any, rows: Sequence[Encoded]) -> Tensor:
    """Log-likelihood of each row's answer given its prompt, summed over its tokens -> (S,).

    In one batch, or where the logits of all tokens would take too much memory in several.
    """
    longest = max(len(row.prompt_ids) + len(row.completion_ids) for row in rows)
    size = max(1, _CELLS // (longest * len(tokenizer)))
    with evaluating(model):
        parts = [_of_batch(model, tokenizer, rows[i : i + size]) for i in range(0, len(rows), size)]
    return torch.cat(parts)


def _of_batch(model: Any, tokenizer: Any, rows: Sequence[Encoded]) -> Tensor:
    encoder_decoder = is_encoder_decoder(model)
    batch = batch_for(model, tokenizer, rows)
    labels = batch["labels"]
    # without them no loss is computed; prompts that an input finds need them to tell it from the answer
    labelled = encoder_decoder or getattr(model, "reads_labels", False)
    inputs = batch if labelled else {k: v for k, v in batch.items() if k != "labels"}
    logits = model(**inputs).logits
    if not encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return -F.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none").sum(1)


def total_log_likelihoods(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> list[float]:
    """`log_likelihoods` of any number of rows, in their order."""
    totals, done = [0.0] * len(rows), 0
    for indices in by_length(rows, batch_size):
        found = log_likelihoods(model, tokenizer, [rows[i] for i in indices]).tolist()
        for index, total in zip(indices, found, strict=True):
            totals[index] = total
        done += len(indices)
        if progress is not None:
            progress(done, len(rows))
    return totals


@torch.no_grad()
def rank_options(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Encoded],
    options: Sequence[tuple[str, list[int]]],
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> list[str]:
    """For each prompt the option with the highest log-likelihood, summed over its tokens.

    Parameters
    ----------
    options : sequence of (text, token ids)
        The token ids are those of the whole completion, end token included.
    """
    answers = [""] * len(rows)
    done = 0
    for indices in world.part(by_length(rows, max(1, batch_size // len(options)))):
        pairs = [Encoded(rows[i].prompt_ids, ids, 0) for i in indices for _, ids in options]
        score_NO = log_likelihoods(model, tokenizer, pairs).view(len(indices), len(options))
        for index, best in zip(indices, score_NO.argmax(1).tolist(), strict=True):
            answers[index] = options[best][0]
        done += len(indices)
        if progress is not None:
            progress(min(done * world.size(), len(rows)), len(rows))
    return _of_all(answers)
