"""What can't be learned under an engine that cuts weights up (FSDP2, DeepSpeed ZeRO): said beforehand."""

from __future__ import annotations

from typing import Any

from holdfast import world
from holdfast.errors import ConfigError
from holdfast.models import quantisation_of
from holdfast.strategies import STRATEGIES, Strategy
from holdfast.tasks.memory import Rehearsal


def check_engine(model: Any, strategy: Strategy, replay: Rehearsal | None) -> None:
    """See that a model and a method can be trained under the engine that the launcher chose, if it chose one.

    Raises
    ------
    ConfigError
        Weights are quantised, or the method or its memory needs whole ones.
    """
    engine = world.engine()
    if engine is None:
        return
    if quantisation_of(model) is not None:
        raise ConfigError(
            f"Learner: the launcher chose {engine}, which cuts weights up, and this model's are "
            "quantised. Use DDP (configs/accelerate/ddp.yaml), or the model's full weights."
        )
    rehearsal = replay or strategy.rehearsal
    if rehearsal is not None and rehearsal.targets == "logits":
        raise ConfigError(
            f"Learner: the launcher chose {engine}, and `targets: logits` puts the weights from before a "
            "task, which are whole ones, into a model in parts. Use `targets: text`, or DDP."
        )
    if not strategy.sharded:
        works = ", ".join(name for name, method in STRATEGIES.items() if method.strategy.sharded)
        raise ConfigError(
            f"Learner: the launcher chose {engine}, under which a process has a part of each weight "
            f"alone, and '{strategy.name}' needs whole ones. Allowed there: {works}; or DDP "
            "(configs/accelerate/ddp.yaml)."
        )
