"""The adapter of a PEFT model: LoRA's factors, more ranks for them, and loading one of another rank."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from holdfast.errors import ConfigError
from holdfast.names import canonical_name

ADAPTER = "adapter_config.json"
NAME = "default"  # the one adapter; PEFT saves it into the folder itself, others into folders of theirs
_FRESH = "fresh"
# what may be set in an adapter that stays the sum of its ranks: where it is, how large, and bookkeeping
_PLAIN = {
    *("r", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config"),
}


class Factors(NamedTuple):
    """LoRA in one layer, which adds alpha / r · B A x to the output for the input x.

    Attributes
    ----------
    a : Parameter
        (r, input).
    b : Parameter
        (output, r).
    """

    a: nn.Parameter
    b: nn.Parameter


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
    """alpha / r, of a layer of `lora_layers`."""
    return float(layer.scaling[NAME])


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
        It has none, or one that is more than that sum: DoRA, rsLoRA, biases, patterns of ranks, and so on.
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


def grow(model: Any, ranks: int, seed: int) -> None:
    """Append ranks to the adapter that leave the model's output as it is: A by PEFT's own start, B zero.

    The factors become A = [A; A_new], stacked by rows, and B = [B, B_new] by columns; alpha grows with the
    rank, so alpha / rank stays. It is a plain PEFT adapter before and after. The factors are new parameters:
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
    with torch.random.fork_rng(devices=[]):  # PEFT draws on the CPU
        torch.manual_seed(seed)
        model.add_adapter(_FRESH, replace(config, r=ranks))
    fresh = lora_factors(model, _FRESH)
    model.delete_adapter(_FRESH)
    _resize(model, rank, config.lora_alpha * rank / config.r)
    with torch.no_grad():
        for now, old, new in zip(lora_factors(model), before, fresh, strict=True):
            now.a.copy_(torch.cat([old.a, new.a]))
            now.b.copy_(torch.cat([old.b, new.b], dim=1))


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
    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
