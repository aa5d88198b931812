"""What the tasks of a TensorFlow cluster tell, beside what all members do."""

from __future__ import annotations

from dataclasses import dataclass

from dask_bridges.events import Down, Event, Up

__all__ = ["RoleDown", "RoleEmpty", "RoleUp", "Spooled"]


@dataclass(frozen=True, kw_only=True)
class RoleUp(Up):
    """A task's process is there, and its server listens where it has one; `start` counts from 1."""

    role: str
    index: int
    address: str
    worker: str
    pid: int
    start: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RoleEmpty(Event):
    """A task was lost with its Dask worker and is on another, where it waits for what was fed to it."""

    worker: str


@dataclass(frozen=True, kw_only=True)
class Spooled(Event):
    """A task's Dask worker has written a partition, for whoever holds the ticket, where the task's process finds it."""

    ticket: str
    part: int


@dataclass(frozen=True, kw_only=True)
class RoleDown(Down):
    """A task's process is gone, and is started again; `wanted` where somebody asked for that."""

    role: str
    index: int
    reason: str
    wanted: bool = False
