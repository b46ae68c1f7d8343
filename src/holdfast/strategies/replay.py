"""Experience replay: a few examples of earlier tasks among those of the new one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from holdfast.strategies.context import Context, Stage
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.memory import Rehearsal, RehearsalOptions
from holdfast.tasks.task import Example


class ReplayOptions(RehearsalOptions):
    """The same choices as in the run config's ``replay:`` section."""

    name: Literal["replay"] = "replay"


@register
class Replay(Strategy):
    """Sequential training with a rehearsal memory; nothing else holds the weights.

    After each task the memory keeps 2 % of its rows (K, section VI: 2 % for its replay baselines), and of
    what a later task trains on `ratio` are old rows, in random order. The share of old rows is ours: 0.2. The
    paper puts a batch of old rows beside each batch of new ones: `mixing: batches` with `ratio: 0.5`; of
    its memories the reservoir is here (`sampling: reservoir`), the ring buffer of each class isn't.
    Any other rehearsal-free strategy is combined with the same memory by the run config's ``replay:``.
    """

    name = "replay"
    paper = "Chaudhry et al. 2019, arXiv 1902.10486"
    summary = "trains on a few kept examples of every earlier task as well"
    Options = ReplayOptions
    sharded = True
    rehearsal_free = False
    state = "per task"
    ends_untrained = True

    def __init__(self, options: ReplayOptions) -> None:
        super().__init__(options)
        self.rehearsal: Rehearsal = Rehearsal(options)

    def examples(self, context: Context, stage: Stage) -> Sequence[Example]:
        """The stage's own rows, and old ones."""
        return self.rehearsal.mixed(super().examples(context, stage), context.seed)

    def end(self, context: Context, stage: Stage) -> None:
        """Keep a few rows of what was learned, or let the model write some."""
        self.rehearsal.learned(stage.tasks, context.seed, context.write)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The memory."""
        return {}, {"memory": self.rehearsal.memory.state_dict()}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take the memory back."""
        self.rehearsal.memory.load_state_dict(values["memory"])
