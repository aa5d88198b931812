"""What members have kept in their Dask workers' memory, to go on from when some are lost: no shared storage is needed.

Every member keeps the newest state of its gang, replaced whole. It outlives the
member, and its process, but not the worker: the client collects the newest one
from the workers that are left.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from distributed import Client, Worker

__all__ = ["collect", "keep", "leave"]

logger = logging.getLogger(__name__)

#: Seconds for which a member that has ended leaves its state to the client.
LEFT_FOR = 60.0
#: Seconds for which the client waits for workers to say what they have, and for one to hand it over.
ANSWER_WITHIN, HAND_OVER_WITHIN = 10.0, 120.0

# On the workers

_kept: dict[tuple[str, str, int], tuple[int, Any]] = {}  # by worker, gang and rank: the step, and the state


def keep(worker: Worker, gang: str, rank: int, step: int, state: Any) -> None:
    """Keep a state, in place of the one before."""
    _kept[worker.address, gang, rank] = step, state


def leave(worker: Worker, gang: str, rank: int) -> None:
    """The member has ended: what it has kept is there for the client, and not for ever."""
    key = (worker.address, gang, rank)
    if key in _kept:
        worker.loop.add_callback(worker.loop.call_later, LEFT_FOR, _kept.pop, key, None)


def _look(gang: str, dask_worker: Worker) -> list[tuple[int, int]]:
    """Step and rank of what is kept here."""
    return [(step, key[2]) for key, (step, _) in list(_kept.items()) if key[:2] == (dask_worker.address, gang)]


def _take(gang: str, rank: int, dask_worker: Worker) -> tuple[int, Any] | None:
    return _kept.pop((dask_worker.address, gang, rank), None)


def _forget(gang: str, dask_worker: Worker) -> None:
    for _, rank in _look(gang, dask_worker):
        _kept.pop((dask_worker.address, gang, rank), None)


# On the client


async def collect(client: Client, gang: str, workers: Sequence[str], *, wanted: bool = True) -> Any:
    """The newest state that the members of a gang have kept, of the lowest rank; they forget it.

    Parameters
    ----------
    client : Client
    gang : str
        Its id; the gang has ended.
    workers : sequence of str
        Addresses of its workers; those that are gone are not asked.
    wanted : bool
        Whether they are not only to forget.

    Returns
    -------
    object
        What was given to `keep`; None where nothing is left of it.
    """
    state = None
    try:
        async with asyncio.timeout(ANSWER_WITHIN):
            there = (await client.scheduler.identity(n_workers=-1))["workers"]
            left = [worker for worker in dict.fromkeys(workers) if worker in there]
            found = await client.run(_look, gang, workers=left, on_error="ignore") if left and wanted else {}
        kept = sorted((-step, rank, worker) for worker, some in found.items() for step, rank in some)
        async with asyncio.timeout(HAND_OVER_WITHIN):
            for _, rank, worker in kept:  # the next one, where this worker is lost just now
                taken = (await client.run(_take, gang, rank, workers=[worker], on_error="ignore")).get(worker)
                if taken is not None:
                    state = taken[1]
                    break
        async with asyncio.timeout(ANSWER_WITHIN):
            if left:
                await client.run(_forget, gang, workers=left, on_error="ignore")
    except (OSError, TimeoutError) as error:
        logger.warning("[gang %s] what its members have kept cannot be had: %r", gang, error)
    return state
