"""The one protocol of all strategies, and their registry.

A strategy is one paper in one file or one folder. It overrides the verbs that it needs and is called by
`holdfast.Learner`, and by nothing else, in this order: `check` and `prepare` once, and `check_tasks` as soon
as tasks are known (by ``holdfast check``: `check`, `check_tasks`, `estimate`); then for each stage `begin`,
`examples`, during training the verbs of `holdfast.training.verbs.Verbs`, then `end`; for each evaluation
`route`; after each stage `state_dict`, and when a learner goes on `load_state_dict`. It never needs to know
what comes later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor, nn

from holdfast.config import Options
from holdfast.errors import ConfigError
from holdfast.hold.cost import Estimate
from holdfast.models import save_model
from holdfast.strategies.context import Context, Stage
from holdfast.tasks.encode import Encoder
from holdfast.tasks.memory import Rehearsal
from holdfast.tasks.task import Example, Task, TaskStream
from holdfast.training.verbs import Verbs

Extra = Literal["none", "constant", "per task"]


class Strategy(Verbs):
    """Base of all strategies: every verb does nothing unless a strategy says otherwise.

    Attributes
    ----------
    name, paper, summary : str
        How configs call it, where it is from, and what it does in a line.
    Options : type
        Its section of a config. What is declared below holds for its defaults.
    rehearsal_free : bool
        It never reads an example of an earlier task again.
    needs_task_identity : bool
        `route` must be told which task an input belongs to.
    writes : bool
        It trains on rows of earlier tasks that the model has written itself, and learns to write them.
    state : str
        What is kept between tasks beside a model of the size it had at the start: nothing, as much whatever
        the number of tasks, or more with each task.
    inference : str
        What an answer costs beside that of the plain model, in the same terms.
    ends_untrained : bool
        `end` makes what it keeps from a task's rows and the weights as they stand. Such a strategy can be
        told of a task that nobody trained: of the base (``protect_base``).
    sharded : bool
        What it does while a task is trained works where each process has a part of each weight alone.
    open_ended : bool
        Its stages need not know how many there will be (`Stage.total`).
    changes_base : bool
        With an adapter: the weights under it change too, so without it the model is not what it was.
    begins_as_before : bool
        While a task is trained, its weights from before make it answer as it did before: they are the teacher
        of a memory's ``targets: logits``.
    in_context : bool
        Rows of earlier tasks are written behind kept ones, by a model that has not learned to.
    optimizer : str or None
        The only ``training.optimizer`` that it works with, if it asks for one.
    rehearsal : Rehearsal or None
        The memory that `examples` mixes in, if it does: `holdfast check` counts its rows.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    Options: ClassVar[type[Options]]
    rehearsal_free: ClassVar[bool] = True
    needs_task_identity: ClassVar[bool] = False
    writes: ClassVar[bool] = False
    state: ClassVar[Extra] = "none"
    inference: ClassVar[Extra] = "none"
    ends_untrained: ClassVar[bool] = False
    rehearsal: Rehearsal | None = None
    sharded: bool = False
    open_ended: bool = True
    changes_base: bool = False
    begins_as_before: ClassVar[bool] = True
    in_context: ClassVar[bool] = False
    optimizer: ClassVar[str | None] = None

    def __init__(self, options: Any) -> None:
        self.options = options

    def stages(self, stream: TaskStream) -> list[Stage]:
        """The trainings that a stream which is known beforehand takes; one a task by default."""
        return [Stage(task.name, (task,), i, len(stream)) for i, task in enumerate(stream)]

    def check(self, model: nn.Module) -> None:
        """Raise a `HoldfastError` that names the key if the method is not defined for this model."""

    def check_tasks(self, tasks: Sequence[Task], encoder: Encoder) -> None:
        """The same, of tasks that are to be learned behind those that were; before anything is trained."""

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """What it takes beside plain training, for `holdfast check`."""
        return Estimate()

    def prepare(self, context: Context) -> None:
        """Called once, before anything is trained or resumed; may wrap or replace ``context.model``."""

    def begin(self, context: Context, stage: Stage) -> None:
        """Called before a stage is trained (again, if it was killed), with the weights it starts from."""

    def examples(self, context: Context, stage: Stage) -> Sequence[Example]:
        """What the stage trains on."""
        return [example for task in stage.tasks for example in task.train]

    def extra_rows(self, stage: Stage) -> int:
        """How many rows `examples` adds to the stage's own at most; those of a `rehearsal` aside."""
        return 0

    def end(self, context: Context, stage: Stage) -> None:
        """Called when a stage is trained: consolidate, and write artefacts into ``context.folder``."""

    def route(self, model: Any, task: str | None) -> Any:
        """The model that answers; `task` is given only if the strategy declares `needs_task_identity`."""
        return model

    def export(self, context: Context, folder: Path) -> None:
        """Write the model that answers as a plain Hugging Face folder: weights, or a PEFT adapter.

        Raises
        ------
        ConfigError
            What answers can't be written so.
        """
        save_model(context.model, context.tokenizer, folder)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next stage needs beyond the weights: tensors, and JSON-able values."""
        return {}, {}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""


@dataclass(frozen=True)
class Method:
    """A strategy under the name that a config calls it by, with what it declares for its default options.

    Attributes
    ----------
    strategy : type
        What is built. Presets are several methods of one strategy: other defaults, nothing else.
    """

    name: str
    paper: str
    summary: str
    Options: type[Options]
    rehearsal_free: bool
    needs_task_identity: bool
    writes: bool
    state: Extra
    inference: Extra
    ends_untrained: bool
    strategy: type[Strategy]

    def __call__(self, options: Any) -> Strategy:
        """The strategy with these options."""
        return self.strategy(options)


STRATEGIES: dict[str, Method] = {}
Class = TypeVar("Class", bound=type[Strategy])


def register(cls: Class) -> Class:
    """Class decorator: make a strategy known by its name."""
    declared = {f.name: getattr(cls, f.name) for f in fields(Method) if f.name != "strategy"}
    _add(Method(**declared, strategy=cls))
    return cls


def preset(of: str, **declarations: Any) -> None:
    """Make a strategy known by one more name, with an Options of its own and whatever else differs."""
    _add(replace(STRATEGIES[of], **declarations))


def _add(method: Method) -> None:
    if method.name in STRATEGIES:
        raise ConfigError(f"two strategies are called '{method.name}'")
    STRATEGIES[method.name] = method
