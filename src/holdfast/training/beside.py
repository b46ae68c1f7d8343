"""Old rows beside each batch of new ones."""

from __future__ import annotations

import random
from collections.abc import Sequence

from holdfast.tasks.encode import Encoded, Encoder
from holdfast.tasks.memory import Rehearsal


class Beside:
    """A batch's share of old rows, drawn by the numbers of its own: the same batch gets the same ones.

    So nothing needs to be known of the batches before it, and a killed training goes on as it would have.

    Parameters
    ----------
    rows : sequence of Encoded
    ratio : float
        Share of a whole batch that is old; at least one row.
    """

    def __init__(self, rows: Sequence[Encoded], ratio: float, seed: int) -> None:
        self.rows, self.ratio, self.seed = list(rows), ratio, seed

    @classmethod
    def of(cls, rehearsal: Rehearsal, encoder: Encoder, seed: int) -> Beside | None:
        """What a rehearsal puts beside batches; None where it doesn't, or has nothing yet."""
        old = rehearsal.beside()
        return cls(encoder.many(old), rehearsal.ratio, seed) if old else None

    def of_batch(self, numbers: Sequence[int]) -> list[tuple[int, Encoded]]:
        """The old rows for a batch of these rows, with negative numbers."""
        draw = random.Random(f"beside {self.seed} {list(numbers)}")
        wanted, taken = max(1, round(len(numbers) * self.ratio / (1 - self.ratio))), list[int]()
        while len(taken) < wanted:
            taken += draw.sample(range(len(self.rows)), min(len(self.rows), wanted - len(taken)))
        return [(-1 - i, self.rows[i]) for i in taken]
