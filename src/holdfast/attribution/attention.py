"""Softmax and fused attention: Proposition 4.3 (`paper`), or the softmax's Jacobian (`attnlrp`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from holdfast.attribution.ledger import Ledger, relevance
from holdfast.attribution.rules import arguments, rule
from holdfast.attribution.trace import Ruled, Trace, scaled, tracked

# Proposition 4.3 divides by the score E. A score closer to zero than this passes nothing on: what it would is
# booked as absorbed. (Some models subtract a row's maximum first, so one score in each row is zero.)
STABILISER = {torch.float64: 1e-12, torch.float32: 1e-6}


def softmax_rule(paper: bool, score: Tensor, weight: Tensor, lam: Tensor) -> Tensor:
    """Lambda_E from Lambda_A: identity, Lambda_A * A / E, or the Jacobian (Achtibat et al. 2024)."""
    lam_weight = lam * weight
    if paper:
        small = score.abs() < STABILISER.get(score.dtype, 1e-3)
        return torch.where(small | (weight == 0), 0.0, lam_weight / score)
    return lam_weight - weight * lam_weight.sum(-1, keepdim=True)


@rule("softmax")
def softmax(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Softmax over any dimension; what its rule doesn't pass on is booked as absorbed."""
    score = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
    dtype = kwargs.get("dtype") if score.dtype != torch.float64 else None  # float64 stays float64
    paper, ledger = trace.rules == "paper", trace.ledger

    def compute(score: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        weight = torch.softmax(score, dim, dtype=dtype)
        return weight, (score, weight)

    def backward(lam: Tensor, score: Tensor, weight: Tensor) -> tuple[Tensor]:
        weight = weight.nan_to_num()  # of a row whose scores are all -inf, which the model masks again
        moved = [t.movedim(dim, -1) for t in (score.to(weight.dtype), weight, lam)]
        lam_score = softmax_rule(paper, *moved)
        if ledger is not None:
            ledger.absorb("softmax", relevance(moved[1], moved[2]) - relevance(moved[0], lam_score))
        return (lam_score.movedim(-1, dim).to(score.dtype),)

    return Ruled.apply(compute, backward, score)


@rule("logsumexp")
def logsumexp(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """log sum exp E = sum A E + H(A) with A = softmax(E), by both rule sets: the entropy H is absorbed.

    A is its derivative, so this is the Taylor expansion that `attnlrp` makes of the softmax.
    """
    score, dim, keepdim = arguments(("input", "dim", "keepdim"), args, kwargs)
    ledger = trace.ledger

    def compute(score: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        value = torch.logsumexp(score, dim, keepdim=True)
        return (value if keepdim else value.squeeze(dim)), (score, value)

    def backward(lam: Tensor, score: Tensor, value: Tensor) -> tuple[Tensor]:
        lam = lam if keepdim else lam.view(value.shape)
        lam_score = lam * (score - value).exp()
        if ledger is not None:
            ledger.absorb(name, relevance(value, lam) - relevance(score, lam_score))
        return (lam_score,)

    return Ruled.apply(compute, backward, score)


class _Attention:
    """The parts of one fused attention: E = scale Q K^T + mask, A = softmax(E), O = A V."""

    def __init__(self, is_causal: bool, scale: float | None) -> None:
        self.is_causal, self.scale = is_causal, scale

    def parts(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """Q, K, V in at least float32 with as many heads, then E without float mask, with it, and A."""
        wide = torch.promote_types(query.dtype, torch.float32)
        query, key, value = (t.to(wide) for t in (query, key, value))
        groups = query.shape[-3] // key.shape[-3] if query.dim() > 2 else 1
        if groups > 1:
            key, value = (t.repeat_interleave(groups, dim=-3) for t in (key, value))
        factor = 1 / math.sqrt(query.shape[-1]) if self.scale is None else self.scale
        product = query @ key.transpose(-1, -2) * factor
        score, lowest = product, torch.finfo(wide).min  # not -inf: a row that is masked whole has no NaN
        if mask is not None and mask.dtype == torch.bool:
            score = score.masked_fill(~mask, lowest)
        elif mask is not None:
            score = (score + mask.to(wide)).clamp(min=lowest)
        if self.is_causal:
            seen = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).tril()
            score = score.masked_fill(~seen, lowest)
        return query * factor, key, value, product, score, torch.softmax(score, dim=-1)


@rule("scaled_dot_product_attention")
def attention(trace: Trace, name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Two products around a softmax, computed as the model computes it.

    A mask that is an activation is an addend of the scores: Lambda_mask = Lambda_E.
    """
    keys = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = dict(zip(keys, args, strict=False)) | dict(kwargs)
    query, key, value, mask = (given.pop(k, None) for k in keys[:4])
    if given.get("dropout_p"):
        raise trace.unruled(name, "with dropout")
    ledger, inside = trace.ledger, tracked(query) or tracked(key) or tracked(mask)
    half_out = trace.path if inside and tracked(value) else 1.0
    half_score = trace.path if tracked(query) and tracked(key) else 1.0
    core = _Attention(bool(given.get("is_causal")), given.get("scale"))
    booked = _Booking(trace, core, half_out, inside and tracked(value), tracked(query) and tracked(key))

    if trace.rules == "attnlrp":  # the plain gradient, scaled: the model's own kernel computes it
        factor = half_out * half_score
        with_mask = None if mask is None else scaled(mask, half_out)
        output = func(
            scaled(query, factor), scaled(key, factor), scaled(value, half_out), attn_mask=with_mask, **given
        )
        if ledger is not None:
            of = [None if t is None else t.detach() for t in (query, key, value, mask)]
            trace.book(output, lambda ledger, lam: booked(ledger, of, tracked(mask), lam) if inside else None)
        return output

    def compute(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        return func(query, key, value, attn_mask=mask, **given), (query, key, value, mask)

    adds = tracked(mask)

    def backward(lam: Tensor, *of: Tensor) -> tuple[Tensor | None, ...]:
        if ledger is not None and inside:
            booked(ledger, of, adds, lam)
        query_x, key_x, value_x, _, score, weight = core.parts(*of)
        lam = lam.to(weight.dtype) * half_out
        lam_mask = softmax_rule(True, score, weight, lam @ value_x.transpose(-1, -2))
        lam_score = lam_mask * half_score
        factor = query_x.shape[-1] ** -0.5 if core.scale is None else core.scale
        lams = (
            lam_score @ key_x * factor,
            lam_score.transpose(-1, -2) @ query_x,
            weight.transpose(-1, -2) @ lam,
        )
        of_mask = lam_mask.sum_to_size(of[3].shape).to(of[3].dtype) if adds else None
        return *(_as(lam, like) for lam, like in zip(lams, of, strict=False)), of_mask

    return Ruled.apply(compute, backward, query, key, value, mask)


class _Booking:
    """What a fused attention absorbs and creates, from its parts computed anew."""

    def __init__(
        self, trace: Trace, core: _Attention, half_out: float, product_out: bool, product_score: bool
    ) -> None:
        self.paper, self.path, self.core, self.half_out = trace.rules == "paper", trace.path, core, half_out
        self.product_out, self.product_score = product_out, product_score

    def __call__(self, ledger: Ledger, of: Sequence[Any], adds: bool, lam: Tensor) -> None:
        """Of query, key, value and mask; the mask `adds` if it takes its own part."""
        _, _, value_x, product, score, weight = self.core.parts(*of)
        lam = lam.to(weight.dtype)
        lam_weight = lam @ value_x.transpose(-1, -2) * self.half_out
        lam_score = softmax_rule(self.paper, score, weight, lam_weight)
        through = relevance(score, lam_score)
        ledger.absorb("softmax", relevance(weight, lam_weight) - through)
        if of[3] is not None and of[3].dtype != torch.bool and not adds:
            ledger.absorb("attention bias", through - relevance(product, lam_score))
        if self.path == 1.0:
            ledger.create(relevance(weight @ value_x, lam) * self.product_out)
            ledger.create(relevance(product, lam_score) * self.product_score)


def _as(lam: Tensor, like: Tensor) -> Tensor:
    """Sum Lambda over the query heads that share a key head, and give it the type of its tensor."""
    if lam.shape != like.shape:
        lam = lam.reshape(*like.shape[:-2], -1, *like.shape[-2:]).sum(dim=-3)
    return lam.to(like.dtype)
