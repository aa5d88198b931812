"""A job in its own process: what it finds there, and how it is run."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pkgutil import resolve_name
from typing import Any

import wrapt
from distributed.protocol.pickle import dumps

from dask_bridges.jobs.calls import unpack
from dask_bridges.jobs.events import Reported
from dask_bridges.processes import ChildMember
from dask_bridges.processes.inputs import Inputs

__all__ = ["FOLDER", "Job", "Work", "run_here"]

#: Descriptor of the pool's spool in the processes of its jobs.
FOLDER = 250


@dataclass(frozen=True)
class Work:
    """What a job's process is told.

    Attributes
    ----------
    key : str
        Of its future.
    call : bytes
    inputs : Inputs
    devices : tuple of str
    share : float
        Of each device.
    memory : int
        Most bytes it may use on each device; 0 for no limit.
    limits : mapping of str to str
        Who sees to that: ``"module:function"`` by the name of the framework's module.
    """

    key: str
    call: bytes
    inputs: Inputs
    devices: tuple[str, ...]
    share: float
    memory: int
    limits: Mapping[str, str]


class Job:
    """The job that this process runs, as its function sees it: ``Job.current()``.

    Attributes
    ----------
    key : str
        Of its future.
    devices : tuple of str
        Names of the devices that it has, as in ``CUDA_VISIBLE_DEVICES``.
    share : float
        Of each of them; 1 for whole ones.
    memory : int
        Most bytes that it may use on each of them; 0 for no limit.

    Examples
    --------
    >>> from dask_bridges.jobs import Job
    >>> def train(rate):
    ...     for epoch in range(3):
    ...         Job.current().report(epoch, loss=rate / (epoch + 1))
    """

    _current: Job | None = None

    def __init__(self, member: ChildMember, work: Work) -> None:
        self._member = member
        self.key = work.key
        self.devices = work.devices
        self.share = work.share
        self.memory = work.memory

    @classmethod
    def current(cls) -> Job:
        """The job of this process.

        Raises
        ------
        RuntimeError
            In a process that runs none.
        """
        if cls._current is None:
            raise RuntimeError("this process runs no job: Job.current() is for functions given to DevicePool.submit")
        return cls._current

    def report(self, step: int, /, **values: float) -> None:
        """Say how far it is: whoever listens to the pool gets a `Reported` with these values."""
        numbers = {name: float(value) for name, value in values.items()}
        self._member.emit(Reported, key=self.key, step=int(step), values=numbers)


def _limit(limit: str, memory: int, module: Any) -> None:
    """Have a framework that was imported, in this moment or before, use no more memory than that."""
    resolve_name(limit)(memory)


def run_here(member: ChildMember, work: Work) -> bytes:
    """Run a job; its result, pickled."""
    member.on_stop(lambda: os.kill(os.getpid(), signal.SIGTERM))
    Job._current = Job(member, work)
    if work.memory:
        for module, limit in work.limits.items():
            wrapt.register_post_import_hook(partial(_limit, limit, work.memory), module)
    function, args, kwargs = unpack(work.call, work.inputs.open(f"/proc/self/fd/{FOLDER}"))
    return bytes(dumps(function(*args, **kwargs)))
