"""A model and its tokenizer from a folder or the hub: whole, or refused with what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from holdfast.errors import ModelError
from holdfast.models.adapters import stay_differentiable
from holdfast.names import layer_of
from holdfast.places import is_local, local_path, near

GGUF = ".gguf"

_SHOWN = 5


Bits = Literal["4bit", "8bit"]


def load_pretrained(
    path: str,
    dtype: torch.dtype,
    *,
    random_init: bool = False,
    seed: int = 0,
    quantise: Bits | Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Load a causal or encoder-decoder model with its tokenizer; one that sees images too as a whole.

    Parameters
    ----------
    path : str
        Folder, GGUF file or hub id. What a GGUF stores in blocks becomes plain floats.
    random_init : bool
        Take the architecture alone, with weights drawn by `seed`.
    quantise : {"4bit", "8bit"} or mapping, optional
        How linear layers are quantised as they are loaded: NF4 or int8 by bitsandbytes, or as a
        `quantization_config` says. A model that is stored quantised is loaded as it is.

    Raises
    ------
    ModelError
        There is no such model, a file of it is damaged, weights are missing or belong to another
        architecture, a library that it needs is not installed, or its tokenizer doesn't fit.
    """
    from transformers import AutoConfig, AutoTokenizer

    local = is_local(path, (GGUF,))
    source, reading = _see_folder(path) if local else (path, {})
    try:
        config = AutoConfig.from_pretrained(source, **reading)
        auto = _auto_class(config)
        loading: Mapping[str, Any] = {}
        if random_init:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = auto.from_config(config, dtype=dtype)
        else:
            how = {**reading, **_unpacked()} if reading else {}
            if quantise is not None and not hasattr(config, "quantization_config"):
                how["quantization_config"] = _quantisation(quantise, dtype)
            model, loading = auto.from_pretrained(source, dtype=dtype, output_loading_info=True, **how)
            if reading:
                model = _plain(model, path)
        if reading and (Path(source) / "tokenizer.json").is_file():
            reading = {}  # the tokenizer itself, not what a GGUF tells of it
        tokenizer = AutoTokenizer.from_pretrained(source, **reading)
        if reading:
            _drop_foreign(tokenizer, model.get_input_embeddings().weight.shape[0])
    except Exception as error:  # damaged files fail in a dozen ways below
        raise ModelError(_explained(path, local, error)) from error
    if problem := _problem(config, model, loading, tokenizer):
        raise ModelError(f"model.path: '{path}' {problem}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # the usual choice; padding is masked everywhere
    stay_differentiable(model)
    return model, tokenizer


def _auto_class(config: Any) -> Any:
    """The class that loads all of a model: of one that sees images too with what it sees them by."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    seeing: Any = AutoModelForImageTextToText._model_mapping.get(type(config), None)
    if seeing is None:
        return AutoModelForCausalLM
    text_alone = type(config) in AutoModelForCausalLM._model_mapping
    stored_whole = seeing.__name__ in (config.architectures or ())
    return AutoModelForImageTextToText if stored_whole or not text_alone else AutoModelForCausalLM


def _quantisation(how: Bits | Mapping[str, Any], dtype: torch.dtype) -> Any:
    """What transformers is told: as QLoRA has it (Dettmers et al. 2023: NF4, scales quantised too)."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoQuantizationConfig

    if not isinstance(how, str):
        return AutoQuantizationConfig.from_dict(dict(how))
    if how == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _see_folder(path: str) -> tuple[str, dict[str, Any]]:
    """The folder that a path means, and how transformers is told of a GGUF file that holds the weights."""
    given = local_path(path)
    try:
        there, files = given.exists(), _gguf(given)
        if there and not files and (given / "config.json").is_file():
            return str(given), {}
    except OSError as error:
        raise ModelError(f"model.path: '{path}' can't be read ({error.strerror or error}).") from error
    if len(files) > 1:
        names = _named([file.name for file in files])
        raise ModelError(f"model.path: '{path}' holds {len(files)} GGUF files: {names}. Give one of them.")
    if files:
        return str(files[0].parent), _of_gguf(path, files[0].name)
    what = "no config.json there" if there else "nothing is there"
    hint = "" if there else near(given)
    raise ModelError(
        f"model.path: no Hugging Face model at '{path}' ({what}). Give a folder written by save_pretrained, "
        f"a GGUF file, or a hub id such as 'meta-llama/Llama-3.2-1B'.{hint}"
    )


def _gguf(path: Path) -> list[Path]:
    """The GGUF files that a path means: itself, or those of a folder without weights of another kind."""
    if path.is_file():
        return [path] if path.suffix.lower() == GGUF else []
    others = any(True for kind in ("*.safetensors", "*.bin") for _ in path.glob(kind))
    return [] if others else sorted(file for file in path.glob(f"*{GGUF}") if file.is_file())


def _of_gguf(path: str, name: str) -> dict[str, Any]:
    from transformers.utils import is_gguf_available

    if not is_gguf_available():
        raise ModelError(
            f"model.path: '{path}' is a GGUF model, and the package that reads these is not installed: "
            "pip install gguf"
        )
    return {"gguf_file": name}


def _unpacked() -> dict[str, Any]:
    import transformers

    if hasattr(transformers, "GgufConfig"):  # else all versions unpack
        return {"quantization_config": transformers.GgufConfig(dequantize=True)}
    return {}


def _plain(quantised: Any, path: str) -> Any:
    """The same model as any other: what came from a GGUF, transformers refuses to train and to save."""
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.name_or_path = path  # where an adapter finds its base again; a GGUF says a title here
    model = type(quantised)(config).to(quantised.dtype)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.generation_config = quantised.generation_config
    return model.eval()


def _drop_foreign(tokenizer: Any, rows: int) -> None:
    """Take out tokens without an embedding: transformers adds GPT-2's end token to every GGUF of its kind."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < rows]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def _problem(config: Any, model: Any, loading: Mapping[str, Any], tokenizer: Any) -> str | None:
    """Why what was loaded is not the model that was saved, or can't be used."""
    missing = sorted(loading.get("missing_keys", ()))
    if missing:
        return (
            f"lacks {_tensors(missing)} that its config.json asks for, which would be random: "
            f"{_named(missing)}. Give all of its weights, and the config.json that belongs to them."
        )
    if left := sorted(_other_layers(loading.get("unexpected_keys", ()), model)):
        return (
            f"has {_tensors(left)} of layers that its config.json doesn't have: {_named(left)}. Give the "
            "config.json that belongs to these weights."
        )
    quantised = getattr(config, "quantization_config", None)
    if quantised and loading and getattr(model, "hf_quantizer", None) is None:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        return f"is quantised by {method!r}, which transformers doesn't know; give its full weights."
    if tokenizer.eos_token_id is None:
        return "has a tokenizer without an end-of-sequence token."
    rows = model.get_input_embeddings().weight.shape[0]
    if (largest := max(tokenizer.get_vocab().values(), default=0)) >= rows:
        return (
            f"has a tokenizer with tokens up to {largest}, but embeddings for {rows} only; it belongs to "
            "another model, or the embeddings were not resized."
        )
    return None


def _tensors(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _named(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _other_layers(unexpected: Iterable[str], model: Any) -> Iterator[str]:
    """Weights that some layer of the model has too, under another number: it is of another depth."""
    known = {re.sub(r"\.\d+\.", ".*.", name) for name in model.state_dict()}
    for name in unexpected:
        if layer_of(name) is not None and re.sub(r"\.\d+\.", ".*.", name) in known:
            yield name


def _explained(path: str, local: bool, error: Exception) -> str:
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines() or [""]
    said = f"{type(error).__name__}: {' '.join(line.strip() for line in lines[:3])}"
    if isinstance(error, OSError | ImportError) and lines[0]:
        said = " ".join(line.strip() for line in lines[:3])
    if not local:
        return (
            f"model.path: no folder '{path}' here (looked in {Path().resolve()}), and as a hub id it could "
            f"not be loaded: {said}{near(Path(path))}"
        )
    if type(error).__name__ == "UnpicklingError":
        said = "its pickle holds more than tensors, or is damaged. Save the model as safetensors"
    elif "ignore_mismatched_sizes" in said:
        said = f"tensors are of another shape than its config.json says: {_shapes(local_path(path))}"
    torn = [f"{file.name} ({why})" for file, why in _torn(local_path(path))]
    return f"model.path: '{path}' could not be loaded: {f'damaged file {torn[0]}' if torn else said}"


def _torn(folder: Path) -> Iterator[tuple[Path, str]]:
    """Files of tensors that can't be opened, and JSON files that are of another shape than any is."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.json")):
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            yield file, str(error)
        else:
            if not isinstance(value, dict):
                yield file, f"it must be a JSON object, got {value!r:.40}"
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            yield file, str(error)


def _shapes(folder: Path) -> str:
    """Stored shapes against those of the configuration, as far as they differ."""
    from safetensors import safe_open
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        wanted = {
            name: tuple(p.shape) for name, p in _auto_class(config).from_config(config).state_dict().items()
        }
    different = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                shape = tuple(tensors.get_slice(name).get_shape())
                if shape != wanted.get(name, shape):
                    different.append(f"{name} {shape} instead of {wanted[name]}")
    return _named(different) or "see the report above"
