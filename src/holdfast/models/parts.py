"""What a model is made of: its linear maps, its language model, how many weights there are."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from holdfast import world
from holdfast.models.adapters import bare_of, is_quantised
from holdfast.names import canonical_name, layer_of

_MATRIX = re.compile(r"weight|proj|kernel|^[a-z]\d$")  # what modules call matrices of their own


def unwrapped(model: Any) -> Any:
    """The model inside torch.compile's and DistributedDataParallel's wrappers (PEFT's is kept)."""
    while True:
        if isinstance(model, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model reads the prompt with an encoder and writes the answer with a decoder."""
    return bool(getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False))


def context_length(model: nn.Module) -> int | None:
    """How many positions the model has: of prompt and answer, or of each with an encoder-decoder.

    None where it has no bound of its own (relative positions). Numbers below `first_position` are no token's.
    """
    config: Any = getattr(model, "config", None)
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(inner, "max_position_embeddings", None)
    return length - (first_position(model) or 0) if isinstance(length, int) and length > 0 else None


def first_position(model: nn.Module) -> int | None:
    """The number of the position of a row's first token; None where the model takes no positions.

    RoBERTa and its kin count from behind the index of their padding, all others from 0. Left to themselves
    they would count padding that is another token, or padding in embeddings, as text.
    """
    model = unwrapped(model)
    if is_encoder_decoder(model) or not accepts(model, "position_ids"):
        return None
    counting = (m for m in model.modules() if hasattr(m, "create_position_ids_from_input_ids"))
    return next((m.padding_idx + 1 for m in cast(Iterator[Any], counting) if m.padding_idx is not None), 0)


def text_part(model: Any) -> nn.Module:
    """What text goes through: of a model that sees images too its language model, else the model itself."""
    config: Any = getattr(model, "config", None)
    apart = hasattr(config, "get_text_config") and config.get_text_config() is not config
    if not apart or is_encoder_decoder(model) or not hasattr(model, "get_decoder"):
        return cast(nn.Module, model)
    return cast(nn.Module, model.get_decoder())


def beside_text(model: Any) -> list[str]:
    """Paths of the modules that no text goes through: a model's eyes, and what they are joined on by."""
    part = text_part(model)
    return [] if part is model else list(_beside(model, {part, model.get_output_embeddings()}))


def _beside(module: nn.Module, kept: set[nn.Module], path: str = "") -> Iterator[str]:
    """Paths of the outermost modules below one that neither are some others nor hold any of them."""
    for name, child in module.named_children():
        if kept.isdisjoint(child.modules()):
            yield f"{path}{name}"
        elif child not in kept:
            yield from _beside(child, kept, f"{path}{name}.")


def routers(model: nn.Module) -> list[str]:
    """Paths of linear layers that answer otherwise than one does, such as a router with its choice."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and type(module).forward is not nn.Linear.forward
        and type(module).__module__.startswith("transformers.models.")
    ]


def linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every linear map (nn.Linear, transformers' Conv1D; LoRA's factors are such)."""
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module


def first_names(model: nn.Module) -> dict[int, str]:
    """id of each parameter to its canonical name: the first one, where several modules hold it."""
    return {id(parameter): canonical_name(name) for name, parameter in model.named_parameters()}


def block_parameters(model: nn.Module, trainable_only: bool = True) -> dict[str, nn.Parameter]:
    """Weights and biases of all that is a linear map inside the transformer blocks (W^(l) of A, section 4.1).

    These are linear layers and convolutions, and parameters of two or more dimensions that a module holds
    itself: the experts of a mixture (one tensor for all of them), their biases and their router.

    Parameters
    ----------
    model : nn.Module
        Any transformers model, with or without PEFT.
    trainable_only : bool
        Leave out frozen weights (with LoRA: the backbone).

    Returns
    -------
    dict
        Canonical name to parameter, in the model's order, each once (`first_names`). Norms, embeddings and
        heads are not in it.
    """
    found: dict[str, nn.Parameter] = {}
    names = first_names(model)
    linear = {id(module) for _, module in linear_modules(model)}
    for module_name, module in model.named_modules():
        if layer_of(module_name + ".") is None or isinstance(module, nn.Embedding):
            continue
        own = dict(module.named_parameters(recurse=False))
        whole = id(module) in linear or isinstance(module, nn.Conv1d)
        for leaf, parameter in own.items():
            if not (whole or _is_matrix(leaf, parameter) or _is_bias(leaf, own)):
                continue
            if parameter.requires_grad or not trainable_only:
                found[names[id(parameter)]] = parameter
    return found


def input_dims(model: nn.Module) -> dict[str, int]:
    """Canonical name of each weight of a linear map inside the transformer blocks to its input dimension.

    1 for `torch.nn.Linear`, whose weight is (O, I); 0 for transformers' Conv1D, where it is (I, O). PEFT's
    LoRA on parameters (experts) has linear layers too, but multiplies their weights: no input goes into them.
    A weight that several maps share is in it once (`first_names`).
    """
    multiplied: tuple[str, ...] = ()
    if "peft" in sys.modules:  # whose import takes seconds, and without which no model has such layers
        from peft.tuners.lora.layer import ParamWrapper

        wrappers = [name for name, module in model.named_modules() if isinstance(module, ParamWrapper)]
        multiplied = tuple(f"{name}.lora_{factor}." for name in wrappers for factor in "AB")
    names = first_names(model)
    return {
        _weight_name(path, module, names): int(isinstance(module, nn.Linear))
        for path, module in linear_modules(model)
        if layer_of(f"{path}.") is not None and not path.startswith(multiplied)
    }


def input_sizes(model: nn.Module) -> dict[str, int]:
    """Canonical name of each weight of `input_dims` to how many inputs its map has."""
    from transformers.pytorch_utils import Conv1D

    found, dims, names = {}, input_dims(model), first_names(model)
    for path, module in linear_modules(model):
        name, layer = _weight_name(path, module, names), cast(Any, module)
        if name in dims:
            found[name] = world.shape(layer.weight)[0] if isinstance(layer, Conv1D) else layer.in_features
    return found


def _weight_name(path: str, module: nn.Module, names: Mapping[int, str]) -> str:
    """Canonical name of a map's weight, which may be no parameter of its own (computed of others)."""
    return names.get(id(module._parameters.get("weight")), canonical_name(f"{path}.weight"))


def _is_matrix(leaf: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter that a module holds itself has rows and columns.

    Shape alone tells it of a stack of matrices; of two dimensions there are tables of other things too, such
    as the decay rates of a state.
    """
    shape = world.shape(parameter)
    sizes = [size for size in shape if size > 1]
    return len(sizes) > 1 and (len(shape) > 2 or _MATRIX.search(leaf) is not None)


def _is_bias(leaf: str, own: dict[str, nn.Parameter]) -> bool:
    """Whether a parameter is the bias of a matrix that the same module holds (a router's, an expert's)."""
    stem = leaf.removesuffix("bias")
    of = (stem.rstrip("_"), f"{stem}weight")
    return stem != leaf and any(name in own and _is_matrix(name, own[name]) for name in of)


def quantisation_of(model: Any) -> dict[str, Any] | None:
    """The `quantization_config` that the weights under an adapter were loaded with, if they are quantised."""
    found = getattr(getattr(bare_of(model), "config", None), "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def weights_of(model: nn.Module) -> tuple[int, int]:
    """How many weights a model has, packed ones as what they stand for, and the bytes that they take."""
    stands_for = {
        id(layer.weight): int(layer.in_features) * int(layer.out_features)
        for layer in cast(Iterator[Any], model.modules())
        if is_quantised(layer) and getattr(layer, "weight", None) is not None
    }
    every = list(model.parameters())
    number = sum(stands_for.get(id(p), p.numel()) for p in every)
    return number, sum(p.numel() * p.element_size() for p in every)


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the bare model's forward takes this keyword (PEFT's wrapper takes anything)."""
    return argument in inspect.signature(bare_of(model).forward).parameters
