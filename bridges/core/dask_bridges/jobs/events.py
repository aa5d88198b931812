"""What jobs tell while they run."""

from __future__ import annotations

from dataclasses import dataclass, field

from dask_bridges.events import Event, Log

__all__ = ["JobLog", "Offered", "Reported"]


@dataclass(frozen=True, kw_only=True)
class Offered(Event):
    """A worker offers its devices to the jobs of a pool."""

    worker: str
    devices: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Reported(Event):
    """A job says how far it is: values such as ``{"val_loss": 0.3}`` after step `step`; `key` is its future's."""

    key: str
    step: int
    values: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class JobLog(Log):
    """Lines that a job wrote; `key` is its future's."""

    key: str
