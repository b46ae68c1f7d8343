"""The adapter of a PEFT model: LoRA's factors, more ranks for them, and loading one of another rank."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from holdfast.errors import ConfigError, ModelError
from holdfast.names import canonical_name
from holdfast.places import local_path
from holdfast.storage import write_tensors

ADAPTER = "adapter_config.json"
NAME = "default"  # the one adapter; PEFT saves it into the folder itself, others into folders of theirs
_FRESH = "fresh"
# what may be set in an adapter that stays the sum of its ranks: where it is, how large, and bookkeeping
_PLAIN = {
    *("r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config"),
}
# and what may be set where each layer's factors do nothing else than to add alpha / r · B A
_FACTORED = _PLAIN | {
    *("rank_pattern", "alpha_pattern", "layer_replication", "bias", "lora_bias", "modules_to_save"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("trainable_token_indices", "ensure_weight_tying", "megatron_config", "megatron_core"),
}


class Factors(NamedTuple):
    """LoRA in one layer, which adds alpha / r · B A x to the output for the input x; rsLoRA alpha / √r.

    Attributes
    ----------
    a : Parameter
        (r, input).
    b : Parameter
        (output, r).
    """

    a: nn.Parameter
    b: nn.Parameter


def is_adapted(model: nn.Module) -> bool:
    """Whether it is a model of PEFT's, of which an adapter is trained."""
    return hasattr(model, "peft_config")


def bare_of(model: Any) -> Any:
    """The model inside PEFT's wrapper; with an adapter by transformers' `add_adapter` it has none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_adapter(path: str) -> bool:
    """Whether a folder holds an adapter that PEFT saved."""
    try:
        return (local_path(path) / ADAPTER).is_file()
    except OSError:  # said where the model is looked for
        return False


def lora_layers(model: nn.Module, name: str = NAME) -> dict[str, Any]:
    """Canonical name of the weight to PEFT's layer, of all linear layers that an adapter adapts, in order."""
    found = {}
    for path, module in model.named_modules():
        a, b = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if isinstance(a, nn.ModuleDict) and isinstance(b, nn.ModuleDict) and name in a:
            found[canonical_name(f"{path}.weight")] = module
    return found


def lora_factors(model: nn.Module, name: str = NAME) -> list[Factors]:
    """The factors of an adapter in all adapted linear layers, in the model's order."""
    layers = lora_layers(model, name).values()
    return [Factors(layer.lora_A[name].weight, layer.lora_B[name].weight) for layer in layers]


def scale_of(layer: Any) -> float:
    """alpha / r (of rsLoRA alpha / √r), of a layer of `lora_layers`."""
    return float(layer.scaling[NAME])


def scale_ratio(rslora: bool, rank: int, other: int) -> float:
    """How much larger alpha is at one rank than at another, for the same scale of B A.

    alpha / r, or alpha / √r of rsLoRA (Kalajdzievski 2023, arXiv 2312.03732).
    """
    return (rank / other) ** 0.5 if rslora else rank / other


def rank_of(model: Any) -> int:
    """The adapter's rank."""
    return int(model.peft_config[NAME].r)


def check_growable(model: Any, strategy: str) -> None:
    """See that the model has one plain LoRA adapter, for a strategy that stacks those of all tasks in it.

    Raises
    ------
    ConfigError
        As `check_plain_lora`.
    """
    stacks = "stacks the LoRAs of all tasks in one adapter"
    check_plain_lora(model, strategy, "trains a new LoRA for each task", stacks)


def check_plain_lora(model: Any, strategy: str, does: str, needs: str) -> None:
    """See that the model has one plain LoRA adapter: one whose output is the sum of its ranks' outputs.

    Parameters
    ----------
    strategy : str
    does, needs : str
        What it does with LoRA, and what it does that only plain LoRA allows; for the messages.

    Raises
    ------
    ConfigError
        It has none, or one that is more than that sum: DoRA, biases, patterns of ranks, and so on.
    """
    configs = getattr(model, "peft_config", {})
    kind = getattr(getattr(configs.get(NAME), "peft_type", None), "value", None)
    if kind != "LORA" or len(configs) != 1:
        raise ConfigError(
            f"strategy.name: '{strategy}' {does}, and this model has "
            f"{f'adapters {sorted(configs)}' if configs else 'no LoRA'}. Set model.lora, such as "
            "`lora: {r: 8}`, or give the folder of one LoRA adapter as model.path."
        )
    config = configs[NAME]
    plain = type(config)()
    odd = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in _PLAIN and getattr(config, field.name) != getattr(plain, field.name)
    }
    # as plain as the default; others change the base's weights
    if odd.get("init_lora_weights") == "gaussian":
        del odd["init_lora_weights"]
    layers = [module.lora_A[NAME] for module in model.modules() if NAME in getattr(module, "lora_A", {})]
    if any(NAME in getattr(module, "lora_embedding_A", {}) for module in model.modules()):
        odd["target_modules"] = "an embedding"
    elif not all(isinstance(layer, nn.Linear) for layer in layers):
        odd["target_modules"] = "a convolution"
    if odd:
        said = ", ".join(f"{key} = {value}" for key, value in odd.items())
        raise ConfigError(
            f"strategy.name: '{strategy}' {needs}. That is defined for plain LoRA on linear layers alone, "
            f"and this adapter has {said}. Give a plain one (model.lora), or take another strategy."
        )


def check_saved_whole(model: Any) -> None:
    """See that all that is trained is in what PEFT saves of the one adapter.

    Raises
    ------
    ModelError
        Weights of the base are trained beside the adapter, or the adapter has a name of its own.
    """
    if not is_adapted(model):
        return
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    left = [name for name in trained if NAME not in name.split(".")]
    if left and NAME in model.peft_config:
        saved = _names_saved(model)  # biases, and embeddings that were resized
        left = [name for name in left if name not in saved]
    if not left:
        return
    names = ", ".join(canonical_name(name) for name in left[:3])
    raise ModelError(
        f"Learner: what is learned is kept as PEFT's adapter '{NAME}', and {len(left)} of the {len(trained)} "
        f"trained tensors are not in it: {names}{', ...' if left[3:] else ''}. They would be lost when the "
        "model is loaded again. Give the adapter no name of its own (get_peft_model(model, config)), name "
        "modules that are trained beside it in the config's `modules_to_save`, or don't train them."
    )


def _names_saved(model: Any) -> set[str]:
    """What of a model PEFT saves with the adapter, without the adapter's name."""
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells of embeddings, and does so again when it saves
        return set(get_peft_model_state_dict(model, adapter_name=NAME))


def grow(model: Any, ranks: int, seed: int) -> None:
    """Append ranks to the adapter that leave the model's output as it is: A by PEFT's own start, B zero.

    The factors become A = [A; A_new], stacked by rows, and B = [B, B_new] by columns; alpha grows with the
    rank, so their scale stays. It is a plain PEFT adapter before and after. The factors are new parameters:
    make optimizers afterwards.

    Parameters
    ----------
    ranks : int
        How many.
    seed : int
        Of A_new, which is what a LoRA of this rank would start with.
    """
    config, before = model.peft_config[NAME], lora_factors(model)
    rank = config.r + ranks
    fresh = _fresh(model, ranks, seed)
    _resize(model, rank, config.lora_alpha * scale_ratio(config.use_rslora, rank, config.r))
    with torch.no_grad():
        for now, old, new in zip(lora_factors(model), before, fresh, strict=True):
            now.a.copy_(torch.cat([old.a, new.a]))
            now.b.copy_(torch.cat([old.b, new.b], dim=1))


def restart(model: Any, seed: int) -> None:
    """Begin the adapter anew, in place: A by PEFT's own start, B zero.

    Parameters
    ----------
    seed : int
        Of A.
    """
    fresh = _fresh(model, rank_of(model), seed)
    with torch.no_grad():
        for now, new in zip(lora_factors(model), fresh, strict=True):
            now.a.copy_(new.a)
            now.b.zero_()


def _fresh(model: Any, rank: int, seed: int) -> list[Factors]:
    """Factors as a new adapter of this rank begins with."""
    with torch.random.fork_rng(devices=[]):  # PEFT draws on the CPU
        torch.manual_seed(seed)
        model.add_adapter(_FRESH, replace(model.peft_config[NAME], r=rank))
    fresh = lora_factors(model, _FRESH)
    model.delete_adapter(_FRESH)
    return fresh


def under_lora(module: nn.Module) -> nn.Module:
    """The layer under a layer of LoRA's; of any other module itself."""
    return module.get_base_layer() if hasattr(module, "lora_A") else module  # type: ignore[operator]


def under_adapter(model: nn.Module) -> dict[str, nn.Parameter]:
    """Canonical name to the weight under the adapter, of each adapted map."""
    return {name: layer.get_base_layer().weight for name, layer in lora_layers(model).items()}


def is_quantised(layer: nn.Module) -> bool:
    """Whether a linear layer's weight is stored in fewer bits than a float has."""
    if not hasattr(layer, "in_features") or hasattr(layer, "lora_A"):
        return False
    every = {**layer._buffers, **layer._parameters}
    weight = every.get("weight")  # its indices (OFT's) are none; some packed layers have none of that name
    own = [t for t in every.values() if t is not None] if weight is None else [weight]
    foreign = ("torchao.", "optimum.quanto.")  # tensors that say they are floats
    packed = any(not t.is_floating_point() or t.element_size() < 2 for t in own)
    return packed or any(type(t.data).__module__.startswith(foreign) for t in own)


def stay_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4 bits for answers on a CPU (AVX-512 BF16): no gradient passes then.

    Raises
    ------
    ModelError
        It has done so already, and not kept the scales as they were.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            raise ModelError(
                "the model has answered before, for which bitsandbytes repacked its 4 bits on this CPU "
                f"('{name}' is): no gradient passes through them any more. Load it again, and give it to "
                "holdfast before it answers anything."
            )
        module.support_avx512bf16_for_cpu = False


@torch.no_grad()
def plain_weight(layer: Any) -> Tensor:
    """The weight of a linear layer, (O, I), detached; of a quantised one what it does to each unit vector."""
    if not is_quantised(layer):
        weight = layer.weight.detach()
        return weight if isinstance(layer, nn.Linear) else weight.t()  # transformers' Conv1D
    some = next(layer.parameters())
    dtype = some.dtype if some.is_floating_point() else torch.get_default_dtype()
    w_IO = layer(torch.eye(layer.in_features, dtype=dtype, device=some.device))
    return (w_IO if layer.bias is None else w_IO - layer.bias).t()


@torch.no_grad()
def merge_in(model: nn.Module) -> None:
    """Add alpha / r · B A to the weights under the adapter, in place; the factors stay as they are."""
    for layer in lora_layers(model).values():
        weight = layer.get_base_layer().weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight.copy_(weight.to(wide) + layer.get_delta_weight(NAME).to(wide))


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """PEFT turns ``requires_grad`` of the whole adapter off and on again, of what a strategy froze too."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _resize(model: Any, rank: int, alpha: float) -> None:
    """Replace the adapter by one of another rank, with arbitrary weights."""
    config, training = model.peft_config[NAME], model.training
    model.delete_adapter(NAME)
    with torch.random.fork_rng(devices=[]):
        model.add_adapter(NAME, replace(config, r=rank, lora_alpha=alpha))
    model.set_adapter(NAME)
    model.train(training)  # modules that were made just now are in training mode


def load_adapter(model: Any, folder: Path) -> None:
    """Put the adapter that `save_model` wrote into a model's, whatever its rank."""
    from peft import load_peft_weights, set_peft_model_state_dict

    saved = json.loads((folder / ADAPTER).read_text())
    if saved["peft_type"] == "LORA" and saved["r"] != rank_of(model):
        _resize(model, saved["r"], saved["lora_alpha"])
    found: Any = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    if found.unexpected_keys:
        raise ModelError(
            f"{folder}: {len(found.unexpected_keys)} tensors of this adapter belong to nothing in the model, "
            f"such as {canonical_name(found.unexpected_keys[0])}. Give the model that it was trained on."
        )


@torch.no_grad()
def recompress(folder: Path, rank: int) -> float:
    """Give a saved LoRA another, lower rank: the closest one in each layer, by SVD of B A. Its scale stays.

    Parameters
    ----------
    folder : path
        As PEFT's ``save_pretrained`` writes it; its two files are replaced.
    rank : int

    Returns
    -------
    float
        The share of the squared size of all B A that is left.

    Raises
    ------
    ConfigError
        The adapter is no plain LoRA on linear layers, or has no more ranks than that.
    """
    from peft import LoraConfig

    file, config = folder / "adapter_model.safetensors", json.loads((folder / ADAPTER).read_text())
    ranks = {config.get("r"), *config.get("rank_pattern", {}).values()}
    odd = [f"peft_type = {config['peft_type']}"] if config["peft_type"] != "LORA" else []
    if len(ranks) > 1:
        odd.append(f"rank_pattern = {config['rank_pattern']}")
    if not odd:
        usual = LoraConfig().to_dict()
        of_more = {key: value for key, value in config.items() if value and key not in _FACTORED}
        odd += [f"{key} = {value}" for key, value in of_more.items() if value != usual.get(key)]
    tensors = load_file(file)
    if any(".lora_embedding_" in name for name in tensors):
        odd.append("target_modules = an embedding")
    if any(".lora_A." in name and tensor.dim() != 2 for name, tensor in tensors.items()):
        odd.append("target_modules = a convolution")
    if odd:
        raise ConfigError(
            f"{folder}: only plain LoRA of one rank on linear layers can be recompressed, and this adapter "
            f"has {', '.join(odd)}. Leave the rank out."
        )
    if rank >= config["r"]:
        raise ConfigError(
            f"rank: got {rank}, but the adapter has {config['r']} ranks; recompressed it has fewer. Allowed: "
            f"1 to {config['r'] - 1}; or leave it out to get the adapter as it is."
        )
    left = whole = 0.0
    for name in [n for n in tensors if n.endswith(".lora_A.weight")]:
        over = name.replace(".lora_A.", ".lora_B.")
        a_RI, b_OR = tensors[name].double(), tensors[over].double()
        (q_OR, r_RR), (p_IR, s_RR) = torch.linalg.qr(b_OR), torch.linalg.qr(a_RI.t())
        u_RR, sizes_R, v_RR = torch.linalg.svd(r_RR @ s_RR.t())
        root = sizes_R[:rank].sqrt()
        tensors[over] = ((q_OR @ u_RR[:, :rank]) * root).to(tensors[over].dtype).contiguous()
        tensors[name] = (root[:, None] * (v_RR[:rank] @ p_IR.t())).to(tensors[name].dtype).contiguous()
        left += float(sizes_R[:rank].square().sum())
        whole += float(sizes_R.square().sum())
    ratio = scale_ratio(bool(config.get("use_rslora")), rank, config["r"])
    alphas = {module: alpha * ratio for module, alpha in config.get("alpha_pattern", {}).items()}
    config |= {"lora_alpha": config["lora_alpha"] * ratio, "r": rank}
    config |= {"alpha_pattern": alphas, "rank_pattern": {}}
    write_tensors(file, tensors, {"format": "pt"})
    (folder / ADAPTER).write_text(json.dumps(config, indent=2, sort_keys=True))
    return left / whole if whole else 1.0
