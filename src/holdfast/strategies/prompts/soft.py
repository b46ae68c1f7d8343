"""Soft prompts: trained vectors in front of the input's embeddings; the model behind them is frozen.

PEFT's prompt tuning doesn't fit the training: its causal forward drops ``position_ids``, so that in a batch
padded on the left the distance from prompt to text would depend on the padding, and it has neither prompts
that are chosen for each input nor earlier ones that stay frozen. It fits what comes out: `save_adapter`
writes a prompt as a standard PEFT adapter. Prompts stand in front of what a causal model reads, or of what
the encoder of an encoder-decoder model reads; the padding lies between prompt and text (or behind both) and
counts neither in attention nor in positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import ConfigError
from holdfast.hold.attach import Handle
from holdfast.models import accepts, first_position, is_encoder_decoder
from holdfast.models.adapters import is_adapted
from holdfast.storage import write_tensors
from holdfast.tasks.encode import positions

SUBMODULE = "soft_prompts"  # what is trained, as the model's own submodule: optimizer and checkpoints see it

# (input_ids (B, T), mask (B, T) of the tokens of the question) -> prompts (B, N, D), N the same for all rows
Source = Callable[[Tensor, Tensor], Tensor]


def check_promptable(model: nn.Module, strategy: str) -> None:
    """Raise a `ConfigError` if prompts can't be put in front of this model's input."""
    if is_adapted(model):
        raise ConfigError(
            f"model.lora: strategy '{strategy}' trains prompts in front of a frozen model, not adapters; "
            "leave out model.lora (and where model.path is an adapter, merge it into its base model first)."
        )
    check_embeddable(model, strategy)


def check_embeddable(model: nn.Module, strategy: str) -> None:
    """Raise a `ConfigError` if vectors can't stand in front of this model's input embeddings."""
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        table = None
    if not isinstance(table, nn.Module) or not accepts(model, "inputs_embeds"):
        raise ConfigError(
            f"strategy: '{strategy}' needs a model that gives its input embeddings and takes inputs_embeds, "
            f"not a {type(model).__name__}. Use another model, or a strategy that trains weights."
        )


def vocabulary_rows(model: Any, count: int, seed: int) -> Tensor:
    """Embeddings (count, D) of random tokens, as float32: what prompts start from."""
    table = model.get_input_embeddings()
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(table.weight.shape[0], (count,), generator=draw)
    with torch.no_grad():  # through the module, because some scale what they look up
        rows: Tensor = table(ids.to(table.weight.device))
    return rows.float().cpu()


class Prompt(nn.Module):
    """The vectors of one prompt; while they are trained perhaps through a residual network.

    Parameters
    ----------
    rows_ND : Tensor
        What they start from.
    bottleneck : int, optional
        Width of a network E + W2 tanh(W1 E + b1) + b2 that makes the prompt from trained rows E.
    """

    def __init__(self, rows_ND: Tensor, bottleneck: int | None = None) -> None:
        super().__init__()
        size = rows_ND.shape[1]
        self.rows = nn.Parameter(rows_ND.clone())
        self.network = (
            None
            if bottleneck is None
            else nn.Sequential(nn.Linear(size, bottleneck), nn.Tanh(), nn.Linear(bottleneck, size))
        )

    def forward(self) -> Tensor:
        """The prompt (N, D)."""
        return self.rows if self.network is None else self.rows + self.network(self.rows)


def prepend(model: Any, prompts_BND: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
    """``inputs_embeds`` (B, N + T, D) and ``attention_mask`` (B, N + T) of the prompts and what follows."""
    embeds_BTD = model.get_input_embeddings()(ids_BT)
    prompts_BND = prompts_BND.to(embeds_BTD)
    seen = mask_BT.new_ones(prompts_BND.shape[:2])
    return {
        "inputs_embeds": torch.cat([prompts_BND, embeds_BTD], dim=1),
        "attention_mask": torch.cat([seen, mask_BT], dim=1),
    }


def put_in_front(model: Any, source: Source) -> Handle:
    """Let every call of the model see the prompts of `source`, until the handle is removed.

    Works by hooks on the model: ``input_ids`` becomes ``inputs_embeds``, mask and positions follow. Logits
    keep their place: what a causal model puts out at the prompts is cut off, and labels get -100 there. A
    call that brings ``inputs_embeds`` is left alone. Not for ``generate``; that is what `Prompted` is for.
    """
    causal = not is_encoder_decoder(model)
    first = first_position(model)
    names = list(inspect.signature(model.forward).parameters)
    count = 0

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal count
        count = 0
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        ids, labels = kwargs.pop("input_ids", None), kwargs.get("labels")
        if ids is None:
            return None
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        prompts = source(ids, question(mask, labels if causal else None))
        count = prompts.shape[1]
        kwargs |= prepend(model, prompts, ids, mask)
        if first is not None:
            kwargs["position_ids"] = positions(kwargs["attention_mask"], first)
        if causal and labels is not None:
            kwargs["labels"] = nn.functional.pad(labels, (count, 0), value=-100)
        return (), kwargs

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        logits = getattr(outputs, "logits", None)
        if causal and count and logits is not None and logits.shape[1] == kwargs["inputs_embeds"].shape[1]:
            outputs.logits = logits[:, count:]
        return outputs

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    return Handle([hook.remove for hook in hooks])


def question(mask_BT: Tensor, labels_BT: Tensor | None) -> Tensor:
    """Which tokens (B, T, bool) are the question: neither padding nor, where labels tell it, the answer."""
    seen = mask_BT.bool()
    return seen if labels_BT is None else seen & (labels_BT == -100)


def learn(model: Any, prompts: nn.Module, source: Source) -> Handle:
    """Freeze the model and make `prompts` its trained submodule; removing the handle leaves it as it was."""
    unfrozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in unfrozen:
        parameter.requires_grad_(False)
    model.add_module(SUBMODULE, prompts.to(model.device))
    hooks = put_in_front(model, source)

    def undo() -> None:
        hooks.remove()
        delattr(model, SUBMODULE)
        for parameter in unfrozen:
            parameter.requires_grad_(True)

    return Handle([undo])


class Prompted:
    """The model with prompts in front, for those who ask it; the model itself stays as it is.

    It answers calls and ``generate`` as the model does: what it generates for a causal model begins with the
    input ids, and logits stand where they would without prompts.

    Attributes
    ----------
    reads_labels : bool
        A causal model's labels tell it which tokens are the question; no loss is computed of them.
    """

    reads_labels = True

    def __init__(self, model: Any, source: Source) -> None:
        self.model, self.source = model, source

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    def get_base_model(self) -> Any:
        """The model without prompts."""
        return self.model

    def parameters(self) -> Iterator[nn.Parameter]:
        """The model's."""
        return iter(self.model.parameters())

    def modules(self) -> Iterator[nn.Module]:
        """The model's."""
        return iter(self.model.modules())

    def eval(self) -> Prompted:
        """Put the model into evaluation mode."""
        self.model.eval()
        return self

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> Any:
        """A forward pass with prompts."""
        labels = None if is_encoder_decoder(self.model) else inputs.pop("labels", None)
        prompts = self.source(input_ids, question(attention_mask, labels))
        hooks = put_in_front(self.model, lambda ids, mask: prompts)
        try:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        finally:
            hooks.remove()

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """Token ids as the model's own ``generate`` gives them, with prompts in front of the input."""
        prompts = self.source(input_ids, attention_mask.bool())
        inputs = prepend(self.model, prompts, input_ids, attention_mask)
        if first := first_position(self.model):  # from 0 generate() counts itself
            options["position_ids"] = positions(inputs["attention_mask"], first)
        output: Tensor = self.model.generate(**inputs, **options)
        # without input_ids, transformers returns a causal model's new tokens alone
        return output if is_encoder_decoder(self.model) else torch.cat([input_ids, output], dim=1)


def save_adapter(model: Any, prompt_ND: Tensor, folder: Path) -> None:
    """Write a prompt as a PEFT adapter: ``PeftModel.from_pretrained(base, folder)`` then answers with it."""
    from peft import PromptTuningConfig

    PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM" if is_encoder_decoder(model) else "CAUSAL_LM",
        base_model_name_or_path=model.name_or_path or None,
        num_virtual_tokens=prompt_ND.shape[0],
        token_dim=prompt_ND.shape[1],
        num_transformer_submodules=1,  # the encoder alone; PEFT's default for T5 would want a second half
        inference_mode=True,
    ).save_pretrained(str(folder))
    write_tensors(folder / "adapter_model.safetensors", {"prompt_embeddings": prompt_ND})
