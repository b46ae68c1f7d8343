"""Skill units: what importance is measured of and knowledge is fused by (K, section IV-B)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from holdfast.errors import ConfigError, HoldfastError
from holdfast.records import UnitScores

_FACTOR_A = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?A(?P<leaf>\.weight)?$")


class Slice(NamedTuple):
    """A part of a parameter: all of it (`dim` None), or one row or column."""

    parameter: str
    dim: int | None = None
    position: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor of the parameter's shape, as a view."""
        return tensor if self.dim is None else tensor.select(self.dim, self.position)


@dataclass(frozen=True)
class SkillUnit:
    """A named set of slices. Importance, fusion and plots need to know no more than that.

    Attributes
    ----------
    name : str
        Of a matrix its parameter's canonical name; of a rank of LoRA ``<module>[i]``.
    slices : tuple of Slice
        One slice: the unit is that tensor. Two: it is their outer product, u_i = b_i a_i (K, eq. 3).
    """

    name: str
    slices: tuple[Slice, ...]


def matrix_units(parameters: Mapping[str, Tensor]) -> list[SkillUnit]:
    """One unit a tensor, whatever the model (K, section IV-B1)."""
    return [SkillUnit(name, (Slice(name),)) for name in parameters]


def lora_units(parameters: Mapping[str, Tensor]) -> list[SkillUnit]:
    """One unit a rank of each adapter: row i of A with column i of B (K, eqs. 3 and 4).

    Parameters
    ----------
    parameters : mapping of str to Tensor
        Canonical name to trainable weight; A is (r, in), B is (out, r). Others than factors (biases, modules
        that are trained whole) become units of their own, as at matrix level.

    Raises
    ------
    ConfigError
        There are no LoRA factors.
    """
    units: list[SkillUnit] = []
    used: set[str] = set()
    for name, a_RI in parameters.items():
        match = _FACTOR_A.match(name)
        if match is None:
            continue
        other = f"{match['module']}.lora_{match['embedding'] or ''}B{match['leaf'] or ''}"
        if other not in parameters:
            continue
        used |= {name, other}
        units += [
            SkillUnit(f"{match['module']}[{i}]", (Slice(name, 0, i), Slice(other, 1, i)))
            for i in range(a_RI.shape[0])
        ]
    if not units:
        raise ConfigError(
            "LoRA-tailored skill units are made of LoRA's factors, and this model has none. Set model.lora "
            "(such as `model.lora={r: 8}`), or use matrix-level units (strategy.units: matrix)."
        )
    return units + matrix_units({n: p for n, p in parameters.items() if n not in used})


def unit_scores(
    units: Sequence[SkillUnit],
    importance: Mapping[str, Tensor],
    score: Literal["product", "mean"] = "product",
) -> Tensor:
    """Importance of each unit: the mean of s(w) over its entries (K, eq. 6).

    A LoRA unit's entries are the products w_kl = b_k a_l, which are never built. With ``product`` their
    importance is s(w_kl) = s(b_k) s(a_l), so the mean over out x in is mean s(b) times mean s(a); this is
    also what the authors' code computes. With ``mean`` the entries are the trainable numbers themselves:
    the mean of s over a and b together. The paper leaves open which it means; for a matrix both are one.

    Parameters
    ----------
    units : sequence of SkillUnit
    importance : mapping of str to Tensor
        s(w) of each parameter, of its shape.

    Returns
    -------
    Tensor, shape (units,), float64
    """
    sums: dict[tuple[str, int | None], Tensor] = {}

    def total(part: Slice) -> tuple[Tensor, int]:
        value, key = importance[part.parameter], (part.parameter, part.dim)
        if key not in sums:  # all rows of a factor at once
            others = [d for d in range(value.dim()) if d != part.dim] if part.dim is not None else None
            sums[key] = value.double().sum(dim=others) if others != [] else value.double()
        size = value.numel() if part.dim is None else value.numel() // value.shape[part.dim]
        return (sums[key] if part.dim is None else sums[key][part.position]), size

    scores = []
    for unit in units:
        parts = [total(part) for part in unit.slices]
        if score == "product":
            scores.append(torch.stack([value / size for value, size in parts]).prod())
        else:
            scores.append(torch.stack([value for value, _ in parts]).sum() / sum(size for _, size in parts))
    return torch.stack(scores).cpu()


def normalised(scores: Tensor) -> Tensor:
    """Norm of K, eq. 13: scores brought to [0, 1] by minimum and maximum; all 0 if all are the same.

    Raises
    ------
    HoldfastError
        A score is not finite: with it all of them would be NaN, or 0.
    """
    if not (finite := scores.isfinite()).all():
        raise HoldfastError(
            f"skill units: {int((~finite).sum())} of {len(scores)} scores are not finite, the first that of "
            f"unit {int(finite.int().argmin())}, so units can't be compared. Lower the learning rate, or "
            "train in bf16 or float32."
        )
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low) if high > low else torch.zeros_like(scores)


def accumulated(previous: Tensor, current: Tensor, beta: float = 0.7) -> Tensor:
    """Scores up to this task from those before it and its own (K, eq. 13)."""
    return beta * normalised(previous) + (1 - beta) * normalised(current)


def important(scores: Tensor, rule: float | Literal["distribution"] = 0.2) -> Tensor:
    """Which units count as important, (units,) of bool.

    Parameters
    ----------
    rule : float or "distribution"
        A number: the units above the quantile that this share of them exceeds (K, section IV-D1: 0.2).
        ``distribution``: the cut that tells most apart by Otsu's criterion (1979), of all cuts between two
        neighbouring scores the one with the largest variance between the groups. K's conclusion asks for
        thresholds from the distribution; the choice is ours.
    """
    if rule != "distribution":
        return scores > torch.quantile(scores, 1 - rule)
    ordered = torch.sort(scores).values
    if ordered[0] == ordered[-1]:
        return torch.zeros_like(scores, dtype=torch.bool)
    count = len(ordered)
    below = torch.arange(1, count, dtype=ordered.dtype)
    sums = ordered.cumsum(0)
    mean_low, mean_high = sums[:-1] / below, (sums[-1] - sums[:-1]) / (count - below)
    between = below * (count - below) * (mean_high - mean_low) ** 2
    return scores > ordered[int(between.argmax())]


def masks(units: Sequence[SkillUnit], chosen: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Canonical name to a tensor of the parameter's shape: 1 in the chosen units, 0 elsewhere."""
    held = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for unit, take in zip(units, chosen.tolist(), strict=True):
        for part in unit.slices:
            part.of(held[part.parameter]).fill_(float(take))
    return held


def write_units(
    path: Path,
    kind: Literal["matrix", "lora"],
    units: Sequence[SkillUnit],
    scores: Tensor,
    accumulated: Tensor | None,
) -> None:
    """Write ``units.json``, which the report draws: each unit's name and score.

    Parameters
    ----------
    kind : {"matrix", "lora"}
    scores : Tensor, shape (units,)
        Of the task that was just learned.
    accumulated : Tensor, shape (units,), or None
        Of all tasks so far; None after the first.
    """
    UnitScores(
        kind=kind,
        names=[unit.name for unit in units],
        scores=scores.tolist(),
        accumulated=None if accumulated is None else accumulated.tolist(),
    ).write(path)
