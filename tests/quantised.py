"""Small models whose weights bitsandbytes keeps in 4 or 8 bits, and the same in plain floats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from holdfast.models import LoraOptions, ModelOptions, load_model, tiny_llama
from holdfast.models.adapters import lora_layers, plain_weight, under_lora
from holdfast.tasks import toy_tokenizer


def stored(folder: Path) -> Path:
    """A folder with a tiny Llama in full precision: 64 wide, a block of 4 bits having 64 values."""
    tokenizer = toy_tokenizer()
    tiny_llama(tokenizer, hidden=64, layers=2, heads=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def loaded(folder: Path, bits: Any, **options: Any) -> Any:
    """That model with a LoRA that has learned something, in `bits` or, without, in floats."""
    lora = LoraOptions(r=4, alpha=8.0, target_modules="all-linear")
    model, _ = load_model(ModelOptions(path=str(folder), lora=lora, quantise=bits, **options))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=draw))
    return model


def first_layer(model: Any) -> Any:
    """The layer under the first LoRA."""
    return under_lora(next(iter(lora_layers(model).values())))


def unpacked(folder: Path, quantised: Any) -> Any:
    """The same in floats, with the values that the quantised weights stand for."""
    model = loaded(folder, None)
    with torch.no_grad():
        for layer, of in zip(lora_layers(model).values(), lora_layers(quantised).values(), strict=True):
            layer.get_base_layer().weight.copy_(plain_weight(under_lora(of)))
    return model
