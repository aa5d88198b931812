"""What a report says in words and tables, on a page as in a terminal."""

from __future__ import annotations

from dask.utils import format_bytes

from dask_bridges.reporting.shares import KINDS
from dask_bridges.reporting.story import Run, Story

__all__ = ["CALLED", "attempt_cells", "failures", "member_cells"]

#: What the kinds of time are called.
CALLED = {
    "compute": "computing",
    "build": "building matrices",
    "communicate": "communicating",
    "receive": "receiving data",
    "checkpoint": "checkpointing",
    "restart": "restarting",
    "start": "starting",
    "wait": "waiting for its turn",
}


def failures(story: Story) -> list[str]:
    """What went wrong, and where."""
    texts = [story.error] if story.error else []
    for run in story.runs:
        for attempt in run.attempts:
            if attempt.error and attempt.error not in texts:
                texts.append(f"{run.label}, attempt {attempt.number}: {attempt.error}")
    return texts


def member_cells(run: Run) -> list[list[str]]:
    """Where each member was, and what its time went into; the first row is the heads."""
    kinds = [kind for kind in KINDS if any(kind in row.totals for row in run.rows.values())]
    head = ["member", "worker", *(CALLED[kind] for kind in kinds), "rows fed", "most memory", "limit"]
    return [
        head,
        *(
            [
                name,
                ", ".join(dict.fromkeys(row.workers.values())),
                *(f"{row.totals[kind]:.2f} s" if kind in row.totals else "" for kind in kinds),
                f"{row.rows:,}" if row.rows else "",
                format_bytes(max(held for _, held in row.memory)) if row.memory else "",
                format_bytes(row.limit) if row.limit else "",
            ]
            for name, row in run.rows.items()
        ),
    ]


def attempt_cells(run: Run) -> list[list[str]]:
    """How long each attempt lasted, and how it ended; the first row is the heads."""
    return [
        ["attempt", "gang", "members", "lasted", "end"],
        *(
            [
                str(each.number),
                each.gang,
                str(sum(str(each.number) in row.workers for row in run.rows.values())),
                f"{each.ended - each.began:.2f} s" if each.ended else "",
                each.error or "finished",
            ]
            for each in run.attempts
        ),
    ]
