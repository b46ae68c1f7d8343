"""Region: changes that move old outputs by no more than a bound, and the pull that leads back into it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ROUNDS = 30  # of Newton's method; it is exact to rounding after about ten


class Region:
    """The ellipsoid Σ tr(Δ C Δᵀ) <= bound² Σ tr(W* C W*ᵀ), sums over all maps.

    Parameters
    ----------
    values : list of Tensor (I,)
        c of each map's directions.
    whole : list of Tensor ()
        tr(W* C W*ᵀ) of each map.
    bound : float
        How much of their own size old outputs may move, in root mean square; 0.01 is one percent.

    Notes
    -----
    Nothing is kept from one step to the next, so a killed training goes on the same bit for bit. The device
    is never waited for.
    """

    def __init__(self, values: Sequence[Tensor], whole: Sequence[Tensor], bound: float) -> None:
        self.values = list(values)
        self._home = self.values[0].device
        self._values_N = torch.cat([v.to(self._home) for v in self.values])
        self._most = bound**2 * torch.stack([w.to(self._home) for w in whole]).sum()

    def pull(self, squares: Sequence[Tensor]) -> Tensor:
        """The least µ >= 0 for which the changes, each direction's divided by 1 + µc, are in the region.

        It is that of the nearest changes there: the Lagrange multiplier of least |Δ' − Δ|² under the bound.

        Parameters
        ----------
        squares : list of Tensor (I,)
            |(ΔU)_j|² of each map's directions.

        Returns
        -------
        Tensor
            µ, a scalar.
        """
        c_N = self._values_N
        energy_N = c_N * torch.cat([s.to(self._home) for s in squares])
        # 1/√ of what is left grows with µ, almost as a straight line and bent downwards: from below, Newton's
        # steps never pass the root
        wanted, pull = self._most.rsqrt(), torch.zeros_like(self._most)
        for _ in range(_ROUNDS):
            kept_N = 1 / (1 + pull * c_N)
            left = (energy_N * kept_N**2).sum()
            slope = left**-1.5 * (energy_N * c_N * kept_N**3).sum()
            step = (wanted - left.rsqrt()) / slope
            pull = pull + torch.where(step.isfinite(), step, 0.0).clamp(min=0.0)
        return pull

    def passed(self, squares: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """1 / (1 + µc) of each map's directions, and µ."""
        pull = self.pull(squares)
        return [1 / (1 + pull.to(v.device) * v) for v in self.values], pull
