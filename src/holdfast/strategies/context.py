"""What a learner hands to a strategy: the stage it is in, and all that it may use."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from holdfast.errors import DataError, NoCorrectSampleError
from holdfast.importance import ImportancePrior, compute_prior
from holdfast.models.adapters import under_adapter
from holdfast.progress import Progress
from holdfast.tasks.encode import Encoder
from holdfast.tasks.memory import Write
from holdfast.tasks.task import Task


@dataclass(frozen=True)
class Stage:
    """One training: usually one task, for joint training all of them.

    Attributes
    ----------
    name : str
    tasks : tuple of Task
    index : int
        How many stages were learned before this one.
    total : int or None
        How many there will be; None where nobody knows.
    """

    name: str
    tasks: tuple[Task, ...]
    index: int = 0
    total: int | None = None

    @property
    def first(self) -> bool:
        """Whether nothing was learned before."""
        return self.index == 0


@dataclass
class Context:
    """What a strategy may use.

    Attributes
    ----------
    folder : Path
        Where the current stage's artefacts go; it is committed as a whole when the stage is done.
    base_model : callable
        ``() -> model``: a fresh copy of the model as it was before the first stage.
    fit : callable
        ``(model, examples, name, verbs=None, epochs=None) -> None``: another training, with the learner's
        options. It is not resumed by itself: a killed stage goes through its `end` again.
    write : callable
        ``(task, options) -> examples``: rows that the model, as it stands, writes of a task which it has just
        learned (`holdfast.tasks.memory.Memory.add` takes it); they are kept as text in `folder` too.
    """

    model: Any
    tokenizer: Any
    encoder: Encoder
    seed: int
    progress: Progress
    folder: Path
    base_model: Callable[[], Any]
    fit: Callable[..., None]
    write: Write

    def check_rateable(self, task: Task, options: Any, *, whole: bool = False) -> None:
        """Rate one row of a task, so that a model whose operations have no rule is refused before training.

        Raises
        ------
        ModelError
            The importance is not defined for this model.
        """
        few = (DataError, NoCorrectSampleError)  # one row may say too little; here only the model counts
        with suppress(*few), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compute_prior(
                self.model,
                self.encoder.many(task.train[:1]),
                options,
                pad_id=self.tokenizer.pad_token_id,
                seed=self.seed,
                parameters=under_adapter(self.model) if whole else None,
            )

    def importance(
        self,
        task: Task,
        options: Any,
        model: Any = None,
        *,
        whole: bool = False,
        parameters: Mapping[str, nn.Parameter] | None = None,
        folder: str = "prior",
    ) -> ImportancePrior:
        """The prior of a model (by default the run's) for a task, saved in the stage's folder.

        Parameters
        ----------
        whole : bool
            Of the maps that an adapter adapts, each with its adapter, in place of what is trained.
        parameters : mapping of str to Parameter, optional
            What to rate; by default all that the importance can.
        folder : str
            Its name below the stage's.
        """
        rows, model = self.encoder.many(task.train), self.model if model is None else model
        with self.progress.bar(f"importance of {task.name}", total=len(rows)) as bar:
            prior = compute_prior(
                model,
                rows,
                options,
                pad_id=self.tokenizer.pad_token_id,
                seed=self.seed,
                task=task.name,
                parameters=under_adapter(model) if whole else parameters,
                progress=bar,
            )
        if whole:
            prior.meta["whole_maps"] = True
        prior.save(self.folder / folder)
        return prior
