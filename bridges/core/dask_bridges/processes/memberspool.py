"""The spool of a member: what its child reads, within what the memory limit of its Dask worker leaves."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import weakref
from collections.abc import Iterator

from distributed import Worker

from dask_bridges.processes.spool import Spool
from dask_bridges.task import WorkerMember

__all__ = ["member_spool"]

_spools: weakref.WeakKeyDictionary[Worker, weakref.WeakSet[Spool]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def member_spool(member: WorkerMember) -> Iterator[tuple[Spool, int]]:
    """A folder for a member's partitions, and a descriptor of it, for its child to inherit; gone afterwards."""
    worker = member.worker
    with Spool(
        f"{member.gang}-{member.rank}",
        budget=functools.partial(_memory_left, worker),
        overflow=worker.local_directory,
        told=member.log,
    ) as spool:
        _spools.setdefault(worker, weakref.WeakSet()).add(spool)
        descriptor = os.open(spool.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield spool, descriptor
        finally:
            os.close(descriptor)


def _memory_left(worker: Worker) -> int:
    """Bytes between what a Dask worker may use, and what it uses with the files that it keeps in memory."""
    limit = worker.memory_manager.memory_limit
    if not limit:
        return sys.maxsize
    kept = sum(spool.nbytes for spool in _spools.get(worker, ()))
    return int(limit - worker.monitor.get_process_memory() - kept)
