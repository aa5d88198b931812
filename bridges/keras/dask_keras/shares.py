"""How many rows each rank brings to each global batch, however unevenly they lie."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

__all__ = ["Shares"]


@dataclass(frozen=True)
class Shares:
    """Global batches made of rows of several ranks, each row once a pass.

    Every batch has `batch_size` rows but the last of a pass, and each rank gives a
    part in proportion to its rows, as far as whole rows allow: they are handed out by
    the divisor method of Sainte-Lague, which takes no row back as the total grows.

    Attributes
    ----------
    rows : tuple of int
        Of each rank.
    batch_size : int
        Rows of a global batch.

    Examples
    --------
    >>> shares = Shares((5, 3), batch_size=4)
    >>> [shares.of_step(step) for step in range(shares.steps)]
    [(3, 1), (2, 2)]
    """

    rows: tuple[int, ...]
    batch_size: int

    @cached_property
    def total(self) -> int:
        """Rows of all ranks."""
        return sum(self.rows)

    @cached_property
    def steps(self) -> int:
        """Global batches of one pass over all rows."""
        return -(-self.total // self.batch_size)

    @cached_property
    def even(self) -> bool:
        """Whether a rank brings the same number of rows to every batch but the last of a pass."""
        return all(self.batch_size * held % self.total == 0 for held in self.rows)

    def of_step(self, step: int) -> tuple[int, ...]:
        """Rows of each rank in a step, counted over passes."""
        place = step % self.steps
        before, after = self._taken(place * self.batch_size), self._taken((place + 1) * self.batch_size)
        return tuple(b - a for a, b in zip(before, after))

    def of_rank(self, rank: int, step: int, most: int) -> list[int]:
        """Rows of a rank in a step and those after it, `most` of them at most, all of one pass.

        Where it has none there is one step; if shares are even, all have the same number.
        """
        place, full = step % self.steps, self.total // self.batch_size
        if self.even and self.rows[rank] and place < full:
            return [self.batch_size * self.rows[rank] // self.total] * min(most, full - place)
        counts = [self.of_step(step)[rank]]
        if self.even:
            return counts
        while counts[0] and len(counts) < min(most, self.steps - place):
            count = self.of_step(step + len(counts))[rank]
            if not count:
                break
            counts.append(count)
        return counts

    def before(self, step: int) -> tuple[int, tuple[int, ...]]:
        """The pass that a step is in, and the rows of each rank that are over in it."""
        number, place = divmod(step, self.steps)
        return number, self._taken(place * self.batch_size)

    def _taken(self, wanted: int) -> tuple[int, ...]:
        """Rows of each rank among the first `wanted` of all: row i of n has the priority (2 i + 1) / n."""
        rows, total = self.rows, self.total
        wanted = min(wanted, total)
        taken = [(2 * wanted * held + total) // (2 * total) for held in rows]
        ranks = [rank for rank, held in enumerate(rows) if held]
        while sum(taken) > wanted:
            # Compared as fractions, exactly: of equals the last rank gives way.
            late = max((r for r in ranks if taken[r]), key=lambda r: (Fraction(2 * taken[r] - 1, rows[r]), r))
            taken[late] -= 1
        while sum(taken) < wanted:
            early = min(
                (r for r in ranks if taken[r] < rows[r]), key=lambda r: (Fraction(2 * taken[r] + 1, rows[r]), r)
            )
            taken[early] += 1
        return tuple(taken)
