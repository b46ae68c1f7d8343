"""A model that PEFT or TRL has put hooks on is attributed like one without them."""

from __future__ import annotations

import torch

import holdfast
from holdfast.models import tiny_llama
from holdfast.tasks import toy_tokenizer


def test_hook_that_makes_embeddings_require_a_gradient_changes_nothing() -> None:
    tokenizer = toy_tokenizer()
    model = tiny_llama(tokenizer, hidden=16, layers=1)
    rows = [{"prompt": "ab=", "completion": "a"}, {"prompt": "cde=", "completion": "c"}]
    options = {"name": "lrp", "correct_only": False}
    plain = holdfast.attribute(model, tokenizer, rows, importance=options, progress=False)
    model.enable_input_require_grads()  # what gradient checkpointing with adapters needs: TRL's default
    hooked = holdfast.attribute(model, tokenizer, rows, importance=options, progress=False)
    assert all(torch.equal(plain.tensors[name], hooked.tensors[name]) for name in plain.tensors)
    assert hooked.meta["conservation_max_relative_error"] < 1e-5
