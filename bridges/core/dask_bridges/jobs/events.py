"""What jobs tell while they run."""

from __future__ import annotations

from dataclasses import dataclass

from dask_bridges.events import Log, Offered, Ran, Reported

__all__ = ["JobLog", "Offered", "Ran", "Reported"]


@dataclass(frozen=True, kw_only=True)
class JobLog(Log):
    """Lines that a job wrote; `key` is its future's."""

    key: str
