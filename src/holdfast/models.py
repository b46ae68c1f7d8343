"""Models: loading, LoRA, and what is trained."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from holdfast import world
from holdfast.adapters import (
    ADAPTER,
    NAME,
    is_adapted,
    is_quantised,
    load_adapter,
    stay_differentiable,
)
from holdfast.config import Options
from holdfast.errors import ModelError
from holdfast.names import canonical_name, layer_of
from holdfast.places import local_path
from holdfast.pretrained import GGUF, Bits, load_pretrained
from holdfast.progress import no_library_bars
from holdfast.storage import give_usual_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


FloatType = Literal["float32", "bfloat16", "float16", "float64"]

_MATRIX = re.compile(r"weight|proj|kernel|^[a-z]\d$")  # what modules call matrices of their own


_PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_ABSENT = ("missing_entries", "gated_repo", "connection_errors")
_SAMPLED = 64  # values of each parameter in its fingerprint


class LoraOptions(Options):
    """Low-rank adapters, made by PEFT."""

    r: int = Field(8, ge=1, le=65536, description="rank")
    alpha: float = Field(16.0, gt=0, description="scale numerator (alpha / r)")
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | Literal["all-linear"] | None = Field(
        "all-linear",
        description="module names, or all linear maps but the head and routers; null: PEFT's default for the "
        "architecture, such as queries and values",
    )


class ModelOptions(Options):
    """Which model is fine-tuned, and which of its weights may change."""

    path: str | None = Field(
        None,
        description="folder, GGUF file or hub id of a causal or encoder-decoder model; of one that sees "
        "images too the language model is trained",
    )
    toy: bool = Field(False, description="a tiny Llama with a character tokenizer, made on the spot")
    dtype: FloatType = "float32"
    trainable: Literal["blocks", "all"] | None = Field(
        None, description="blocks (default): the linear maps in the transformer blocks; all: every weight"
    )
    lora: LoraOptions | None = Field(None, description="train low-rank adapters instead of the weights")
    quantise: Bits | None = Field(
        None,
        description="keep the frozen weights under a LoRA in 4 bits (NF4, as QLoRA does) or in 8; needs "
        "bitsandbytes",
    )
    random_init: bool = Field(False, description="take the architecture from `path`, but random weights")
    hidden: int | None = Field(
        None, ge=8, le=8192, multiple_of=8, description="toy only: hidden size (default 128)"
    )
    layers: int | None = Field(None, ge=1, le=1000, description="toy only: number of blocks (default 4)")

    @property
    def adapted(self) -> bool:
        """Whether a LoRA is trained: a new one, or the adapter that `path` holds."""
        return self.lora is not None or (self.path is not None and _is_adapter(self.path))

    @model_validator(mode="after")
    def _one_source(self) -> ModelOptions:
        if (self.path is None) == (not self.toy):
            raise ValueError("give exactly one of `path` (folder or hub id) and `toy: true`")
        if not self.toy and (self.hidden is not None or self.layers is not None):
            raise ValueError("`hidden` and `layers` apply to `toy: true` only")
        if self.lora is not None and self.trainable is not None:
            raise ValueError("`trainable` does not apply with `lora`: only the adapters are trained")
        if self.quantise is not None:
            self._quantisable()
        return self

    def _quantisable(self) -> None:
        if self.toy or self.random_init or str(self.path).lower().endswith(GGUF):
            raise ValueError(
                "`quantise` applies to the weights of a model that is loaded: not to `toy`, `random_init` or "
                "a GGUF file"
            )
        if not self.adapted:
            raise ValueError(
                "`quantise` needs a LoRA on what it quantises, as that can't be trained; set `lora`, such as "
                "`lora: {r: 8}`"
            )
        if self.dtype == "float64":
            raise ValueError("`quantise` goes with `dtype` float32, bfloat16 or float16, not float64")
        if find_spec("bitsandbytes") is None:
            raise ValueError(
                "`quantise` needs the package bitsandbytes, which is not installed: "
                "pip install 'holdfast[quantised]'"
            )


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

    None where it has no bound of its own (relative positions).
    """
    config: Any = getattr(model, "config", None)
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(inner, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def text_part(model: Any) -> nn.Module:
    """What text goes through: of a model that sees images too its language model, else the model itself."""
    config: Any = getattr(model, "config", None)
    apart = hasattr(config, "get_text_config") and config.get_text_config() is not config
    if not apart or is_encoder_decoder(model) or not hasattr(model, "get_decoder"):
        return cast(nn.Module, model)
    return cast(nn.Module, model.get_decoder())


def _beside_text(model: Any) -> list[str]:
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


def _routers(model: nn.Module) -> list[str]:
    """Paths of linear layers that answer otherwise than one does, such as a router with its choice."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and type(module).forward is not nn.Linear.forward
        and type(module).__module__.startswith("transformers.models.")
    ]


def _pattern(paths: Sequence[str]) -> str:
    """A regular expression for modules and all in them; blocks that differ in their number are one."""
    numbered = (re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(path)) for path in paths)
    return rf"({'|'.join(dict.fromkeys(numbered))})(\..*)?"


def linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every linear map (nn.Linear, transformers' Conv1D; LoRA's factors are such)."""
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module


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
        Canonical name to parameter, in the model's order. Norms, embeddings and heads are not in it.
    """
    found: dict[str, nn.Parameter] = {}
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
                found[canonical_name(f"{module_name}.{leaf}")] = parameter
    return found


def input_dims(model: nn.Module) -> dict[str, int]:
    """Canonical name of each weight of a linear map inside the transformer blocks to its input dimension.

    1 for `torch.nn.Linear`, whose weight is (O, I); 0 for transformers' Conv1D, where it is (I, O). PEFT's
    LoRA on parameters (experts) has linear layers too, but multiplies their weights: no input goes into them.
    """
    from peft.tuners.lora.layer import ParamWrapper

    wrappers = [name for name, module in model.named_modules() if isinstance(module, ParamWrapper)]
    multiplied = tuple(f"{name}.lora_{factor}." for name in wrappers for factor in "AB")
    return {
        canonical_name(f"{name}.weight"): int(isinstance(module, nn.Linear))
        for name, module in linear_modules(model)
        if layer_of(f"{name}.") is not None and not name.startswith(multiplied)
    }


def input_sizes(model: nn.Module) -> dict[str, int]:
    """Canonical name of each weight of `input_dims` to how many inputs its map has."""
    from transformers.pytorch_utils import Conv1D

    found, dims = {}, input_dims(model)
    for path, module in linear_modules(model):
        name, layer = canonical_name(f"{path}.weight"), cast(Any, module)
        if name in dims:
            found[name] = world.shape(layer.weight)[0] if isinstance(layer, Conv1D) else layer.in_features
    return found


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


def digest(model: nn.Module) -> str:
    """SHA-256 over the names, shapes and bytes of all parameters."""
    h = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda item: canonical_name(item[0])):
        h.update(f"{canonical_name(name)}{tuple(parameter.shape)}{parameter.dtype}".encode())
        for part in _plain(parameter.detach()):
            flat = part.cpu().contiguous().reshape(-1)
            if flat.numel():  # an empty tensor can't be viewed as bytes
                h.update(flat.view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor itself, or those that a packed one (torchao's, quanto's) is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))


def fingerprints(model: nn.Module) -> dict[str, str]:
    """Canonical name to eight hex digits of a few values of each parameter, the same in every float type.

    Cheap, to tell one model from another; `digest` looks at every byte.
    """
    found = {}
    for name, parameter in model.named_parameters():
        flat = next(_plain(world.whole(parameter).detach())).reshape(-1)
        places = torch.linspace(0, max(0, flat.numel() - 1), min(flat.numel(), _SAMPLED), dtype=torch.float64)
        values = flat[places.long().to(flat.device)].to("cpu", torch.bfloat16).contiguous()
        h = hashlib.sha256(repr(tuple(world.shape(parameter))).encode())
        if values.numel():
            h.update(values.view(torch.uint8).numpy().tobytes())
        found[canonical_name(name)] = h.hexdigest()[:8]
    return found


def tiny_llama(
    tokenizer: PreTrainedTokenizerBase, seed: int = 0, hidden: int = 128, layers: int = 4, heads: int = 4
) -> PreTrainedModel:
    """A randomly initialised Llama for the toy suite: about 0.2 M parameters a block at hidden 128."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        initializer_range=hidden**-0.5,  # at transformers' 0.02 so small a model takes twice the steps
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


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
    elif _is_adapter(str(options.path)):
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


def _is_adapter(path: str) -> bool:
    try:
        return (local_path(path) / ADAPTER).is_file()
    except OSError:  # said where the model is looked for
        return False


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


def add_lora(model: Any, options: LoraOptions, seed: int = 0) -> Any:
    """Wrap the model in PEFT's LoRA; only the factors stay trainable.

    Raises
    ------
    ModelError
        A target module does not exist, or PEFT knows no default for this architecture.
    """
    from peft import LoraConfig, get_peft_model

    targets, left_out = options.target_modules, _beside_text(model)
    if targets == "all-linear":
        left_out += _routers(model)
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,  # type: ignore[arg-type]
        lora_dropout=options.dropout,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        exclude_modules=_pattern(left_out) if left_out else None,
        task_type="SEQ_2_SEQ_LM" if is_encoder_decoder(model) else "CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            names = sorted({name.rsplit(".", 1)[-1] for name, _ in linear_modules(model)})
            raise ModelError(
                f"model.lora.target_modules: {error} Linear modules here: {', '.join(names)}; all-linear "
                "takes all but the head."
            ) from error


def quantisation_of(model: Any) -> dict[str, Any] | None:
    """The `quantization_config` that the weights under an adapter were loaded with, if they are quantised."""
    base = model.get_base_model() if is_adapted(model) else model
    found = getattr(getattr(base, "config", None), "quantization_config", None)
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


def onto_gpu(model: nn.Module) -> None:
    """Put a model on the GPU, where there is one; one that was quantised there is, and can't be moved."""
    if torch.cuda.is_available() and next(model.parameters()).device.type != "cuda":
        model.cuda()


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the bare model's forward takes this keyword (PEFT's wrapper takes anything)."""
    inner: Any = model
    if hasattr(model, "get_base_model"):
        inner = inner.get_base_model()
    return argument in inspect.signature(inner.forward).parameters


_PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")


def recomputes_reentrantly(model: nn.Module) -> bool:
    """Whether activations are made anew in the backward pass by torch's reentrant checkpointing.

    A block then runs without a graph first. Its second run makes one, but what has left the block by a hook
    has none, and what a hook brings in is gone through backward once for each block.
    """
    return any(
        getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant")
        is not False
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
    )


def unprepare(model: nn.Module) -> None:
    """Take off what accelerate leaves on a model: autocast, and the mark that leaves it out the next time."""
    model.__dict__.pop("_is_accelerate_prepared", None)
    own = model.__dict__.pop("_original_forward", None)
    if own is not None:
        del model.__dict__["forward"]
        if model.forward != own:  # somebody had put another on it before
            model.forward = own


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """The same for a block, and no autocast around it either."""
    kept = {name: value for name, value in model.__dict__.items() if name in _PREPARED}
    unprepare(model)
    device = next(model.parameters()).device.type
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        model.__dict__.update(kept)


def require_rateable(model: nn.Module) -> None:
    """Refuse to rate a model of which each process has a part alone, or that passes no gradient.

    Raises
    ------
    ModelError
    """
    stay_differentiable(model)
    cut = next((name for name, p in model.named_parameters() if world.is_sharded(p)), None)
    if cut is not None:
        raise ModelError(
            f"importance: {type(model).__name__} is cut up over the processes ('{cut}' is in parts: FSDP2 or "
            "DeepSpeed ZeRO-3). Rate a whole model: before the trainer is made, and with ZeRO-3 before its "
            "TrainingArguments, or load it again in a process of its own (`holdfast attribute`)."
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, and the mode it was in behind it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@no_library_bars()
def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model (with PEFT: its adapter) and its tokenizer as a Hugging Face folder."""
    if not world.leads():
        return
    model.save_pretrained(folder)
    give_usual_mode(folder)
    _keep_processor(model, folder)
    for name, config in getattr(model, "peft_config", {}).items():
        _order_sets(config, folder / ADAPTER if name == NAME else folder / name / ADAPTER)
    tokenizer.save_pretrained(folder)


def _keep_processor(model: Any, folder: Path) -> None:
    """Copy what a model's images go through first, which is no part of it: its weights are whole without."""
    from transformers.utils import cached_file

    if is_adapted(model) or text_part(model) is model:
        return
    for name in _PROCESSOR:
        missing: dict[str, Any] = {f"_raise_exceptions_for_{w}": False for w in _ABSENT}
        found = cached_file(str(model.config.name_or_path), name, local_files_only=True, **missing)
        if found is not None and not (folder / name).exists():
            (folder / name).write_bytes(Path(found).read_bytes())


def _order_sets(config: Any, file: Path) -> None:
    """Sort what PEFT keeps as sets: it writes them in an order that each process draws (PYTHONHASHSEED)."""
    if not file.is_file():
        return
    values = json.loads(file.read_text(encoding="utf-8"))
    for key, value in values.items():
        if isinstance(getattr(config, key, None), set):
            values[key] = sorted(value)
    file.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


def float_type(model: Any) -> FloatType:
    """The type that a model is loaded in: the widest of its weights', and under an adapter the base's own."""
    bare = unwrapped(model)
    if is_adapted(bare):  # PEFT keeps factors on 16-bit weights in float32, and does so again
        widest = bare.get_base_model().dtype
    else:
        types = {p.dtype for p in bare.parameters() if p.is_floating_point()}
        widest = functools.reduce(torch.promote_types, types) if types else torch.float32
    named = str(widest).removeprefix("torch.")
    return cast(FloatType, named) if named in get_args(FloatType) else "float32"


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
