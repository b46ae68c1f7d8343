"""What a learner hands to a strategy and to a training loop, without a learner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast.models import is_encoder_decoder
from holdfast.progress import Progress
from holdfast.strategies import Context, Stage
from holdfast.tasks import Encoder, TaskStream, Template, toy_tokenizer
from holdfast.training.verbs import Verbs

TOKENIZER = toy_tokenizer()


def never(*args: Any, **values: Any) -> Any:
    raise AssertionError("this strategy trains no other model")


def context_of(model: Any, folder: Path = Path("/nowhere"), **values: Any) -> Context:
    """A whole context; `folder` must be given where a strategy writes into it."""
    encoder = Encoder(TOKENIZER, Template(), encoder_decoder=is_encoder_decoder(model))
    rest = {
        "seed": 0,
        "progress": Progress(quiet=True),
        "base_model": never,
        "fit": never,
        "write": never,
        **values,
    }
    return Context(model=model, tokenizer=TOKENIZER, encoder=encoder, folder=folder, **rest)


def stage_of(stream: TaskStream, number: int) -> Stage:
    """One task of a stream, from 0."""
    task = stream.tasks[number]
    return Stage(task.name, (task,), number, len(stream))


def verbs(**functions: Callable[..., Any]) -> Verbs:
    """Verbs that call these functions, without a ``self``."""
    return type("OfTest", (Verbs,), {name: staticmethod(f) for name, f in functions.items()})()
