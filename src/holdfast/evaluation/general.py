"""How far a model has moved from its base: KL(base || now) on fixed rows, without a second model in memory.

The rows are the base's own (`own_rows`), kept as text, or those of a new task. The base's answers to them are
kept as log-probabilities of some tokens (`Answers`), so later only the model itself is asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from holdfast.evaluation.answers import batch_for, prompts_for
from holdfast.models import accepts, evaluating, is_encoder_decoder
from holdfast.storage import write_tensors, write_text
from holdfast.tasks.encode import Encoded
from holdfast.tasks.task import Example

ROWS, ANSWERS = "rows.jsonl", "base.safetensors"
TOP = 64  # likeliest tokens whose log-probability the base's answers keep
DRAWN = 32  # of the other tokens, drawn by their probability
WHOLE = 256  # a vocabulary up to this size is kept whole
LENGTH = 64  # tokens that the base writes at a time: a continuation, a user's turn, an answer
_CELLS = 32_000_000  # numbers in the logits of one batch


@dataclass(frozen=True)
class Divergence:
    """A mean KL(base || now) per token, in nats.

    Attributes
    ----------
    kl : float
    error : float
        Two standard errors of it, from drawing the base's unlikely tokens; 0 where all were kept.
    tokens : int
    """

    kl: float
    error: float
    tokens: int


@dataclass(frozen=True)
class Answers:
    """The base's distributions at N answer tokens: the likeliest tokens, and a draw of the others.

    KL(base || now) = Σ_top p ln(p / q) + r E[ln(p / q)], where r is the probability of all others and the
    mean is over the others by their probability. The first part is exact and the second a mean over the draw,
    so the estimate has no bias and its standard error is known.

    Attributes
    ----------
    top_ids_NK, drawn_ids_NM : Tensor
        int32; M is 0 where K is the whole vocabulary.
    top_NK, drawn_NM : Tensor
        float32: their log-probabilities.
    """

    top_ids_NK: Tensor
    top_NK: Tensor
    drawn_ids_NM: Tensor
    drawn_NM: Tensor

    @classmethod
    def of(
        cls,
        logits_NV: Tensor,
        generator: torch.Generator,
        top: int = TOP,
        drawn: int = DRAWN,
        whole: int = WHOLE,
    ) -> Answers:
        """What is kept of some logits."""
        log_p_NV = F.log_softmax(logits_NV.float(), dim=-1).cpu()
        size = log_p_NV.shape[-1]
        top_NK, ids_NK = log_p_NV.topk(size if size <= max(whole, top) else top, dim=-1)
        if ids_NK.shape[1] == size:
            return cls(ids_NK.int(), top_NK, ids_NK[:, :0].int(), top_NK[:, :0])
        others_NV = log_p_NV.scatter(1, ids_NK, float("-inf")).exp()
        # a floor that is never drawn but where nothing else has any probability
        drawn_NM = torch.multinomial(others_NV + 1e-30, drawn, replacement=True, generator=generator)
        return cls(ids_NK.int(), top_NK, drawn_NM.int(), log_p_NV.gather(1, drawn_NM))

    def divergence(self, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """KL(base || now) of each token and its squared standard error, both (N,) float64."""
        normaliser_N1 = logits_NV.float().logsumexp(-1, keepdim=True)

        def ratios(ids: Tensor, log_p: Tensor) -> Tensor:
            log_q = logits_NV.gather(1, ids.long().to(logits_NV.device)).float() - normaliser_N1
            return log_p.double() - log_q.cpu().double()

        p_NK = self.top_NK.double().exp()
        kl_N = (p_NK * ratios(self.top_ids_NK, self.top_NK)).sum(-1)
        if not self.drawn_ids_NM.shape[1]:
            return kl_N, torch.zeros_like(kl_N)
        others_N = (1 - p_NK.sum(-1)).clamp(min=0)
        drawn_NM = ratios(self.drawn_ids_NM, self.drawn_NM)
        square_N = others_N.square() * drawn_NM.var(-1) / drawn_NM.shape[1]
        return kl_N + others_N * drawn_NM.mean(-1), square_N

    def part(self, start: int, stop: int) -> Answers:
        """Those of some of the tokens."""
        return Answers(*(t[start:stop] for t in vars(self).values()))


def own_rows(model: Any, tokenizer: Any, count: int, seed: int, batch_size: int = 64) -> list[Example]:
    """Rows that a model writes itself, sampled at temperature 1.

    A tokenizer with a chat template: user turns, written from the template's opening, and answers to them.
    Otherwise continuations of the begin token (of the end token, where there is no other).

    Parameters
    ----------
    count : int
        How many; fewer come back where what it writes stays empty.
    seed : int
        The same weights and seed give the same rows. Nothing else is drawn from torch's generator.

    Returns
    -------
    list of Example
        With an empty prompt, or one user turn.
    """
    opening = _chat_opening(tokenizer)
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    start = [begin] if opening is None else opening
    device = next(model.parameters()).device
    rows: list[Example] = []
    devices = [device] if device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for _ in range(4):  # what is empty is written anew
            if missing := count - len(rows):
                for first in range(0, missing, batch_size):
                    rows += _some_rows(
                        model, tokenizer, start, opening is not None, min(batch_size, missing - first)
                    )
    return rows


def _some_rows(model: Any, tokenizer: Any, start: list[int], chat: bool, count: int) -> list[Example]:
    texts = [text for text in _written(model, tokenizer, [start] * count) if text.strip()]
    if not chat:
        return [Example("", text) for text in texts]
    turns: list[Any] = [({"role": "user", "content": text},) for text in texts]
    answers = (
        _written(model, tokenizer, [_prompt_ids(turn, tokenizer, False) for turn in turns]) if turns else []
    )
    return [Example(turn, text) for turn, text in zip(turns, answers, strict=True) if text.strip()]


def _chat_opening(tokenizer: Any) -> list[int] | None:
    """The tokens of the chat template before a first user turn's text; None without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    mark = "\u241e"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer(text.partition(mark)[0], add_special_tokens=False)["input_ids"])


@torch.no_grad()
def _written(model: Any, tokenizer: Any, prompts: Sequence[list[int]]) -> list[str]:
    """What the model samples behind some prompts, up to the first special token."""
    encoder_decoder = is_encoder_decoder(model)
    batch = prompts_for(model, tokenizer, [Encoded(ids, []) for ids in prompts])
    output = model.generate(
        **batch,
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_beams=1, max_new_tokens=LENGTH,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    before = 1 if encoder_decoder else batch["input_ids"].shape[1]
    special = set(tokenizer.all_special_ids)
    texts = []
    for ids in output[:, before:].tolist():
        end = next((i for i, token in enumerate(ids) if token in special), len(ids))
        texts.append(tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
    return texts


def encode_own(rows: Sequence[Example], tokenizer: Any, encoder_decoder: bool) -> list[Encoded]:
    """Rows of `own_rows` as token ids; those whose text makes no tokens are left out."""
    encoded = [
        Encoded(
            _prompt_ids(row.prompt, tokenizer, encoder_decoder),
            list(tokenizer(row.completion, add_special_tokens=False)["input_ids"]),
        )
        for row in rows
    ]
    return [row for row in encoded if row.completion_ids]


def _prompt_ids(prompt: Any, tokenizer: Any, encoder_decoder: bool) -> list[int]:
    if isinstance(prompt, str):
        begin = tokenizer.bos_token_id
        return [tokenizer.eos_token_id if begin is None or encoder_decoder else begin]
    rendered = tokenizer.apply_chat_template(
        [dict(turn) for turn in prompt], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return list(rendered["input_ids"])


@torch.no_grad()
def predictions(model: Any, tokenizer: Any, rows: Sequence[Encoded]) -> Iterator[Tensor]:
    """A model's logits where the rows' answer tokens are predicted, batch by batch, each (n, V)."""
    encoder_decoder = is_encoder_decoder(model)
    longest = max((len(row.completion_ids) for row in rows), default=0)
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    size = max(1, min(64, _CELLS // (longest * config.vocab_size + 1)))
    with evaluating(model):
        for first in range(0, len(rows), size):
            side: Literal["right", "left"] = "right" if encoder_decoder else "left"
            batch = batch_for(model, tokenizer, rows[first : first + size], side)
            labels = batch["labels"]
            if encoder_decoder:
                yield model(**batch).logits[labels != -100]
                continue
            if not getattr(model, "reads_labels", False):
                del batch["labels"]
            keep = max(len(row.completion_ids) for row in rows[first : first + size]) + 1
            extra: dict[str, Any] = {"logits_to_keep": keep} if accepts(model, "logits_to_keep") else {}
            logits = model(**batch, use_cache=False, **extra).logits[:, -keep:-1]
            yield logits[labels[:, -keep:][:, 1:] != -100]


def ask_base(base: Any, tokenizer: Any, rows: Sequence[Encoded], **kept: int) -> Answers:
    """What a base answers to some rows; `kept` are those of `Answers.of`."""
    draw = torch.Generator().manual_seed(0)  # the same rows give the same answers
    parts = [vars(Answers.of(logits, draw, **kept)).values() for logits in predictions(base, tokenizer, rows)]
    return Answers(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def ask_own(
    base: Any, tokenizer: Any, count: int, seed: int
) -> tuple[list[Example], list[Encoded], Answers] | None:
    """Let a base write rows and ask it them: the rows, as token ids, and its answers; None if it writes none.

    Parameters are those of `own_rows`.
    """
    rows = own_rows(base, tokenizer, count, seed)
    encoded = encode_own(rows, tokenizer, is_encoder_decoder(base))
    return (rows, encoded, ask_base(base, tokenizer, encoded)) if encoded else None


def divergence(model: Any, tokenizer: Any, rows: Sequence[Encoded], base: Answers) -> Divergence:
    """How far a model is from its base on some rows."""
    total = square = 0.0
    done = 0
    for logits in predictions(model, tokenizer, rows):
        kl_N, square_N = base.part(done, done + len(logits)).divergence(logits)
        total, square, done = total + float(kl_N.sum()), square + float(square_N.sum()), done + len(logits)
    return Divergence(max(total, 0.0) / done, 2 * square**0.5 / done, done)


def save_own(folder: Path, rows: Sequence[Example], answers: Answers) -> None:
    """Keep a base's rows, as text, and its answers; the rows come last, so where they are all is."""
    write_tensors(folder / ANSWERS, vars(answers))
    write_text(folder / ROWS, "".join(json.dumps(r.record(), ensure_ascii=False) + "\n" for r in rows))


def load_own(folder: Path) -> tuple[list[Example], Answers] | None:
    """What `save_own` kept; None where there is nothing."""
    if not (folder / ROWS).is_file():
        return None
    rows = Example.of_lines((folder / ROWS).read_text(encoding="utf-8"))
    return rows, Answers(**load_file(folder / ANSWERS))
