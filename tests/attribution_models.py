"""Tiny random models of every architecture that attribution is tested on, and a fold that keeps all maps."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import Tensor

from holdfast.tasks.encode import Encoded

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = _COMMON | {"num_key_value_heads": 2}
_T5: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_SMALL: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BUILDERS: dict[str, Any] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GQA)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_GQA)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_GQA, head_dim=8)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_GQA, sliding_window=4)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**_GQA, head_dim=8, sliding_window=4, attn_implementation="eager")
    ),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_GQA, head_dim=8, sliding_window=4)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_GQA)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(**_SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_COMMON)),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            **_SMALL,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5)),
    "t5_gated": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
}
ROWS = [
    Encoded([1, 5, 6, 7, 8, 9], [10, 11, 2]),
    Encoded([1, 5, 6, 7], [12, 2]),
    Encoded([1, 9, 3], [10, 13, 2]),
    Encoded([1, 20, 21, 22, 23], [2]),
]


def build(name: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa") -> Any:
    """A model whose norms and biases are random too, so that what they absorb is not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BUILDERS[name]().to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    if name != "gemma2":
        model.set_attn_implementation(attention)
    return model


def lora(model: Any, targets: list[str]) -> Any:
    """The model with adapters whose B is not zero."""
    import peft

    kind = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    config = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.1, target_modules=targets, task_type=kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return wrapped.to(model.dtype)


class ModuleExperts(torch.nn.Module):
    """A mixture of experts that are modules, each given the tokens that chose it (as much remote code)."""

    def __init__(self, experts: int, hidden: int = 32, inner: int = 24) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(hidden, experts, bias=False)
        self.experts = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Linear(hidden, inner), torch.nn.SiLU(), torch.nn.Linear(inner, hidden)
            )
            for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Two experts a token."""
        flat = x.view(-1, x.shape[-1])
        share, chosen = torch.topk(torch.softmax(self.gate(flat), dim=1), 2, dim=-1)
        output = torch.zeros_like(flat)
        at = torch.nn.functional.one_hot(chosen, len(self.experts)).permute(2, 1, 0)
        for number, expert in enumerate(self.experts):
            slot, token = torch.where(at[number])
            output.index_add_(0, token, expert(flat[token]) * share[token, slot, None])
        return output.view(x.shape)


def with_module_experts(experts: int) -> Any:
    """A Llama with two of so many experts in place of each MLP."""
    model = build("llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for layer in model.model.layers:
            layer.mlp = ModuleExperts(experts).double()
    return model.eval()


class Keep:
    """A fold that keeps every sample's map: name -> (samples, *shape)."""

    def __init__(self, per_weight: bool = False) -> None:
        self.per_weight = per_weight
        self._parts: dict[str, list[Tensor]] = {}

    def update(self, name: str, weight: Tensor, grad_S: Tensor) -> None:
        """Keep a copy."""
        self._parts.setdefault(name, []).append(grad_S.clone() if self.per_weight else weight * grad_S)

    @property
    def maps(self) -> dict[str, Tensor]:
        """All maps so far."""
        return {name: torch.cat(parts) for name, parts in self._parts.items()}
