"""What a model says of one row without padding: the plain side of a comparison with a batch."""

from __future__ import annotations

from typing import Any

import torch

from holdfast.tasks import Encoded


def answer_logits(model: Any, row: Encoded) -> torch.Tensor:
    """At the places where the answer's tokens are predicted, (N, V)."""
    if model.config.is_encoder_decoder:
        decoder = torch.tensor([[model.config.decoder_start_token_id, *row.completion_ids[:-1]]])
        found = model(input_ids=torch.tensor([row.prompt_ids]), decoder_input_ids=decoder).logits[0]
    else:
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        found = model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1]
    logits: torch.Tensor = found
    return logits
