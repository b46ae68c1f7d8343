"""OGD: steps are orthogonal to the gradients of earlier tasks' outputs (Farajtabar et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.config import Options
from holdfast.hold import Directions, Handle, Project
from holdfast.hold.cost import Cost, Estimate, trained_bytes
from holdfast.importance.logit_gradient import logit_gradient
from holdfast.importance.prior import trained_parameters
from holdfast.importance.seeding import sample
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.task import TaskStream


class OgdOptions(Options):
    """Whose gradients are kept, and what is projected off them."""

    name: Literal["ogd"] = "ogd"
    samples: int = Field(100, ge=1, description="kept gradients of each task (each 4 bytes a weight)")
    target: Literal["all", "first"] = Field(
        "all", description="a row's output: the sum of its answer tokens' logits, or the first one's"
    )
    on: Literal["update", "gradient"] = Field(
        "update", description="what is projected: the change of the weights, or the gradient (the paper)"
    )


@register
class Ogd(Strategy):
    """No step of a later task moves the weights along the gradients of earlier answers' logits.

    After a task, of each of `samples` rows the gradient of f = the sum of its true tokens' logits (OGD-GTL;
    of logits, not of the loss, which is flat after training) is orthonormalised against all before it. In
    later tasks g <- g - sum_k (q_k . g) q_k over all tasks' q_k, once a step, after clipping. All that is
    trained is projected. Paper: 200 samples, SGD, classifiers; the sum over an answer's tokens is ours, as
    is `target: first`. OGD-ALL (a direction for every logit) and OGD-AVE (for their mean) are not offered.

    Under AdamW a step is not orthogonal though its gradient is. By default, therefore, the weights' change
    since the task began is projected after each step: the same under SGD, and exact with all. A first-order
    method: it keeps what a small step would change, so it wants a small learning rate and many samples
    (figures in docs/log.md).

    Extra state: 4 bytes x samples x trained weights with EVERY task (100 samples of 1 M weights: 400 MB), on
    disk, and in memory while training; each step reads it twice. Full fine-tuning of a large model: too much.
    """

    name = "ogd"
    paper = "Farajtabar et al. 2020, arXiv 1910.07104"
    summary = "steps are orthogonal to the gradients of earlier tasks' true logits"
    Options = OgdOptions
    state = "per task"
    ends_untrained = True

    def __init__(self, options: OgdOptions) -> None:
        super().__init__(options)
        self.directions = Directions()
        self.added: list[int] = []  # directions of each task

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """All directions that the last task must keep to, on the disk too after every task."""
        count = self.options.samples * (len(stream) - 1)
        return Estimate([Cost("directions of earlier tasks (float32)", count * trained_bytes(model, 4))])

    def begin(self, context: Context, stage: Stage) -> None:
        """Keep the weights that the stage starts from: the change from them is what stays orthogonal."""
        self._start = {}
        if len(self.directions) and self.options.on == "update":
            self._start = {n: p.detach().clone() for n, p in trained_parameters(context.model).items()}

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Sequence[Handle]:
        """Project every step."""
        hold = Project(self.directions, on=self.options.on, reference=self._start or None)
        return [hold.attach(model, optimizer)]

    def end(self, context: Context, stage: Stage) -> None:
        """Keep the directions of this task's true logits."""
        self._start = {}
        (task,) = stage.tasks
        rows = context.encoder.many(sample(task.train, self.options.samples, context.seed))

        def gradients() -> Iterator[dict[str, Tensor]]:
            with context.progress.bar(f"gradients of {task.name}", total=len(rows)) as bar:
                for done, row in enumerate(rows):
                    bar(done)
                    yield logit_gradient(
                        context.model, row, context.tokenizer.pad_token_id, self.options.target
                    )

        self.added.append(self.directions.extend(gradients(), len(rows)))

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All directions, and how many are of each task."""
        return dict(self.directions.directions), {"directions": self.added}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take them back."""
        # copies: a product's last bits depend on how memory is aligned, and a file's is aligned otherwise
        self.directions = Directions({name: rows.clone() for name, rows in tensors.items()})
        self.added = list(values["directions"])
