"""A random encoder-decoder model for the toy suite's tokenizer, in memory or as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from holdfast.tasks import toy_tokenizer


def tiny_t5(tokenizer: Any = None, seed: int = 0, **options: Any) -> Any:
    """A T5 of hidden size 32 with 2 blocks a stack, or of other sizes, in training mode."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = toy_tokenizer() if tokenizer is None else tokenizer
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, **options}
    config = T5Config(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(config)


def write_tiny_t5(folder: Path, **options: Any) -> Path:
    """The same with its tokenizer, as a user would have it in a folder."""
    tokenizer = toy_tokenizer()
    tiny_t5(tokenizer, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
