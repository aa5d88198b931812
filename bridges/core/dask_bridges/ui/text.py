"""What commands print."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dask_bridges.reporting.cells import CALLED, attempt_cells, failures, member_cells, overcome
from dask_bridges.reporting.shares import Shares
from dask_bridges.reporting.story import Story

__all__ = ["story_text", "table"]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in columns.

    >>> print(table([["name", "state"], ["a", "idle"]]))
    name  state
    a     idle
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def story_text(story: Story) -> str:
    """What a report tells, without its figures."""
    shares = Shares.of(story)
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(story.began))
    spent = [f"{CALLED[kind]} {share:.1%}" for kind, share in shares.totals.items() if share >= 0.0005]
    parts = [
        f"{when}, {story.ended - story.began:.1f} s; {shares.nobody:.0%} of the time nobody computed",
        ", ".join(spent),
        "\n".join([*failures(story), *overcome(story)]),
    ]
    for run in story.runs:
        done = ", ".join(f"{unit} {count:,}" for unit, count in run.done.items())
        parts += [f"{run.label}: {done}" if done else run.label, table(member_cells(run)), table(attempt_cells(run))]
        parts += ["\n".join(f"{name} {values[-1][1]:.6g}" for name, values in run.curves.items() if values)]
    return "\n\n".join(part for part in parts if part)
