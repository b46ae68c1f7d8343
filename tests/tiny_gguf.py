"""A tiny Llama as llama.cpp stores one: 8-bit blocks, its order of rows, a byte-level vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
HEADS = 2


def tiny_gguf(path: Path) -> dict[str, torch.Tensor]:
    """Write it, and return the weights it stands for, by the names of transformers."""
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = [*(chr(c) for c in range(ord("!"), ord("~") + 1)), "Ġ", "Ċ", "ab", "<s>", "</s>"]
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    held = LlamaForCausalLM(config).state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    weights: dict[str, Any] = {}
    for name, tensor in held.items():
        rows = tensor
        if ".q_proj" in name or ".k_proj" in name:  # interleaved for its rotary embedding
            rows = tensor.view(HEADS, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        stored = rows.numpy()
        if tensor.dim() == 2:
            blocks = gguf.quants.quantize(stored, gguf.GGMLQuantizationType.Q8_0)
            stored = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(_stored_name(name), blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(_stored_name(name), stored)
        back = torch.from_numpy(stored.copy())
        if ".q_proj" in name or ".k_proj" in name:
            back = back.view(HEADS, -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        weights[name] = back
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def _stored_name(name: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, leaf = name.rsplit(".", 1)
    if stem in whole:
        return f"{whole[stem]}.{leaf}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{leaf}"
