"""What a report says in words and tables, on a page as in a terminal."""

from __future__ import annotations

from dask.utils import format_bytes

from dask_bridges.reporting.shares import KINDS
from dask_bridges.reporting.story import Attempt, Run, Story

__all__ = ["CALLED", "attempt_cells", "brief", "failures", "member_cells", "overcome"]

#: Most lines of an error.
LINES = 6

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
    """What ended it, or one of its runs, and where."""
    ended = [(run, attempt) for run in story.runs for attempt in run.attempts[-1:]]
    texts = [brief(story.error)] if story.error else []
    texts += [_told(story, run, attempt) for run, attempt in ended if attempt.error and attempt.error != story.error]
    return texts


def overcome(story: Story) -> list[str]:
    """What went wrong, where, and was begun again."""
    return [_told(story, run, attempt) for run in story.runs for attempt in run.attempts[:-1] if attempt.error]


def brief(text: str) -> str:
    """An error without its native stack, and with its first lines where it has many."""
    lines = text.partition("\nStack trace")[0].rstrip().splitlines()
    return "\n".join(lines if len(lines) <= LINES else [*lines[: LINES - 1], "…"])


def _told(story: Story, run: Run, attempt: Attempt) -> str:
    number = f"{story.runs.index(run) + 1} " if len(story.runs) > 1 else ""
    return f"{number}{run.label}, attempt {attempt.number}: {brief(attempt.error)}"


def member_cells(run: Run) -> list[list[str]]:
    """Where each member was, and what its time went into; the first row is the heads."""
    kinds = [kind for kind in KINDS if any(kind in row.totals for row in run.rows.values())]
    fed = ["rows fed"] if any(row.rows for row in run.rows.values()) else []
    head = ["member", "worker", *(CALLED[kind] for kind in kinds), *fed, "most memory", "limit"]
    return [
        head,
        *(
            [
                name,
                ", ".join(dict.fromkeys(row.workers.values())),
                *(f"{row.totals[kind]:.2f} s" if kind in row.totals else "" for kind in kinds),
                *(f"{row.rows:,}" if row.rows else "" for _ in fed),
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
                str(sum(str(each.number) in row.workers and not row.device for row in run.rows.values())),
                f"{each.ended - each.began:.2f} s" if each.ended else "",
                (each.error or "finished").partition("\n")[0],
            ]
            for each in run.attempts
        ),
    ]
