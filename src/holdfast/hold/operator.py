"""The one line of every hold: θ ← θ* + (1 − H) Δ, with H symmetric and 0 ≤ H ≤ 1.

An operator is H for some weights together. A mechanism says what Δ is and when the line is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

Rate = float | Tensor


class Operator(Protocol):
    """H, acting on the changes Δ of a list of weights; what ends in ``_`` works in place."""

    def blend_(
        self, values: Sequence[Tensor | None], towards: Sequence[Tensor], rate: Rate | None = None
    ) -> None:
        """values ← towards + (1 − H) (values − towards); with a rate, min(1, rate · H) in place of H.

        What is None is left out.
        """

    def reduce_(self, changes: Sequence[Tensor | None]) -> None:
        """Δ ← (1 − H) Δ; what is None is left out."""

    def times_(self, changes: Sequence[Tensor]) -> None:
        """Δ ← H Δ."""

    def energy(self, changes: Sequence[Tensor]) -> Tensor:
        """Σ Δ · HΔ, a differentiable scalar."""
