"""A pool of soft prompts with keys, from which each input takes those whose keys are nearest to it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast.config import Options
from holdfast.errors import ConfigError
from holdfast.models import evaluating, first_position, is_encoder_decoder
from holdfast.strategies.prompts.soft import Source, vocabulary_rows
from holdfast.tasks.encode import positions

Feature = Literal["hidden", "embeddings"]


class PoolOptions(Options):
    """How large the pool is, and how many of it an input finds by what."""

    pool: int = Field(20, ge=1, description="M, prompts in the pool; keeps M / N tasks apart")
    length: int = Field(5, ge=1, description="L, vectors of each prompt")
    chosen: int = Field(4, ge=1, description="N, prompts in front of an input")
    query: Feature = Field("hidden", description="mean last hidden state, or mean embedding, of the question")

    @model_validator(mode="after")
    def _enough(self) -> PoolOptions:
        if self.chosen <= self.pool:
            return self
        raise ValueError(f"`chosen: {self.chosen}` prompts can't be taken from a `pool` of {self.pool}")


def check_feature(model: Any, feature: Feature) -> None:
    """Raise a `ConfigError` if this model can't give the feature."""
    if feature == "hidden" and not is_encoder_decoder(model) and getattr(model, "base_model", model) is model:
        raise ConfigError(
            f"strategy.query: {type(model).__name__} has no body without a head to take hidden states from; "
            "use `query: embeddings`."
        )


@torch.no_grad()
def query(model: Any, ids_BT: Tensor, question_BT: Tensor, feature: Feature) -> Tensor:
    """What an input is found by: the mean feature of its question's tokens, without prompts or dropout.

    Parameters
    ----------
    question_BT : Tensor
        Which tokens are the question (bool). No other token is attended to, so an answer never matters.
    feature : {"hidden", "embeddings"}
        The last hidden states of the model (of its encoder, if it has one), or the input embeddings.

    Returns
    -------
    Tensor
        (B, K) float32; zero for a row without a question.
    """
    width = int(question_BT.any(0).long().cumsum(0).argmax()) + 1  # up to the last column with a question
    ids_BT, question_BT = ids_BT[:, :width], question_BT[:, :width]
    if feature == "embeddings":
        states_BTK = model.get_input_embeddings()(ids_BT)
    else:
        encoder = is_encoder_decoder(model)
        body = model.get_encoder() if encoder else model.base_model
        extra: dict[str, Any] = {} if encoder else {"use_cache": False}
        if not encoder and (first := first_position(body)) is not None:
            extra["position_ids"] = positions(question_BT, first)
        with evaluating(body):
            outputs = body(input_ids=ids_BT, attention_mask=question_BT.long(), **extra)
            states_BTK = outputs.last_hidden_state
    # where, not a product: the states of padding may be anything
    states_BTK = states_BTK.float().where(question_BT[..., None], 0.0)
    return states_BTK.sum(1) / question_BT.sum(1, keepdim=True).clamp(min=1)


class PromptPool(nn.Module):
    """M prompts of length L, each with a key.

    Parameters
    ----------
    prompts_MLD, keys_MK : Tensor
        What they start from.
    """

    def __init__(self, prompts_MLD: Tensor, keys_MK: Tensor) -> None:
        super().__init__()
        self.prompts = nn.Parameter(prompts_MLD.clone())
        self.keys = nn.Parameter(keys_MK.clone())

    def distances(self, query_BK: Tensor) -> Tensor:
        """1 - cos(query, key), (B, M)."""
        return 1 - F.normalize(query_BK, dim=-1) @ F.normalize(self.keys, dim=-1).T

    def nearest(self, query_BK: Tensor, count: int, weights_M: Tensor | None = None) -> Tensor:
        """Indices (B, count) of the prompts of least distance, or least distance times weight; in order."""
        distances = self.distances(query_BK).detach()
        if weights_M is not None:
            distances = distances * weights_M.to(distances)
        return distances.topk(count, dim=-1, largest=False, sorted=True).indices

    def chosen(self, indices_BN: Tensor) -> Tensor:
        """Those prompts one behind the other, (B, N * L, D)."""
        return self.prompts[indices_BN].flatten(1, 2)

    def source(self, model: Any, feature: Feature, count: int) -> Source:
        """What puts in front of each input the `count` prompts that its query finds."""

        def found(ids_BT: Tensor, question_BT: Tensor) -> Tensor:
            return self.chosen(self.nearest(query(model, ids_BT, question_BT, feature), count))

        return found


def fresh_pool(model: Any, options: PoolOptions, seed: int) -> PromptPool:
    """A pool that nothing has learned yet: prompts are embeddings of random tokens, keys a normal draw."""
    rows = vocabulary_rows(model, options.pool * options.length, seed)
    one = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    width = query(model, one, one == 0, options.query).shape[1]
    keys = torch.randn(options.pool, width, generator=torch.Generator().manual_seed(seed))
    return PromptPool(rows.view(options.pool, options.length, -1), keys)
