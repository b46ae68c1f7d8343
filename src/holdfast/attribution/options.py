"""What an attribution is asked for, and what it tells about itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from holdfast.config import Options


class AttributionOptions(Options):
    """Which relevance is computed; A to the letter is ``rules="paper", halves="path", target="first"``."""

    rules: Literal["paper", "attnlrp"] = Field(
        "attnlrp", description="softmax: identity as in A, Prop. 4.3, or its Jacobian"
    )
    halves: Literal["path", "weights", "none"] = Field(
        "none", description="where Lemma 4.1's ½ applies: everywhere (A), in R(W) alone, or nowhere"
    )
    target: Literal["all", "first"] = Field("all", description="all tokens of the answer, or the first (A)")
    of: Literal["logit", "log_probability"] = Field("logit", description="what is attributed; A: the logit")


@dataclass
class AttributionReport:
    """How an attribution went.

    Attributes
    ----------
    samples_seen, samples_used : int
        Rows that went through the model, and those among them that were attributed.
    conservation_max_relative_error : float or None
        |sum of R - Z| / |Z| on the first batch; None for plain gradients, which are not conserved.
    seconds : float
    absorbed : dict
        On the first batch, as a share of Z: what ended in constants, by operation.
    created : float
        On the first batch, as a share of Z: what products handed out twice (`halves` other than `path`).
    passes : int
        Passes over the data, more than one where the memory budget demands it.
    unreached : tuple of str
        Parameters that nothing reached; their importance is zero.
    """

    samples_seen: int = 0
    samples_used: int = 0
    conservation_max_relative_error: float | None = None
    seconds: float = 0.0
    absorbed: dict[str, float] = field(default_factory=dict)
    created: float = 0.0
    passes: int = 1
    unreached: tuple[str, ...] = ()
