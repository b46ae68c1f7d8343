"""The one protocol of all strategies, their registry, and what the runner hands them.

A strategy is one paper in one file. It overrides the verbs that it needs and is called by the runner,
and by nothing else, in this order: `prepare` once; then for each stage `begin`, `examples`, during
training `attach`, `penalty` and `observe`, then `end`; for each evaluation `route`; after each stage
`state_dict`, and on resume `load_state_dict`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.config import Options
from holdfast.errors import ConfigError
from holdfast.importance import ImportancePrior, compute_prior
from holdfast.progress import Progress
from holdfast.protect import Handle
from holdfast.tasks.encode import Encoder
from holdfast.tasks.task import Example, Task, TaskStream


@dataclass(frozen=True)
class Stage:
    """One training of a run: usually one task, for joint training all of them."""

    name: str
    tasks: tuple[Task, ...]


@dataclass
class Context:
    """What a strategy may use.

    Attributes
    ----------
    folder : Path
        Where the current stage's artefacts go; it is committed as a whole when the stage is done.
    base_model : callable
        ``() -> model``: a fresh copy of the model as it was before the stream.
    fit : callable
        ``(model, examples, name) -> None``: plain fine-tuning with the run's training options.
    """

    model: Any
    tokenizer: Any
    encoder: Encoder
    stream: TaskStream
    seed: int
    progress: Progress
    folder: Path
    base_model: Callable[[], Any]
    fit: Callable[[Any, Sequence[Example], str], None]

    def importance(self, task: Task, options: Any, model: Any = None) -> ImportancePrior:
        """The prior of a model (by default the run's) for a task, saved in ``<folder>/prior``."""
        rows = self.encoder.many(task.train)
        with self.progress.bar(f"importance of {task.name}", total=len(rows)) as bar:
            prior = compute_prior(
                self.model if model is None else model,
                rows,
                options,
                pad_id=self.tokenizer.pad_token_id,
                seed=self.seed,
                task=task.name,
                progress=bar,
            )
        prior.save(self.folder / "prior")
        return prior


class Strategy:
    """Base of all strategies: every verb does nothing unless a strategy says otherwise."""

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    Options: ClassVar[type[Options]]
    rehearsal_free: ClassVar[bool] = True
    needs_task_identity: ClassVar[bool] = False

    def __init__(self, options: Any) -> None:
        self.options = options

    def stages(self, stream: TaskStream) -> list[Stage]:
        """The trainings of a run; one a task by default."""
        return [Stage(task.name, (task,)) for task in stream]

    def prepare(self, context: Context) -> None:
        """Called once, before anything is trained or resumed."""

    def begin(self, context: Context, stage: Stage) -> None:
        """Called before a stage is trained (again, if it was killed), with the weights it starts from."""

    def examples(self, stage: Stage) -> Sequence[Example]:
        """What the stage trains on."""
        return [example for task in stage.tasks for example in task.train]

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Sequence[Handle]:
        """Put protections on the optimizer; the handles are removed when the stage is trained."""
        return ()

    def penalty(self, model: nn.Module, batch: Mapping[str, Any], outputs: Any) -> Tensor | None:
        """A term added to the loss of a micro-batch."""
        return None

    def observe(self, model: nn.Module, step: int) -> None:
        """Look at the accumulated, clipped gradient once per optimizer step."""

    def end(self, context: Context, stage: Stage) -> None:
        """Called when a stage is trained: consolidate, and write artefacts into ``context.folder``."""

    def route(self, model: Any, task: str | None) -> Any:
        """The model that answers; `task` is given only if the strategy declares `needs_task_identity`."""
        return model

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next stage needs beyond the weights: tensors, and JSON-able values."""
        return {}, {}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""


STRATEGIES: dict[str, type[Strategy]] = {}
Class = TypeVar("Class", bound=type[Strategy])


def register(cls: Class) -> Class:
    """Class decorator: make a strategy known by its name."""
    if cls.name in STRATEGIES:
        raise ConfigError(f"two strategies are called '{cls.name}'")
    STRATEGIES[cls.name] = cls
    return cls
