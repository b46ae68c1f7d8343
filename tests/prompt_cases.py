"""Small models with other positions each, rows of different lengths, and strategies that train prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import contexts
from contexts import context_of
from holdfast.config import validate
from holdfast.models import digest
from holdfast.strategies import STRATEGIES, Stage, Strategy, build_strategy
from holdfast.tasks import Encoder, Template, toy_suite, toy_tokenizer
from holdfast.tasks.encode import Encoded, collate
from holdfast.training.loop import train
from holdfast.training.options import TrainingOptions
from tiny_models import tiny_model

__all__ = ["context_of"]  # for those who take everything from here
TOKENIZER = toy_tokenizer()
PAD = TOKENIZER.pad_token_id
STREAM = toy_suite(["copy", "flip", "head"], 8, 2)
KINDS = ["llama", "gpt2", "bloom", "t5"]  # rotary, learned, ALiBi (no position_ids) and relative positions
BOTH = ["prog-prompt", "l2p"]


def model_of(kind: str, noise: float = 0.2) -> Any:
    model = tiny_model(kind)
    if kind == "llama":
        return model
    torch.manual_seed(0)
    for p in model.parameters():  # so that all answers differ, and depend on the prompts
        p.data += noise * torch.randn_like(p)
    return model


def rows_of(kind: str, task: int = 0) -> list[Encoded]:
    """Prompts of different lengths, so that batches have padding."""
    rows = Encoder(TOKENIZER, Template(), encoder_decoder=kind == "t5").many(STREAM.tasks[task].train)
    return [Encoded(r.prompt_ids[: len(r.prompt_ids) - i % 4], r.completion_ids) for i, r in enumerate(rows)]


def batch_of(kind: str, rows: list[Encoded], side: Any = None) -> dict[str, Tensor]:
    side = side or ("right" if kind == "t5" else "left")
    batch = collate(rows, PAD, encoder_decoder=kind == "t5", side=side)
    if kind == "bloom":
        batch.pop("position_ids")
    return batch


def strategy_of(name: str, **values: Any) -> Strategy:
    return build_strategy(validate(STRATEGIES[name].Options, {"name": name, **values}, "test"))


def stage_of(number: int) -> Stage:
    return contexts.stage_of(STREAM, number)


def fit(strategy: Strategy, kind: str, model: Any, rows: list[Encoded], folder: Path, **options: Any) -> Any:
    """A training without the runner; returns the losses."""
    options = {"max_steps": 3, "batch_size": 4, "learning_rate": 0.01, "log_steps": 1, **options}
    record = train(
        model,
        rows,
        TrainingOptions(**options),
        tokenizer=TOKENIZER,
        folder=folder / "checkpoints",
        seed=0,
        verbs=strategy,
    )
    return [loss for _, loss in record.loss]


def constant(prompt_ND: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda ids, asked: prompt_ND.expand(len(ids), -1, -1)


def trace(model: Any) -> Any:
    """All that an attachment might leave behind."""
    return (
        digest(model),
        sorted(model.state_dict()),
        [p.requires_grad for p in model.parameters()],
        len(model._forward_hooks) + len(model._forward_pre_hooks),
        model.training,
        id(model.generation_config),
    )


def knowing(name: str) -> Strategy:
    """A strategy with some prompts, without having learned them."""
    strategy = strategy_of(name)
    if name == "prog-prompt":
        strategy.load_state_dict({"copy": torch.randn(5, 16)}, {"tasks": ["copy"]})
    else:
        pool = {"prompts": torch.randn(10, 2, 16), "keys": torch.randn(10, 16), "counts": torch.zeros(10)}
        strategy.load_state_dict(pool, {})
    return strategy
