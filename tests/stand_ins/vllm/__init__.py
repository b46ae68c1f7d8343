"""What stands in for vLLM: the same two classes as far as holdfast calls them, over transformers.

It refuses what vLLM refuses (a prompt and its answer longer than ``max_model_len``), prints to stdout as vLLM
does, and breaks where a test asks it to (`break_at`).
"""

import os
import time
from dataclasses import dataclass
from types import SimpleNamespace

import torch


@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    stop_token_ids: list
    ignore_eos: bool
    detokenize: bool


class LLM:
    def __init__(self, model, *, dtype, max_model_len, skip_tokenizer_init, break_at="", **others):
        print("INFO starting, as loud as the real one")
        assert skip_tokenizer_init
        assert {"enforce_eager", "generation_config", "seed", "disable_log_stats"} <= others.keys()
        if break_at == "start":
            raise ValueError("No available memory for the cache blocks.\nTry less.")
        self.longest, self.break_at = max_model_len, break_at
        if break_at:
            return
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    @torch.no_grad()
    def generate(self, prompts, params, use_tqdm):
        print("INFO answering")
        assert not use_tqdm
        if self.break_at == "answers":
            os._exit(7)
        if self.break_at == "never":
            time.sleep(600)
        return [
            self._one(prompt["prompt_token_ids"], own) for prompt, own in zip(prompts, params, strict=True)
        ]

    def _one(self, ids, params):
        assert params.temperature == 0
        assert len(ids) + params.max_tokens <= self.longest
        said = []
        while len(said) < params.max_tokens:
            said.append(int(self.model(torch.tensor([ids + said])).logits[0, -1].argmax()))
            if said[-1] in params.stop_token_ids:
                break
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=said)])
