"""Tiny random models of the families that transformers has, and what attribution makes of each.

python tests/model_families.py            # writes docs/model-families.md
"""

from __future__ import annotations

import re
import sys
import warnings
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from attribution_models import ROWS
from holdfast.attribution import AttributionOptions, attribute_batches, per_sample_gradients
from holdfast.errors import HoldfastError
from holdfast.importance import compute_prior
from holdfast.importance.aggregate import AbsoluteMean, SquareMean
from holdfast.importance.beside import left_to_rate
from holdfast.importance.fisher import FisherOptions
from holdfast.importance.inputs import InputsOptions
from holdfast.models import block_parameters, is_encoder_decoder, text_part
from holdfast.names import layer_of
from holdfast.tasks.encode import IGNORED, collate

# Sizes by the names that configurations give them; each family takes the ones that it has.
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "d_ff": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "sliding_window": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "state_size": 8,
    "time_step_rank": 4,
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_ssm": 64}
_LINEAR_ATTENTION = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_STATE = {"conv_kernel": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4}
_INDEXER = {"num_key_value_heads": 4, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 4}
_DECODER = {"is_decoder": True}
_TEXT = {
    key: SIZES[key]
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    )
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_WINDOWS = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 4,
    "d_rel": 4,
    "rel_extent": 4,
    "log_scaling_n_floor": 4,
}
_TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
_GEMMA4 = {**_TWO_KINDS, "global_head_dim": 8}
_COMPASS = {
    **_TWO_KINDS,
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        for kind in ("sliding_attention", "full_attention")
    },
}
_SPEECH = {
    "t2u_vocab_size": 64,
    "speech_encoder_layers": 1,
    "speech_encoder_attention_heads": 4,
    "speech_encoder_intermediate_size": 16,
    "t2u_encoder_layers": 1,
    "t2u_decoder_layers": 1,
    "t2u_encoder_ffn_dim": 16,
    "t2u_decoder_ffn_dim": 16,
    "t2u_encoder_attention_heads": 4,
    "t2u_decoder_attention_heads": 4,
    "upsample_initial_channel": 32,
    "unit_embed_dim": 8,
    "lang_embed_dim": 8,
    "spkr_embed_dim": 8,
    "unit_hifi_gan_vocab_size": 64,
}
_T5GEMMA = {**_TEXT, "head_dim": 8, "sliding_window": 4}
# What a family needs beyond its sizes. None of these says anything about attribution.
EXTRA: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "aria_text": {},
    "axk1": {"num_key_value_heads": 4},
    # scores of keys that are 0 after their ReLU tie: which of them are taken would depend on the padding
    "axk2": {
        **_INDEXER,
        "index_topk": 64,
        "mlp_layer_types": ["dense", "sparse"],
        "gated_norm_rank": 4,
    },
    "bailing_hybrid": {},
    "beam": {},
    "bert": _DECODER,
    "bert-generation": _DECODER,
    "big_bird": {**_DECODER, "attention_type": "original_full"},
    "bitnet": {},
    "camembert": _DECODER,
    "cohere2_moe": {},
    "cohere_compass_text": _COMPASS,
    "cpmant": {
        "dim_head": 8,
        "dim_ff": 48,
        "prompt_types": 3,
        "prompt_length": 4,
        "segment_types": 3,
        "position_bias_num_buckets": 8,
        "position_bias_max_distance": 16,
    },
    "cwm": {},
    "data2vec-text": _DECODER,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        "max_seq_len": 64,
    },
    "deepseek_v32": {**_INDEXER, "first_k_dense_replace": 1},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 3,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 2,
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "diffllama": {},
    "doge": {},
    "dots3_note_text": {**_INDEXER, "shared_experts_intermediate_size": 16},
    "electra": {**_DECODER, "embedding_size": 16},
    "emu3": {"text_config": _TEXT},
    "ernie": _DECODER,
    "exaone_moe": {},
    "flint": {},
    "fuyu": {"text_config": {**_TEXT, "model_type": "persimmon"}, "patch_size": 2, "image_size": 4},
    "gemma4_text": {**_GEMMA4, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8},
    "gemma4_unified_text": _GEMMA4,
    "git": {"vision_config": _VISION},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "glm_moe_dsa": {**_INDEXER, "first_k_dense_replace": 1},
    "gpt-sw3": {},
    "gpt_neox_japanese": {},
    "granite_swa": {},
    "granitemoe_swa": {},
    "hrm_text": {},
    "hy_v3": {},
    "hy_v4": {},
    "hyperclovax": {},
    "inkling2_text": {**_WINDOWS, "unpadded_vocab_size": 64},
    "inkling_text": {
        **_WINDOWS,
        "n_shared_experts": 1,
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["hybrid_sliding", "hybrid"],
    },
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "kimi_linear": {
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "num_key_value_heads": 4,
    },
    "kolibri1": {},
    "laguna": {},
    "lfm3": {},
    "longcat_flash": {
        "num_key_value_heads": 4,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 16,
        "moe_topk": 2,
        "zero_expert_num": 2,
    },
    "megatron-bert": _DECODER,
    "mellum": {},
    "mimo_v2_flash": {},
    "minicpm3": {"num_key_value_heads": 4},
    "minimax_m2": {},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_n_heads": 2,
        "index_head_dim": 8,
        "dense_intermediate_size": 48,
        "shared_intermediate_size": 24,
    },
    "ministral": {},
    "ministral3": {},
    "mllama": {
        "text_config": {**_TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1]},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
        },
    },
    "moshi": {"audio_vocab_size": 64},
    "nanochat": {},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe", "mlp"],
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "chunk_size": 4,
        "moe_shared_expert_intermediate_size": 24,
        "use_mamba_kernels": False,
    },
    "olmo_hybrid": {},
    "phi4_multimodal": {
        "vision_config": {
            **_VISION,
            "num_hidden_layers": 2,
            "image_size": 28,
            "crop_size": 28,
            "patch_size": 14,
            "image_token_id": 62,
        },
        "audio_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 16,
            "bias_max_distance": 8,
            "audio_token_id": 61,
        },
    },
    "qwen4_exp_text": {
        **_LINEAR_ATTENTION,
        "hc_count": 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "rembert": {**_DECODER, "input_embedding_size": 16, "output_embedding_size": 32},
    "roberta": _DECODER,
    "roberta-prelayernorm": _DECODER,
    "roc_bert": {
        **_DECODER,
        "pronunciation_vocab_size": 64,
        "shape_vocab_size": 64,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "roformer": _DECODER,
    "seamless_m4t": {**_SPEECH, "num_conv_pos_embedding_groups": 4},
    "seamless_m4t_v2": {
        **_SPEECH,
        "char_vocab_size": 64,
        "variance_predictor_embed_dim": 8,
        "variance_predictor_hidden_dim": 8,
    },
    "solar_open": {},
    "t5gemma": {"encoder": _T5GEMMA, "decoder": _T5GEMMA},
    "trocr": _DECODER,
    "xlm-roberta": _DECODER,
    "xlm-roberta-xl": _DECODER,
    "xlnet": {"d_inner": 48},
    "xlstm": {},
    "xmod": {**_DECODER, "default_language": "en_XX"},
    "youtu": {"num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "apertus": {},
    "arcee": {},
    "bamba": {**_MAMBA, "attn_layer_indices": [1], "mamba_chunk_size": 4},
    "bart": {},
    "bigbird_pegasus": {"block_size": 4, "attention_type": "original_full"},
    "biogpt": {},
    "blenderbot": {},
    "blenderbot-small": {},
    "bloom": {},
    "codegen": {"rotary_dim": 4, "n_inner": 48, "n_ctx": 64},
    "cohere": {},
    "cohere2": {},
    "ctrl": {"dff": 48},
    "deepseek_v2": {"first_k_dense_replace": 1, "num_key_value_heads": 4, "topk_method": "greedy"},
    "deepseek_v3": {"first_k_dense_replace": 1, "num_key_value_heads": 4},
    "dots1": {"first_k_dense_replace": 1},
    "ernie4_5": {},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_layer_start_index": 0,
        "moe_num_shared_experts": 1,
    },
    "exaone4": {},
    "falcon": {},
    "falcon_h1": {**_MAMBA, "mamba_chunk_size": 4},
    "falcon_mamba": {},
    "flex_olmo": {},
    "fsmt": {"src_vocab_size": 64, "tgt_vocab_size": 64, "langs": ["en", "de"], "tie_word_embeddings": False},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [48] * 4,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": {"first_k_dense_replace": 1},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gpt_neox": {},
    "gpt_oss": {},
    "gptj": {"rotary_dim": 4},
    "granite": {},
    "granitemoe": {},
    "granitemoeshared": {"shared_intermediate_size": 24},
    "granitemoehybrid": {
        **_MAMBA,
        "shared_intermediate_size": 24,
        "layer_types": ["mamba", "attention"],
        "mamba_chunk_size": 4,
        "position_embedding_type": "rope",
    },
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False},
    "jetmoe": {"kv_channels": 8, "num_key_value_heads": 2},
    "led": {
        "attention_window": 4,
        "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama": {},
    "llama4_text": {"intermediate_size_mlp": 48, "moe_layers": [0, 1], "num_experts_per_tok": 1},
    "longt5": {"local_radius": 3, "encoder_attention_type": "local"},
    "m2m_100": {},
    "mamba": {},
    "mamba2": dict(_STATE),
    "marian": {"decoder_vocab_size": 64},
    "mbart": {},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 4},
    "mistral": {},
    "mixtral": {},
    "modernbert-decoder": {},
    "mpt": {"attn_config": {}, "max_seq_len": 64},
    "mt5": {},
    "mvp": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {},
    "openai-gpt": {},
    "opt": {"word_embed_proj_dim": 32},
    "pegasus": {},
    "pegasus_x": {"num_global_tokens": 2, "block_size": 4},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "plbart": {},
    "prophetnet": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_next": dict(_LINEAR_ATTENTION),
    "qwen3_5_text": dict(_LINEAR_ATTENTION),
    "qwen3_5_moe_text": dict(_LINEAR_ATTENTION),
    "recurrent_gemma": {
        "lru_width": 32,
        "attention_window_size": 4,
        "block_types": ["recurrent", "attention"],
    },
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "d_kv": 8},
    "t5": {},
    "umt5": {},
    "nllb-moe": {"expert_capacity": 64, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "vaultgemma": {},
    "xglm": {"attention_heads": 4},
    "zamba2": {
        **_MAMBA,
        "n_mamba_heads": 4,
        "mamba_expand": 2,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "chunk_size": 4,
        "layers_block_type": ["mamba", "hybrid"],
        "num_mem_blocks": 1,
        "use_mem_rope": False,
        "adapter_rank": 4,
    },
}

# Models that see images too, of which text goes through the language model alone.
EYES = {"depth": 2, "num_heads": 4, "out_hidden_size": 32, "embed_dim": 32, "image_size": 16, "patch_size": 4}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_MROPE_HALF = {"rope_parameters": {**_MROPE["rope_parameters"], "mrope_section": [1, 1, 0]}}
SEEING: dict[str, dict[str, Any]] = {
    "aria": {},
    "aya_vision": {},
    "cohere_compass": _COMPASS,
    "deepseek_vl": {},
    "exaone4_5": {},
    "gemma3": {},
    "glm46v": _MROPE,
    "glm4v": _MROPE,
    "got_ocr2": {},
    "glm4v_moe": {**_MROPE_HALF, "first_k_dense_replace": 1},
    "idefics2": {},
    "idefics3": {},
    "internvl": {},
    "kimi_k25": {"first_k_dense_replace": 1, "num_key_value_heads": 4},
    "lfm2_vl": EXTRA["lfm2"],
    "lighton_ocr": {},
    "llama4": EXTRA["llama4_text"],
    "llava": {},
    "llava_next": {},
    "llava_next_video": {},
    "llava_onevision": {},
    "mistral3": {},
    "paddleocr_vl": _MROPE,
    "paligemma": {},
    "qianfan_ocr": {},
    "qwen2_5_vl": _MROPE,
    "qwen2_vl": _MROPE,
    "qwen3_5": _LINEAR_ATTENTION,
    "qwen3_5_moe": _LINEAR_ATTENTION,
    "qwen3_vl": {},
    "qwen3_vl_moe": {},
    "smolvlm": {},
    "video_llama_3": {},
    "video_llava": {},
    "vipllava": {},
}

# Their own code fills a float32 mask with the lowest float64, so they can't run in float64.
SINGLE = {"fsmt", "prophetnet", "xglm"}


def _accepted(config_class: Any) -> set[str]:
    names = {field.name for field in fields(config_class)} if is_dataclass(config_class) else set()
    return names | set(getattr(config_class, "attribute_map", {}))


def _sized(config_class: Any, sizes: dict[str, Any], extra: dict[str, Any]) -> Any:
    accepted = _accepted(config_class)
    known = {key: value for key, value in sizes.items() if key in accepted or key.endswith("token_id")}
    return config_class(**known | extra)


def family(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model of a family, in evaluation mode; norms and biases are random, so they absorb something."""
    whole: Any = tf.AutoConfig.for_model(name)
    if name in SEEING:
        text = _sized(type(whole.text_config), SIZES, SEEING[name])
        config = type(whole)(
            text_config=text, vision_config=_sized(type(whole.vision_config), SIZES | EYES, {})
        )
    else:
        config = _sized(type(whole), SIZES, EXTRA[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto: Any = tf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else tf.AutoModelForCausalLM
        model = (
            (tf.AutoModelForImageTextToText if name in SEEING else auto).from_config(config).to(dtype).eval()
        )
        read = {id(p) for p in text_part(model).parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(name not in SEEING or id(parameter) in read)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
                elif parameter.dim() == 3 and not parameter.isfinite().all():
                    parameter.normal_(std=0.1)
    return model


@dataclass(frozen=True)
class Measured:
    """What attribution makes of a family.

    Attributes
    ----------
    relevance : float or None
        |sum of R - Z| / |Z| of `lrp` in float64; None where it refuses.
    gradient : float
        Largest difference of the mean squared gradient of single samples from autograd's, one sample at a
        time and without this library, relative to the tensor's largest value.
    rated : float
        Share of the weights inside the blocks that have an importance.
    reached : float
        Share of those that relevance reaches (0 where it refuses).
    by_inputs : float or None
        Share of the rated that the default holds by inputs; None where it refuses.
    note : str
        Why `lrp` refuses, or why samples go one by one.
    """

    relevance: float | None
    gradient: float
    rated: float
    reached: float
    by_inputs: float | None
    note: str


def squares(model: Any) -> dict[str, torch.Tensor]:
    """Mean over the rows of autograd's squared gradients of log p(answer), one row at a time, unpadded."""
    wanted = block_parameters(model)
    total = {name: torch.zeros_like(p) for name, p in wanted.items()}
    for row in ROWS:
        batch = collate([row], 0, encoder_decoder=is_encoder_decoder(model), first_position=None)
        labels = batch.pop("labels")
        if is_encoder_decoder(model):
            batch["decoder_input_ids"] = torch.cat([decoder_start(model, labels), labels[:, :-1]], dim=1)
        logits = model(**batch, use_cache=False).logits
        if not is_encoder_decoder(model):
            logits, labels = logits[:, :-1], labels[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum", ignore_index=IGNORED)
        for name, grad in zip(
            wanted, torch.autograd.grad(loss, list(wanted.values()), allow_unused=True), strict=True
        ):
            if grad is not None:
                total[name] += grad**2 / len(ROWS)
    return total


def decoder_start(model: Any, labels: torch.Tensor) -> torch.Tensor:
    """The token that a family's decoder starts with: that of mBART and its kin is the answer's last."""
    if model.config.model_type in ("mbart", "plbart", "fsmt"):
        return labels[:, -1:]
    return torch.full_like(labels[:, :1], model.config.decoder_start_token_id)


def measure(name: str) -> Measured:
    """Attribute a family's tiny model, and compare its gradients with autograd's."""
    model = family(name, torch.float32 if name in SINGLE else torch.float64)
    kept = {key: block_parameters(model)[key] for key in block_parameters(model)}
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    inside = sum(p.numel() for key, p in trained.items() if layer_of(key) is not None)
    fold, relevance, reached, note = AbsoluteMean(), None, 0, ""
    try:
        report = attribute_batches(
            model, ROWS, options=AttributionOptions(), fold=fold, pad_id=0, correct_only=False
        )
        relevance = report.conservation_max_relative_error
        reached = sum(p.numel() for key, p in kept.items() if key not in report.unreached)
        note = report.one_at_a_time and "one sample at a time"
        note = "float32" if name in SINGLE else note
    except HoldfastError as error:
        found = re.search(r"the operation '[^']*'", str(error))
        note = f"`lrp` refuses: {found[0] if found else str(error).split(':')[0]}"
    # some families can't run in float64 by themselves
    means, single = SquareMean(per_weight=True), family(name, torch.float32)
    per_sample_gradients(single, ROWS, fold=means, pad_id=0)
    found_squares, expected = means.result(), squares(single)
    largest = max(float(e.max()) for e in expected.values())
    worst = max(
        float((found_squares[key] - e).abs().max()) / max(float(e.max()), 1e-6 * largest)
        for key, e in expected.items()
    )
    weights = sum(p.numel() for p in kept.values())
    by_inputs = None if relevance is None else held_by_inputs(single) / weights
    return Measured(relevance, worst, weights / inside, reached / weights, by_inputs, note)


def held_by_inputs(model: Any) -> int:
    """How many weights the default holds by inputs; all others that are rated it holds beside.

    Raises
    ------
    AssertionError
        A rated weight is held by neither.
    """
    kept = block_parameters(model)
    prior = compute_prior(model, ROWS, InputsOptions(correct_only=False), pad_id=0)
    left = left_to_rate(model, FisherOptions(), prior)
    assert kept.keys() <= prior.tensors.keys() | left.keys()
    return sum(p.numel() for name, p in kept.items() if name in prior.tensors)


_HEAD = """# Model families

What attribution makes of every family that `python tests/model_families.py` can build: tiny, random, in
float64, no line of code about any of them.

* **LRP error**: what is lost of the relevance, |ΣR − Z| / |Z|, with the ½ of Lemma 4.1 on the path.
* **Gradient error**: squared gradients of single samples against autograd's on each sample alone, relative to
  the largest of the tensor, in float32.
* **Rated**: the share of the weights inside the blocks that gets an importance. The rest are norms, decay
  rates and the like.
* **Reached**: the share of those that relevance reaches in a text of a few tokens (an expert that is a module
  of its own and was not chosen is not reached; a stack of experts is, as a whole).
* Of models that see images too: of the language model, which text goes through.
* **By inputs**: the share of the rated that the default holds by the inputs of linear maps. All else that
  is rated (experts, biases, convolutions) it holds beside them, weight by weight.

| family | LRP error | gradient error | rated | reached | by inputs | |
|---|---|---|---|---|---|---|
"""


def table() -> str:
    """docs/model-families.md."""
    lines = []
    for name in sorted(EXTRA | SEEING):
        m = measure(name)
        error = "refused" if m.relevance is None else f"{m.relevance:.0e}"
        held = "–" if m.by_inputs is None else f"{m.by_inputs:.1%}"
        shares = f"{m.rated:.1%} | {m.reached:.1%} | {held}"
        lines.append(f"| {name} | {error} | {m.gradient:.0e} | {shares} | {m.note} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return _HEAD + "\n".join(lines) + "\n" + _TAIL


_TAIL = """
Not in the table, of the families that transformers lists as language models:

* Not built here: those that hear (whisper, musicgen, musicgen_melody, audioflamingo3, glmasr, granite_speech,
  granite_speech_plus, moss_transcribe_diarize, musicflamingo, nemo_speechlm, qwen2_audio, qwen3_asr,
  vibevoice_asr, voxtral, voxtral_realtime); those that continue another model's states (gemma4_assistant,
  gemma4_unified_assistant) or are put together of two (encoder-decoder); t5gemma2, whose encoder sees images;
  and dots3_note, gemma4, gemma4_unified and qwen4_exp, whose language models are in the table by themselves.
* They need packages that are not here: gemma3n (timm; its language model is gemma3n_text).
* Not small by sizes alone: blt (a second model cuts its bytes into patches).
* zamba: `lrp` refuses it at the operation 'matmul' (a batch of weights on the left). Its layers share
  weights, which the shares in this table would count twice.
* They don't run as they are called here: reformer fails in its own padding where it is given positions; the
  blocks of xlm are no modules with numbers, so no weight of it is rated, and that is said.

Of axk2 with an `index_topk` smaller than the text: which keys it attends to depends on a row's padding. The
gradients of a padded batch differ by 0.5 from those of its rows alone, and the comparison of the shortest row
does not tell. The table has it with 64.
"""


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    tf.logging.set_verbosity_error()
    target = Path(__file__).parents[1] / "docs" / "model-families.md"
    target.write_text(table(), encoding="utf-8")
