"""The loss on prompts: what a model must learn to write them itself, beside answering them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast import world
from holdfast.errors import ConfigError
from holdfast.models import is_encoder_decoder
from holdfast.training.options import TrainingOptions


class PromptLoss:
    """Weight × mean cross-entropy over a batch's prompt tokens (LAMOL, Sun et al. 2020, arXiv 1909.03329).

    A causal model has put out what it takes already: all tokens that are neither padding nor label, but the
    first of each row, which nothing precedes. An encoder-decoder model takes a forward pass more, in which
    its decoder writes the prompt after its encoder has read the end token alone (as in LFPT5, Qin & Joty
    2022, arXiv 2110.07298, but without a token of its own).

    Parameters
    ----------
    weight : float
    end_id : int
        What the encoder reads.
    """

    def __init__(self, weight: float, end_id: int) -> None:
        self.weight, self.end_id = weight, end_id

    @classmethod
    def of(cls, options: TrainingOptions, tokenizer: Any) -> PromptLoss | None:
        """What the options ask for; None where prompts aren't learned."""
        return cls(options.lm_weight, tokenizer.eos_token_id) if options.lm_weight else None

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], outputs: Any) -> Tensor:
        """The loss of one batch, a scalar.

        Parameters
        ----------
        batch : mapping of str to Tensor
            ``input_ids``, ``attention_mask`` and ``labels``, each (S, T); of an encoder-decoder model
            ``labels`` aren't needed.
        outputs : ModelOutput
            Of a causal model, with the logits of all positions.

        Raises
        ------
        ConfigError
            A causal model's outputs lack logits, or the batch lacks its mask.
        """
        ids_ST, mask_ST = batch["input_ids"], batch.get("attention_mask")
        if mask_ST is None:
            raise ConfigError(
                "training.lm_weight: the loss on prompts needs `attention_mask` in each batch, to tell them "
                "from padding. Turn packing and padding-free batches off, or set lm_weight to 0."
            )
        seen_ST = mask_ST.bool()
        if is_encoder_decoder(model):
            written_STV = self._written(model, ids_ST.masked_fill(~seen_ST, -100))
            return self._mean(written_STV[seen_ST], ids_ST[seen_ST])
        logits_STV = getattr(outputs, "logits", None)
        if logits_STV is None or logits_STV.shape[1] < ids_ST.shape[1]:
            raise ConfigError(
                "training.lm_weight: the loss on prompts needs the logits of all positions, and the model's "
                "output has fewer. Leave `logits_to_keep` out, or set lm_weight to 0."
            )
        predicted_ST = seen_ST[:, 1:] & seen_ST[:, :-1] & (batch["labels"][:, 1:] == -100)
        return self._mean(logits_STV[:, -ids_ST.shape[1] : -1][predicted_ST], ids_ST[:, 1:][predicted_ST])

    def _written(self, model: nn.Module, labels_ST: Tensor) -> Tensor:
        read = labels_ST.new_full((len(labels_ST), 1), self.end_id)
        result: Tensor = model(input_ids=read, attention_mask=torch.ones_like(read), labels=labels_ST).logits
        return result

    def _mean(self, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        # of several processes: so that the average over them is the mean over all tokens
        all_tokens = sum(world.gather(len(targets_N)))
        share = world.size() * len(targets_N) / max(all_tokens, 1)
        if not len(targets_N):
            return logits_NV.sum()  # of nothing
        mean = F.cross_entropy(logits_NV.float(), targets_N)
        return self.weight * (mean if world.size() == 1 else mean * share)
