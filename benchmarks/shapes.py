"""The models that the benchmarks share: random Llamas of several shapes, base-4m's among them."""

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
    return llama(192, 6, intermediate=512, heads=6, key_value_heads=3, vocabulary=VOCABULARY, **options)


def llama(
    hidden: int,
    blocks: int,
    *,
    intermediate: int | None = None,
    heads: int | None = None,
    key_value_heads: int | None = None,
    vocabulary: int = 512,
    **options: Any,
) -> LlamaForCausalLM:
    """A Llama with random weights, the same at each call.

    Parameters
    ----------
    intermediate : int, optional
        Default: 8/3 of `hidden`, a multiple of 64.
    heads, key_value_heads : int, optional
        Default: of 64 each; as many as heads.
    **options
        Further ones of `LlamaConfig`.
    """
    torch.manual_seed(0)
    heads = heads or hidden // 64
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate or hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads or heads,
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
