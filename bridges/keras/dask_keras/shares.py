"""How many rows each rank brings to each global batch, however unevenly they lie."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

__all__ = ["Shares"]

#: Steps over which rows are spread together.
_TOGETHER = 128


@dataclass(frozen=True)
class Shares:
    """Global batches made of rows of several ranks, each row once a pass.

    Every batch has `batch_size` rows but the last of a pass, and each rank gives a
    part in proportion to its rows, as far as whole rows allow.

    Attributes
    ----------
    rows : tuple of int
        Of each rank.
    batch_size : int
        Rows of a global batch.

    Notes
    -----
    Steps share rows in blocks of 128. Between blocks they are handed out by the divisor
    method of Sainte-Lague, which takes no row back as the total grows; within one, a rank
    brings one row more in steps that follow one another, by McNaughton's rule, so that
    its number of rows changes twice in it at most: equal batches are the quickest to read.

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

    def of_step(self, step: int) -> tuple[int, ...]:
        """Rows of each rank in a step, counted over passes."""
        block, at = self._block(step % self.steps)
        return tuple(block.run(rank, at)[0] for rank in range(len(self.rows)))

    def of_rank(self, rank: int, step: int) -> tuple[int, int]:
        """Rows of a rank in a step, and how many steps from it on are known to have as many."""
        block, at = self._block(step % self.steps)
        return block.run(rank, at)

    def before(self, step: int) -> tuple[int, tuple[int, ...]]:
        """The pass that a step is in, and the rows of each rank that are over in it."""
        number, place = divmod(step, self.steps)
        block, at = self._block(place)
        return number, tuple(block.over(rank, at) for rank in range(len(self.rows)))

    def _block(self, place: int) -> tuple[_Block, int]:
        """The block that a step of a pass is in, and its place there."""
        full = self.total // self.batch_size
        first = full if place >= full else place - place % _TOGETHER
        return _dealt(self, first, self.steps if first == full else min(first + _TOGETHER, full)), place - first

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


@dataclass(frozen=True)
class _Block:
    """Some steps in a row, with as many rows in each.

    Attributes
    ----------
    steps : int
    before : tuple of int
        Rows of each rank in the steps before it.
    least : tuple of int
        Rows of each rank in every step.
    start, more : tuple of int
        Each rank brings one row more in `more` steps from the step `start` on; after the last step comes the first.
    """

    steps: int
    before: tuple[int, ...]
    least: tuple[int, ...]
    start: tuple[int, ...]
    more: tuple[int, ...]

    def run(self, rank: int, at: int) -> tuple[int, int]:
        """Rows of a rank in a step, and how many steps from it on have as many."""
        place, more = (at - self.start[rank]) % self.steps, self.more[rank]
        until = more if place < more else self.steps
        return self.least[rank] + (place < more), min(until - place, self.steps - at)

    def over(self, rank: int, at: int) -> int:
        """Rows of a rank before a step, since the pass began."""
        start, end = self.start[rank], self.start[rank] + self.more[rank]
        more = max(0, min(at, end) - start) + max(0, min(at, end - self.steps))
        return self.before[rank] + self.least[rank] * at + more


@functools.lru_cache(64)  # the feed is in one block, and the training in another
def _dealt(shares: Shares, first: int, until: int) -> _Block:
    """The rows of the steps of a pass from the first to before `until`."""
    before, after = shares._taken(first * shares.batch_size), shares._taken(until * shares.batch_size)
    steps, start = until - first, 0
    least, starts, more = [], [], []
    for rows in (b - a for a, b in zip(before, after)):
        each, over = divmod(rows, steps)
        least.append(each)
        starts.append(start)
        more.append(over)
        start = (start + over) % steps
    return _Block(steps, before, tuple(least), tuple(starts), tuple(more))
