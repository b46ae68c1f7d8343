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


def starts_below_head(rules: str, halves: str) -> bool:
    """Whether Z is to reach what is below the head, as A has it: what the head takes is given on top."""
    return rules == "paper" and halves == "path"


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
    alone_max_relative_error : float or None
        How much a sample's maps in the first batch differ from those of the sample alone (for plain gradients
        from autograd's), the largest over all weights; None where batches have one sample and no rule.
    one_at_a_time : str
        Why samples went through the model one by one; empty where they went in batches.
    """

    samples_seen: int = 0
    samples_used: int = 0
    conservation_max_relative_error: float | None = None
    seconds: float = 0.0
    absorbed: dict[str, float] = field(default_factory=dict)
    created: float = 0.0
    passes: int = 1
    unreached: tuple[str, ...] = ()
    alone_max_relative_error: float | None = None
    one_at_a_time: str = ""
