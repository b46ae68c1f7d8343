"""MIGU: only the output units with the largest outputs are updated (Du et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from holdfast.config import Options
from holdfast.hold import Handle
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.masks.units import OutputMask, linear_maps
from holdfast.strategies.protocol import Strategy, register


class MiguOptions(Options):
    """How much of each linear map is held at each step."""

    name: Literal["migu"] = "migu"
    masked: float = Field(
        0.7, ge=0, lt=1, description="share of a linear map's output units without gradient"
    )


@register
class Migu(Strategy):
    """Gradient mask by the L1-normalised size of linear maps' outputs, made anew at each step (section 3).

    n_i = |h_i| / sum_j |h_j| for the output h = W x of every linear map; the gradient of row i of W (and of
    its bias) is kept if n_i is above the `masked` quantile of that map. In the authors' code too 0.7 is the
    masked share, by a quantile in each map. As there, the gradient is masked, so under Adam a unit that was
    updated before drifts on with its momentum, and weight decay acts on all. That code differs in four
    things: it sums |h_i| over tokens without normalising, counts padding, masks the output head as well, and
    its scripts begin with the second task. Here it acts from the first task on.

    LoRA: A is rated by its output A x. B is rated by the output of the whole layer, W x + s B A x, as in the
    authors' scripts: rated by B A x alone, which is zero at the start, an arbitrary set of units would be the
    only one ever to learn. What isn't a linear map in a block (norms, embeddings, head) is not masked. The
    mask comes after clipping, so the clipped norm is that of the whole gradient. Extra state: none.
    """

    name = "migu"
    paper = "Du et al. 2024, arXiv 2406.17245"
    summary = "each step updates only the output units with the largest outputs"
    Options = MiguOptions

    def check(self, model: nn.Module) -> None:
        """See that linear maps are trained."""
        linear_maps(model)

    def begin(self, context: Context, stage: Stage) -> None:
        """Start without anything seen."""
        self.mask = OutputMask(self.options.masked)

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Sequence[Handle]:
        """Watch the outputs and mask every step."""
        return [self.mask.attach(model, optimizer)]

    def watch(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Tell tokens from padding."""
        self.mask.watch(batch)
