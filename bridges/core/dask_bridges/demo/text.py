"""What a part of the demo prints: seconds and scores, in columns."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

__all__ = ["Stopwatch", "scoreboard", "table"]


class Stopwatch:
    """Seconds by part, in the order they were taken.

    >>> from dask_bridges.demo.text import Stopwatch
    >>> clock = Stopwatch()
    >>> with clock("nothing"):
    ...     pass
    >>> list(clock.seconds)
    ['nothing']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time the block as `part`."""
        start = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - start

    def report(self) -> str:
        """The seconds, a line each, and their sum."""
        rows = [(part, f"{seconds:.1f}") for part, seconds in self.seconds.items()]
        return table([*rows, ("in all", f"{sum(self.seconds.values()):.1f}")], "<>")


def table(rows: Sequence[Sequence[str]], align: str) -> str:
    """Lay `rows` out in columns, each aligned as its character of `align` (``<`` or ``>``) says.

    >>> from dask_bridges.demo.text import table
    >>> print(table([("a", "1"), ("long", "10")], "<>"))
      a      1
      long  10
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  " + "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths)).rstrip()
        for row in rows
    )


def scoreboard(scores: Mapping[str, Mapping[str, float]]) -> str:
    """The scores of each guess, a line each.

    >>> from dask_bridges.demo.text import scoreboard
    >>> print(scoreboard({"a coin": {"AUC": 0.5}}))
                 AUC
      a coin  0.5000
    """
    metrics = list(next(iter(scores.values()), {}))
    rows = [(name, *(f"{its[metric]:.4f}" for metric in metrics)) for name, its in scores.items()]
    return table([("", *metrics), *rows], "<" + ">" * len(metrics))
