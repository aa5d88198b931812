"""How much of the time somebody computed, and what went on while nobody did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dask_bridges.reporting.story import Piece, Row, Story

__all__ = ["KINDS", "Shares"]

#: What time goes into, the most useful first.
KINDS = ("compute", "build", "communicate", "receive", "checkpoint", "restart", "start", "wait")

#: Moments at which a run is looked at.
MOMENTS = 3000


@dataclass(frozen=True)
class Shares:
    """A story, looked at in equal slices of its time.

    Attributes
    ----------
    edges : ndarray
        Of the slices: seconds since the epoch.
    kinds : dict of str to ndarray
        For each slice what went on, if nothing more useful did: shares that come to 1 at most.
    computing : ndarray
        How many members computed.
    """

    edges: Any
    kinds: dict[str, Any]
    computing: Any

    @classmethod
    def of(cls, story: Story, moments: int = MOMENTS) -> Shares:
        """Of all members of all runs."""
        end = max(story.ended, story.began + 1e-3)
        edges = np.linspace(story.began, end, moments + 1)
        rows = [row for run in story.runs for row in run.rows.values()]
        computing = np.zeros(moments)
        busiest = {kind: np.zeros(moments) for kind in KINDS}
        for row in rows:
            for kind in KINDS:
                share = _within(row, kind, edges)
                busiest[kind] = np.maximum(busiest[kind], share)
                if kind == "compute":
                    computing += share
        left, found = np.ones(moments), {}
        for kind in KINDS:  # members that do different things at once do the most useful of them
            found[kind] = np.minimum(busiest[kind], left)
            left = left - found[kind]
        return cls(edges, found, computing)

    @property
    def totals(self) -> dict[str, float]:
        """Share of the whole time, by kind; "prepare" is what was before the first gang was asked for, or between."""
        return {kind: float(share.mean()) for kind, share in self.kinds.items()}

    @property
    def nobody(self) -> float:
        """Share of the time in which nobody computed."""
        return 1.0 - self.totals["compute"]


def _within(row: Row, kind: str, edges: Any) -> Any:
    """Share of each slice that a row spent on a kind."""
    pieces = [piece for piece in row.pieces if piece.seconds.get(kind)]
    total = np.zeros(len(edges) - 1)
    if not pieces:
        return total
    # Seconds up to each edge: pieces do not overlap, and within one they are spread evenly.
    ends, passed = _steps(pieces, kind)
    return np.minimum(np.diff(np.interp(edges, ends, passed)) / np.diff(edges), 1.0)


def _steps(pieces: Iterable[Piece], kind: str) -> tuple[Any, Any]:
    moments, passed, sofar = [], [], 0.0
    for piece in pieces:
        moments += [piece.start, piece.end]
        passed += [sofar, sofar + min(piece.seconds[kind], piece.end - piece.start)]
        sofar = passed[-1]
    return np.array(moments), np.array(passed)
