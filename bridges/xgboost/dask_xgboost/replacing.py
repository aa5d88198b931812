"""Matrices of which a worker that is gone had some: what was lost is computed again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from dask.core import flatten
from distributed import Client

from dask_bridges import config
from dask_bridges.errors import PlacementError
from dask_xgboost.dmatrix import DMatrix, load

__all__ = ["replace"]

#: Seconds between looks at whether tasks wait for workers that are gone.
_LOOK_AGAIN = 1.0


async def replace(client: Client, matrices: Sequence[DMatrix], workers: Sequence[str] | None) -> None:
    """Compute again what was lost of placed matrices; what workers still have is used.

    Parameters
    ----------
    client : Client
    matrices : sequence of DMatrix
    workers : sequence of str, optional
        Addresses where it may be computed.

    Raises
    ------
    PlacementError
        If some of it is bound to workers that are gone.
    """
    hurt = []
    for matrix in matrices:
        if lost := await matrix.parts.lost(client):
            for part in lost:  # those that were moved would wait for the worker that is gone
                matrix.parts.futures[part].release()
            hurt.append(matrix)
    if not hurt:
        return
    loading = asyncio.ensure_future(load(client, hurt, workers))
    try:
        await _until(loading, client, _keys(hurt))
    finally:
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
    for matrix, loaded in zip(hurt, loading.result()):
        loaded.split(client, len(matrix.parts.filled()))
        matrix._loaded = loaded


async def _until(loading: asyncio.Future[Any], client: Client, keys: list[Any]) -> None:
    """Wait, but not for tasks that wait for a worker that is gone."""
    patience, stuck_since = config.seconds("worker-return-timeout"), time.monotonic()
    while not (await asyncio.wait({loading}, timeout=_LOOK_AGAIN))[0]:
        states = await client.scheduler.get_task_status(keys=keys)
        stuck = [key for key, state in states.items() if state == "no-worker"]
        if not stuck:
            stuck_since = time.monotonic()
        elif time.monotonic() - stuck_since > patience:
            raise PlacementError(
                f"lost data cannot be computed again: {len(stuck)} tasks, such as {stuck[0]}, may only run on "
                "workers that are gone. Persist without workers=, or with allow_other_workers=True"
            )


def _keys(matrices: Sequence[DMatrix]) -> list[Any]:
    """Of all that may have to be computed, persisted blocks included."""
    keys: dict[Any, None] = {}
    for matrix in matrices:
        assert matrix._prepared is not None
        keys.update(dict.fromkeys(matrix._prepared.graph))
        for collection in matrix._prepared.aligned.values():
            keys.update(dict.fromkeys(flatten(collection.__dask_keys__())))
    return list(keys)
