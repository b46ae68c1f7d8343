"""A new LoRA on a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from holdfast.errors import ModelError
from holdfast.models.options import LoraOptions
from holdfast.models.parts import beside_text, is_encoder_decoder, linear_modules, routers


def add_lora(model: Any, options: LoraOptions, seed: int = 0) -> Any:
    """Wrap the model in PEFT's LoRA; only the factors stay trainable.

    Raises
    ------
    ModelError
        A target module does not exist, or PEFT knows no default for this architecture.
    """
    from peft import LoraConfig, get_peft_model

    targets, left_out = options.target_modules, beside_text(model)
    if targets == "all-linear":
        left_out += routers(model)
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


def _pattern(paths: Sequence[str]) -> str:
    """A regular expression for modules and all in them; blocks that differ in their number are one."""
    numbered = (re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(path)) for path in paths)
    return rf"({'|'.join(dict.fromkeys(numbered))})(\..*)?"
