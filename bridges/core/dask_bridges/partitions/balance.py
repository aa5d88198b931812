"""Which worker takes which part: like numbers of rows each, moving as little as possible."""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterable, Sequence

__all__ = ["assign", "runs"]


def assign(
    rows: Sequence[int],
    holders: Sequence[Iterable[str]],
    workers: Sequence[str],
    tolerance: float = 0.1,
    *,
    everywhere: bool = False,
) -> list[str]:
    """Give every part a worker.

    A part stays where it is unless the fullest worker exceeds its share of the
    rows by more than `tolerance` and a move makes that better.

    Parameters
    ----------
    rows : sequence of int
        Rows of each part.
    holders : sequence of iterable of str
        Workers that have each part in memory.
    workers : sequence of str
        Workers that may be used.
    tolerance : float
        How much more than the mean the fullest worker may hold.
    everywhere : bool
        Leave no worker without rows, where there are parts enough.

    Returns
    -------
    list of str
        The worker of each part.

    Examples
    --------
    >>> assign([10, 10, 10, 10], [["a"], ["a"], ["a"], ["a"]], ["a", "b"])
    ['b', 'b', 'a', 'a']
    """
    load = dict.fromkeys(workers, 0)
    chosen: list[str] = [""] * len(rows)
    for part in sorted(range(len(rows)), key=lambda p: (-rows[p], p)):
        here = [worker for worker in holders[part] if worker in load] or workers
        chosen[part] = min(here, key=lambda worker: load[worker])
        load[chosen[part]] += rows[part]
    _even_out(rows, chosen, load, limit=(1 + tolerance) * sum(rows) / len(workers))
    if everywhere:
        _fill_empty(rows, chosen, load)
    return chosen


def _fill_empty(rows: Sequence[int], chosen: list[str], load: dict[str, int]) -> None:
    """Give every worker without rows the smallest part of a worker that has several."""
    for empty in [worker for worker, held in load.items() if not held]:
        filled = Counter(worker for part, worker in enumerate(chosen) if rows[part])
        spare = [p for p, worker in enumerate(chosen) if rows[p] and filled[worker] > 1]
        if not spare:
            return
        part = min(spare, key=lambda p: (rows[p], p))
        load[chosen[part]] -= rows[part]
        load[empty] += rows[part]
        chosen[part] = empty


def _even_out(rows: Sequence[int], chosen: list[str], load: dict[str, int], limit: float) -> None:
    """Move parts from the fullest worker to the emptiest while that lowers the fullest."""
    held: dict[str, list[tuple[int, int]]] = {worker: [] for worker in load}
    for part, worker in enumerate(chosen):
        if rows[part]:
            held[worker].append((rows[part], -part))
    for parts in held.values():
        parts.sort()
    while True:
        fullest, emptiest = max(load, key=load.__getitem__), min(load, key=load.__getitem__)
        gap = load[fullest] - load[emptiest]
        at = _nearest(held[fullest], gap)
        if load[fullest] <= limit or at is None:
            return
        moved, part = held[fullest].pop(at)
        bisect.insort(held[emptiest], (moved, part))
        chosen[-part] = emptiest
        load[fullest] -= moved
        load[emptiest] += moved


def _nearest(parts: Sequence[tuple[int, int]], gap: int) -> int | None:
    """Where in `parts`, sorted, is the one whose rows are nearest to half of `gap` and below it."""
    above = bisect.bisect_left(parts, (gap / 2, -math.inf))
    if above < len(parts):  # of equal ones the earliest partition, which is the last here
        above = bisect.bisect_right(parts, (parts[above][0], math.inf)) - 1
    near = [at for at in (bisect.bisect_left(parts, (gap / 2, -math.inf)) - 1, above) if 0 <= at < len(parts)]
    movable = [at for at in near if parts[at][0] < gap]
    return min(movable, key=lambda at: abs(gap / 2 - parts[at][0]), default=None)


def runs(rows: Sequence[int], groups: int) -> list[list[int]]:
    """Divide parts into runs of consecutive ones with like numbers of rows; the same ones wherever they are.

    Parameters
    ----------
    rows : sequence of int
        Of each part.
    groups : int
        How many runs; fewer where there are fewer parts with rows.

    Examples
    --------
    >>> runs([50, 31, 0, 7], 2)
    [[0], [1, 2, 3]]
    >>> runs([50, 31, 7], 3)
    [[0], [1], [2]]
    """
    found: list[list[int]] = [[]]
    past, total = 0, sum(rows)
    left = sum(map(bool, rows))  # parts with rows from here on
    for part, held in enumerate(rows):
        wanted = groups - len(found)  # runs that are still to come
        full = past + held / 2 > total * len(found) / groups
        if held and wanted and sum(rows[each] for each in found[-1]) and (full or left <= wanted):
            found.append([])
        found[-1].append(part)
        past, left = past + held, left - bool(held)
    return found
