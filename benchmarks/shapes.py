"""The shapes that the benchmarks share: those of base-4m, a small Llama, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from holdfast.models import block_parameters

VOCABULARY = 8192


def base_4m_shapes(**options: Any) -> LlamaForCausalLM:
    """6 layers, hidden 192, 6 heads of which 3 for keys and values, intermediate 512, 8,192 tokens.

    Parameters
    ----------
    **options
        Further ones of `LlamaConfig`, such as special tokens.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        **options,
    )
    return LlamaForCausalLM(config)


def train_blocks_only(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Mark the linear maps of the blocks, and nothing else, as trained."""
    model.requires_grad_(False)
    for parameter in block_parameters(model, trainable_only=False).values():
        parameter.requires_grad_(True)
    return model.train()
