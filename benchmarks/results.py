"""The one form of what benchmarks measure: `show` prints a comparison as a table, and keeps it for the page.

Each script prints by itself. Under `run.py` it also appends to the file that `KEEP` names, from which `page.py` is
made.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

#: The variable of the environment with the name of the file to append to.
KEEP = "DASK_BRIDGES_BENCH"

OURS, PEER, LIMIT = "ours", "peer", "limit"
BETTER = "ours better"


@dataclass(frozen=True)
class Row:
    """How one contender did in one case."""

    #: The work that all contenders of a case do.
    case: str
    name: str
    #: `ours`, `peer`, or `limit`: what this machine, or one process, gives at most.
    role: str
    unit: str
    median: float
    #: Quartiles.
    low: float
    high: float
    #: Whether more is better, as of rates.
    more: bool = False
    #: How many times as good as this ours is, pair by pair of runs where they took turns; above 1 ours is better.
    ratio: float | None = None
    #: What else is told of it, by heading.
    notes: Mapping[str, str] = field(default_factory=dict)
    #: Share of the workers' time in which they computed nothing.
    white: float | None = None
    #: Whether the case is in the table at the head of the page.
    head: bool = True


@dataclass(frozen=True)
class Missing:
    """A contender that could not take part, and why."""

    case: str
    name: str
    why: str


def show(
    case: str,
    unit: str,
    found: Mapping[str, Sequence[float]],
    *,
    ours: str | Sequence[str] = (),
    limits: Collection[str] = (),
    more: bool = False,
    turns: bool = True,
    notes: Mapping[str, Mapping[str, str]] | None = None,
    white: Mapping[str, float] | None = None,
    head: bool = True,
) -> None:
    """Print medians and quartiles of contenders, and keep them.

    Parameters
    ----------
    case : str
        The work, the same for all.
    unit : str
        Of the values.
    found : mapping of str to sequence of float
        What was measured of each contender.
    ours : str or sequence of str, optional
        Which of them are ours; the others are compared with the first. Without, all of them are.
    limits : collection of str
        Which of them are what the machine gives at most. The others are peers.
    more : bool
        Whether more is better, as of rates.
    turns : bool
        Whether they took turns, so that ratios are those of pairs of runs; else they are those of medians.
    notes : mapping, optional
        Of a contender: more columns, by heading.
    white : mapping of str to float, optional
        Of a contender: the share of the workers' time in which they computed nothing.
    head : bool
        Whether it belongs to the table at the head of the page.
    """
    rows = []
    mine = [ours] if isinstance(ours, str) else list(ours or found)
    for name, values in found.items():
        role = OURS if name in mine else LIMIT if name in limits else PEER
        ratio = None if role == OURS else _ratio(found[mine[0]], values, more, turns)
        told = (notes or {}).get(name, {})
        rows.append(Row(case, name, role, unit, *_quartiles(values), more, ratio, told, (white or {}).get(name), head))
    _print(rows)
    _keep(*rows)


def missing(case: str, name: str, why: object) -> None:
    """Tell that a contender could not take part; of paths in the reason only that there were some."""
    gone = Missing(case, name, re.sub(r"(?<!\w)/[\w.+-]+(/[\w.+-]+)+", "…", " ".join(str(why).split())))
    print(f"{case}: {name} is missing: {gone.why}", flush=True)
    _keep(gone)


def read(lines: Sequence[Mapping[str, object]]) -> list[Row | Missing]:
    """What was kept, from JSON."""
    return [(Missing if "why" in line else Row)(**line) for line in lines]  # type: ignore[arg-type]


def number(value: float) -> str:
    """Three digits that count."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(digits, 0), 6)}f}"


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median first."""
    if len(values) < 3:
        return statistics.median(values), min(values), max(values)
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, low, high


def _ratio(ours: Sequence[float], other: Sequence[float], more: bool, turns: bool) -> float:
    if not turns or len(ours) != len(other):
        ours, other = [statistics.median(ours)], [statistics.median(other)]
    return statistics.median(a / b if more else b / a for a, b in zip(ours, other))


def _print(rows: Sequence[Row]) -> None:
    others = list(dict.fromkeys(heading for row in rows for heading in row.notes))
    white = any(row.white is not None for row in rows)
    headings = ["median", "q1", "q3", *([BETTER] if any(row.ratio for row in rows) else []), *others]
    headings += ["white"] if white else []
    print(f"\n{rows[0].case} ({rows[0].unit})")
    print(f"{'':<52}" + "".join(f"  {heading:>11}" for heading in headings))
    for row in rows:
        cells = [number(row.median), number(row.low), number(row.high)]
        if BETTER in headings:
            cells.append(f"x {number(row.ratio)}" if row.ratio else "")
        cells += [row.notes.get(heading, "") for heading in others]
        if white:
            cells.append("" if row.white is None else f"{row.white:.0%}")
        print(
            f"  {row.name:<50}" + "".join(f"  {cell:>{max(11, len(h))}}" for cell, h in zip(cells, headings)),
            flush=True,
        )


def _keep(*lines: Row | Missing) -> None:
    if name := os.environ.get(KEEP):
        with Path(name).open("a") as file:
            file.writelines(json.dumps(asdict(line)) + "\n" for line in lines)
