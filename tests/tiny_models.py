"""Random models of several architectures for the toy suite's tokenizer, by name."""

from __future__ import annotations

from typing import Any

import torch

from holdfast.models import LoraOptions, add_lora, tiny_llama
from holdfast.tasks import toy_tokenizer
from tiny_t5 import tiny_t5


def tiny_model(kind: str) -> Any:
    """A "llama", "llama-lora", "gpt2", "bloom" or "t5" of hidden size 16, always the same, in eval mode."""
    tokenizer = toy_tokenizer()
    size = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        model: Any = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=128, **size))
    elif kind == "bloom":
        from transformers import BloomConfig, BloomForCausalLM

        model = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=2, n_head=2, **size))
    elif kind == "t5":
        model = tiny_t5(tokenizer, d_model=16, d_ff=32, num_heads=2, dropout_rate=0.0)
    else:
        model = tiny_llama(tokenizer, hidden=16, layers=2, heads=2)
    if kind == "llama-lora":
        model = add_lora(model, LoraOptions(r=4))
    return model.eval()
