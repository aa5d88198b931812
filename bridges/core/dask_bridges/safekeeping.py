"""What members have kept in their Dask workers' memory, to go on from when some are lost: no shared storage is needed.

Every member keeps the newest state of its gang, replaced whole. It outlives the
member, and its process, but not the worker: the client collects the newest one
from the workers that are left.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
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
    there = await _within(ANSWER_WITHIN, "the scheduler", client.scheduler.identity(n_workers=-1)) or {"workers": ()}
    left = [worker for worker in dict.fromkeys(workers) if worker in there["workers"]]
    state = None
    if wanted:
        looked = await asyncio.gather(*(_ask(client, worker, _look, gang) for worker in left))
        kept = sorted((-step, rank, worker) for worker, some in zip(left, looked) for step, rank in some or ())
        for _, rank, worker in kept:  # the next one, where this one is lost just now
            if taken := await _ask(client, worker, _take, gang, rank, within=HAND_OVER_WITHIN):
                state = taken[1]
                break
        left = [worker for worker, some in zip(left, looked) if some]
    await asyncio.gather(*(_ask(client, worker, _forget, gang) for worker in left))
    return state


async def _ask(client: Client, worker: str, function: Any, *args: Any, within: float = ANSWER_WITHIN) -> Any:
    """What one worker says; None where it is lost or frozen, for which others are not to wait."""
    said = await _within(within, worker, client.run(function, *args, workers=[worker], on_error="ignore"))
    return (said or {}).get(worker)


async def _within(seconds: float, whose: str, answer: Awaitable[Any]) -> Any:
    try:
        return await asyncio.wait_for(answer, seconds)
    except (OSError, TimeoutError) as error:
        logger.warning("what members have kept cannot be had from %s: %r", whose, error)
        return None
