"""From a folder or hub id to a model in memory, with what is trained marked."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import nn

from holdfast.errors import ModelError
from holdfast.models.adapters import ADAPTER, bare_of, is_adapted, is_adapter, is_quantised, load_adapter
from holdfast.models.lora import add_lora
from holdfast.models.options import FloatType, ModelOptions
from holdfast.models.parts import block_parameters, text_part, unwrapped
from holdfast.models.pretrained import load_pretrained
from holdfast.models.toy import tiny_llama
from holdfast.names import canonical_name
from holdfast.places import local_path
from holdfast.progress import no_library_bars


@no_library_bars()
def load_model(
    options: ModelOptions, seed: int = 0, toy_tokenizer: Callable[[], Any] | None = None
) -> tuple[Any, Any]:
    """Load model and tokenizer, add LoRA if asked, and mark what is trainable.

    Parameters
    ----------
    toy_tokenizer : callable, optional
        Makes the tokenizer of ``toy: true``; the toy suite knows its characters.

    Raises
    ------
    ModelError
        The folder or hub id can't be loaded, or its tokenizer has no padding or end token.
    """
    if options.toy:
        if toy_tokenizer is None:
            raise ModelError("model.toy: no tokenizer for it was given (holdfast.tasks.toy_tokenizer).")
        tokenizer = toy_tokenizer()
        model: Any = tiny_llama(tokenizer, seed, options.hidden or 128, options.layers or 4)
        model.to(getattr(torch, options.dtype))
    elif is_adapter(str(options.path)):
        return _load_adapter(local_path(str(options.path)), options, seed)
    else:
        model, tokenizer = _load_pretrained(str(options.path), options, seed)
    if options.lora is not None:
        model = add_lora(model, options.lora, seed)
    else:
        _require_floats(model, options)
        wanted = {id(p) for p in block_parameters(text_part(model), trainable_only=False).values()}
        for parameter in model.parameters():
            parameter.requires_grad_(options.trainable == "all" or id(parameter) in wanted)
    model.eval()
    return model, tokenizer


def _require_floats(model: nn.Module, options: ModelOptions) -> None:
    packed = next((name for name, layer in model.named_modules() if is_quantised(layer)), None)
    if packed is not None:
        raise ModelError(
            f"model.path: '{options.path}' is quantised ('{packed}' is), and such weights can't be trained. "
            "Train a LoRA on them (model.lora, or --lora), or give the model's full weights."
        )


def _load_pretrained(
    path: str, options: ModelOptions, seed: int, quantise: Mapping[str, Any] | None = None
) -> tuple[Any, Any]:
    return load_pretrained(
        path,
        getattr(torch, options.dtype),
        random_init=options.random_init,
        seed=seed,
        quantise=options.quantise if quantise is None else quantise,
    )


def _with_padding(tokenizer: Any, path: Path | str) -> Any:
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model.path: the tokenizer of '{path}' has no end-of-sequence token.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # the usual choice; padding is masked everywhere
    return tokenizer


def _load_adapter(
    folder: Path, options: ModelOptions, seed: int, quantise: Mapping[str, Any] | None = None
) -> tuple[Any, Any]:
    """A PEFT adapter on its base model, trainable, with the base frozen."""
    from peft import PeftModel

    if options.lora is not None:
        raise ModelError(f"model.path: '{folder}' is an adapter already; leave out model.lora.")
    base = json.loads((folder / ADAPTER).read_text()).get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"model.path: the adapter in '{folder}' doesn't name its base model (base_model_name_or_path in "
            f"{ADAPTER}); write the base's folder or hub id there."
        )
    model, tokenizer = _load_pretrained(base, options, seed, quantise)
    tokenizer = _own_tokenizer(folder, tokenizer)
    _resize_embeddings(model, folder, len(tokenizer))
    try:
        model = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"model.path: the adapter in '{folder}' does not load on its base '{base}': "
            f"{' '.join(str(error).split()[:60])}"
        ) from error
    model.eval()
    return model, tokenizer


def _own_tokenizer(folder: Path, of_base: Any) -> Any:
    """The tokenizer that was saved beside an adapter, or the base's with the chat template that was."""
    from transformers import AutoTokenizer

    if (folder / "tokenizer_config.json").is_file():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder))
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"model.path: the tokenizer in '{folder}' could not be loaded: {error}"
            ) from error
        return _with_padding(tokenizer, folder)
    template = folder / "chat_template.jinja"
    if template.is_file():
        of_base.chat_template = template.read_text(encoding="utf-8")
    return of_base


def _resize_embeddings(model: Any, folder: Path, tokens: int) -> None:
    """Give the base as many embeddings as the adapter was saved with.

    Raises
    ------
    ModelError
        The adapter's tokenizer has more tokens than there are embeddings, saved or in the base.
    """
    from safetensors import safe_open

    rows = model.get_input_embeddings().weight.shape[0]
    saved, file = rows, folder / "adapter_model.safetensors"
    if file.is_file():
        own = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (no mapping)
                if name.removeprefix("base_model.model.").startswith(f"{own}.") and name.endswith("weight"):
                    saved = tensors.get_slice(name).get_shape()[0]
    if saved != rows:
        model.resize_token_embeddings(saved, mean_resizing=False)  # the adapter's rows replace all
    if tokens > saved:
        raise ModelError(
            f"model.path: the tokenizer of '{folder}' has {tokens} tokens, but the base model has {saved} "
            "embeddings and the adapter saved none of its own: the added tokens were never trained. Save the "
            "adapter again with save_pretrained(..., save_embedding_layers=True)."
        )


@no_library_bars()
def load_saved(
    folder: Path,
    trained: set[str],
    quantise: Mapping[str, Any] | None = None,
    dtype: FloatType = "float32",
) -> tuple[Any, Any]:
    """Model and tokenizer that `save_model` wrote, with just these weights trained.

    Parameters
    ----------
    trained : set of str
        Canonical names.
    dtype : str
        What `float_type` said of the model.
    quantise : mapping, optional
        The `quantization_config` with which an adapter's base is loaded.

    Raises
    ------
    ModelError
        The folder can't be loaded, or an adapter there doesn't name its base model.
    """
    options = ModelOptions(path=str(folder), dtype=dtype)
    adapter = (folder / ADAPTER).is_file()
    if adapter:
        model, tokenizer = _load_adapter(folder, options, 0, quantise)
    else:
        model, tokenizer = _load_pretrained(str(folder), options, 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(canonical_name(name) in trained)
    model.eval()
    return model, tokenizer


@no_library_bars()
def load_weights(model: Any, folder: Path) -> None:
    """Put weights that `save_model` wrote (whole, or a PEFT adapter) into a model in memory."""
    bare = unwrapped(model)
    if is_adapted(bare):
        load_adapter(bare, folder)
        return
    saved = type(bare).from_pretrained(folder, dtype=getattr(torch, float_type(bare)))
    bare.load_state_dict(saved.state_dict())


def float_type(model: Any) -> FloatType:
    """The type that a model is loaded in: the widest of its weights', and under an adapter the base's own."""
    bare = unwrapped(model)
    if is_adapted(bare):  # PEFT keeps factors on 16-bit weights in float32, and does so again
        widest = bare_of(bare).dtype
    else:
        types = {p.dtype for p in bare.parameters() if p.is_floating_point()}
        widest = functools.reduce(torch.promote_types, types) if types else torch.float32
    named = str(widest).removeprefix("torch.")
    return cast(FloatType, named) if named in get_args(FloatType) else "float32"
