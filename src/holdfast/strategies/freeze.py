"""Freeze: the lowest blocks and the embeddings stay as they are (Zheng et al. 2025)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from holdfast.config import Options
from holdfast.errors import ConfigError
from holdfast.hold.cost import Estimate, trained_numbers
from holdfast.importance.prior import parameters_by_name
from holdfast.models import block_parameters
from holdfast.names import layer_of
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.task import TaskStream


class FreezeOptions(Options):
    """How much of the model is frozen, and from when on."""

    name: Literal["freeze"] = "freeze"
    blocks: int = Field(1, ge=0, description="the lowest n blocks; in an encoder-decoder model of each stack")
    embeddings: bool = Field(True, description="freeze these too, and an output head that is tied to them")
    from_task: int = Field(1, ge=1, description="2: the first task is learned with the whole model")


@register
class Freeze(Strategy):
    """Sequential training of all but the lowest n blocks and the embeddings (Zheng et al. 2025, section 5).

    The paper freezes 7 of 12 blocks in its synthetic setting, where the first task is learned whole
    (``from_task: 2``), 6 blocks of LLaMa-2-7B in safety alignment, and 1 to 3 in its other scenarios. It has
    decoder-only models; freezing both stacks of an encoder-decoder model is ours, and so are LoRA's factors:
    those in a frozen block stay at the last value. Extra state: none.
    """

    name = "freeze"
    paper = "Zheng et al. 2025, arXiv 2501.13453"
    summary = "the lowest blocks and the embeddings are never trained"
    Options = FreezeOptions

    def frozen(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Canonical name to parameter, of what these options freeze."""
        low = {
            name: parameter
            for name, parameter in parameters_by_name(model).items()
            if (layer := layer_of(name)) is not None and layer < self.options.blocks
        }
        return {**low, **_embeddings(model)} if self.options.embeddings else low

    def check(self, model: nn.Module) -> None:
        """See that the model has so many blocks, and that what is frozen and what is left is trained."""
        layers = {
            layer
            for name in block_parameters(model, trainable_only=False)
            if (layer := layer_of(name)) is not None
        }
        depth = max(layers, default=-1) + 1
        if self.options.blocks > depth:
            raise ConfigError(
                f"strategy.blocks: {self.options.blocks} blocks to freeze, but the model has {depth}. "
                f"Give a number below {depth}."
            )
        tables_train = any(p.requires_grad for p in _embeddings(model).values())
        if not (self.options.embeddings or tables_train):
            raise ConfigError(
                "strategy.embeddings: false does nothing here, as this model's embeddings aren't trained. "
                "Leave it out, or train them (model.trainable: all)."
            )
        if not (self.options.blocks or (self.options.embeddings and tables_train)):
            raise ConfigError(
                "strategy.blocks: with 0 nothing that is trained is frozen. Give at least 1, or use the "
                "strategy sequential."
            )
        frozen = {id(p) for p in self.frozen(model).values()}
        if not any(p.requires_grad and id(p) not in frozen for p in model.parameters()):
            raise ConfigError(
                f"strategy.blocks: with the lowest {self.options.blocks} of {depth} blocks frozen nothing is "
                "left to train. Freeze fewer, or train more (model.trainable, model.lora)."
            )

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """All but what is frozen is trained."""
        frozen = self.frozen(model).values() if self.options.from_task == 1 else ()
        left = trained_numbers(model) - sum(p.numel() for p in frozen if p.requires_grad)
        return Estimate(trained=left)

    def begin(self, context: Context, stage: Stage) -> None:
        """Freeze, unless this is a task before `from_task`."""
        if stage.index + 1 >= self.options.from_task:
            for parameter in self.frozen(context.model).values():
                parameter.requires_grad_(False)


def _embeddings(model: nn.Module) -> dict[str, nn.Parameter]:
    """Canonical name to parameter, of all tables but those inside blocks."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    ids = {id(p) for table in tables for p in table.parameters()}
    # T5 keeps the table of its relative positions inside its first block: that belongs to the block
    return {n: p for n, p in parameters_by_name(model).items() if id(p) in ids and layer_of(n) is None}
