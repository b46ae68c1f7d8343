"""What the ranks of an adapter put out, weighted row by row or token by token while the model answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from holdfast.errors import ConfigError
from holdfast.hold import Handle
from holdfast.models import is_encoder_decoder
from holdfast.models.adapters import lora_layers
from holdfast.strategies.prompts.soft import question

# (number of the layer, its input (B, T, D), what A puts out (B, T, R)) -> the same, weighted
Weigh = Callable[[int, Tensor, Tensor], Tensor]


def weigh(model: Any, by: Weigh) -> Handle:
    """Weight what A puts out in every adapted layer, until the handle is removed.

    Raises
    ------
    ConfigError
        In the forward pass: a layer gets the tokens of all rows as one row (experts of a model do).
    """

    def hook(number: int, name: str) -> Any:
        def weighted(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if output.dim() != 3:
                raise ConfigError(
                    f"model.lora.target_modules: {name} gets {tuple(args[0].shape)} as input, without a row "
                    "for each example, so its ranks can't be weighted by example. Adapt other layers."
                )
            return by(number, args[0], output)

        return weighted

    layers = enumerate(lora_layers(model).items())
    return Handle(
        [layer.lora_A["default"].register_forward_hook(hook(n, name)).remove for n, (name, layer) in layers]
    )


def select(model: Any, chosen: Tensor) -> Handle:
    """Let only some ranks of the adapter answer, until the handle is removed.

    Parameters
    ----------
    chosen : Tensor
        1 for a rank that answers, else 0: (R,) for all rows, or (B, R) for each row of the batch.
    """

    def by(_: int, x_BTD: Tensor, output_BTR: Tensor) -> Tensor:
        if chosen.dim() == 1:
            return output_BTR * chosen.to(output_BTR)
        return output_BTR * chosen.to(output_BTR)[:, None]

    return weigh(model, by)


class Weighted:
    """The model with hooks that are on while it answers calls and ``generate``; it stays as it is.

    Parameters
    ----------
    attach : callable
        (input_ids (B, T), the question's tokens (B, T) bool) -> the handle of the hooks for this batch.
    """

    reads_labels = True  # a causal model's labels tell the question from the answer

    def __init__(self, model: Any, attach: Callable[[Tensor, Tensor], Handle]) -> None:
        self.model, self.attach = model, attach

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    def get_base_model(self) -> Any:
        """The model without its adapter's wrapper."""
        return self.model.get_base_model()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The model's."""
        return iter(self.model.parameters())

    def modules(self) -> Iterator[nn.Module]:
        """The model's."""
        return iter(self.model.modules())

    def eval(self) -> Weighted:
        """Put the model into evaluation mode."""
        self.model.eval()
        return self

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> Any:
        """A forward pass."""
        labels = None if is_encoder_decoder(self.model) else inputs.pop("labels", None)
        on = self.attach(input_ids, question(attention_mask, labels))
        try:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        finally:
            on.remove()

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """Token ids as the model's own ``generate`` gives them."""
        on = self.attach(input_ids, attention_mask.bool())
        try:
            ids: Tensor = self.model.generate(input_ids=input_ids, attention_mask=attention_mask, **options)
            return ids
        finally:
            on.remove()
