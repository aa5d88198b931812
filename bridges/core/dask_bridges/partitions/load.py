"""Compute what is prepared, look at every partition, spread them by rows."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dask
from dask._task_spec import TaskRef
from dask.core import flatten
from distributed import Client, Future, KilledWorker

from dask_bridges import config
from dask_bridges.errors import DataError, PlacementError, WorkerLeft
from dask_bridges.partitions.balance import assign, runs
from dask_bridges.partitions.blocks import Inspect, PartInfo, cut, describe
from dask_bridges.partitions.collections import is_frame
from dask_bridges.partitions.prepare import Prepared
from dask_bridges.shipping import sealed_task

__all__ = ["Partitions", "load", "load_all"]

#: Seconds between looks at whether the workers that parts are moved to are still there.
_LOOK_AGAIN = 2.0


@dataclass
class Partitions:
    """The partitions of one or more aligned collections, in the workers' memory.

    Attributes
    ----------
    roles : tuple of str
        Names of the collections, as in each part.
    infos : list of PartInfo
        What is known of each partition.
    futures : list of Future
        The parts; they stay on the workers as long as these are held.
    workers : list of str
        The worker of each part.
    released : bool
        Whether they are let go of.
    """

    roles: tuple[str, ...]
    infos: list[PartInfo]
    futures: list[Future]
    workers: list[str] = field(default_factory=list)
    released: bool = False

    @property
    def rows(self) -> list[int]:
        """Rows of each part."""
        return [info.rows[self.roles[0]] for info in self.infos]

    def keys_on(self, worker: str) -> tuple[Any, ...]:
        """Keys of the parts that hold rows on `worker`, in the order of the partitions."""
        return tuple(
            future.key for future, where, rows in zip(self.futures, self.workers, self.rows) if where == worker and rows
        )

    def rows_by_part(self, worker: str) -> tuple[tuple[int, int], ...]:
        """Number and rows of each part that holds rows on `worker`."""
        return tuple(
            (part, rows) for part, (where, rows) in enumerate(zip(self.workers, self.rows)) if where == worker and rows
        )

    def rows_on(self, worker: str) -> int:
        """Rows on `worker`."""
        return sum(rows for where, rows in zip(self.workers, self.rows) if where == worker)

    def nbytes_on(self, worker: str) -> int:
        """Bytes of the parts on `worker`."""
        return sum(info.nbytes for where, info in zip(self.workers, self.infos) if where == worker)

    def holding(self) -> list[str]:
        """Workers that hold rows, in the order of their first part: the ranks."""
        return list(dict.fromkeys(w for w, rows in zip(self.workers, self.rows) if rows))

    def lying(self, workers: Sequence[str]) -> dict[str, list[int]]:
        """The rank of each part that holds rows, with `workers` by rank, its rows and its bytes: for `Placed`."""
        numbers = {worker: rank for rank, worker in enumerate(workers)}
        filled = [part for part in self.filled() if self.workers[part] in numbers]
        return {
            "ranks": [numbers[self.workers[part]] for part in filled],
            "rows": [int(self.rows[part]) for part in filled],
            "nbytes": [int(self.infos[part].nbytes) for part in filled],
        }

    def filled(self) -> list[int]:
        """Indices of the parts that hold rows."""
        return [part for part, rows in enumerate(self.rows) if rows]

    def release(self) -> None:
        """Let go of the parts; what is known of them, and where they were, stays."""
        self.released = True
        for future in self.futures:
            future.release()

    def split(self, client: Client, at_least: int) -> None:
        """Cut the largest parts in two until `at_least` of them hold rows, where there are rows enough."""
        while len(self.filled()) < at_least:
            part = max(range(len(self.infos)), key=self.rows.__getitem__)
            info, future, rows = self.infos[part], self.futures[part], self.rows[part]
            if rows < 2:
                return
            bounds = [(0, rows // 2), (rows // 2, rows)]
            self.futures[part : part + 1] = [_derive(client, future, *b) for b in bounds]
            self.infos[part : part + 1] = [
                PartInfo(dict.fromkeys(info.rows, stop - start), info.nbytes * (stop - start) // rows, info.extra)
                for start, stop in bounds
            ]

    async def spread(self, client: Client, workers: Sequence[str], *, everywhere: bool = False) -> None:
        """See that every part is on one of `workers`, and that these hold like numbers of rows.

        With `everywhere`, each worker gets rows if there are parts enough.

        Raises
        ------
        PlacementError
            If a worker leaves, or stays paused, while parts are moved to it.
        """
        holders = await self._holders(client)
        tolerance = float(config.get("balance-tolerance"))
        await self._move(client, holders, assign(self.rows, holders, workers, tolerance, everywhere=everywhere))

    async def divide(self, client: Client, workers: Sequence[str]) -> None:
        """See that workers hold runs of consecutive parts with like numbers of rows; raises as `spread` does.

        Which parts are together does not depend on where they are, for results that can be had again; they go
        where most of them are.
        """
        holders = await self._holders(client)
        free, places = list(workers), [""] * len(self.rows)
        for run in runs(self.rows, len(workers)):
            held = {worker: sum(self.rows[part] for part in run if worker in holders[part]) for worker in free}
            worker = max(free, key=held.__getitem__)
            free.remove(worker)
            for part in run:
                places[part] = worker
        await self._move(client, holders, places)

    async def place(self, client: Client, workers: Sequence[str]) -> None:
        """See that every part is on the worker of its number in `workers`; raises as `spread` does."""
        await self._move(client, await self._holders(client), workers)

    async def lost(self, client: Client) -> list[int]:
        """Indices of the parts that no worker has any more, or has to have."""
        if self.released:
            return list(range(len(self.futures)))
        where = await client.scheduler.who_has(keys=[future.key for future in self.futures])
        return [part for part, future in enumerate(self.futures) if not where.get(future.key)]

    async def _holders(self, client: Client) -> list[Sequence[str]]:
        """The workers that have each part, once it is there: one that was moved to a worker comes back with it only."""
        await _arrived(client, self.futures, set(self.workers))
        where = await client.scheduler.who_has(keys=[future.key for future in self.futures])
        return [where.get(future.key, ()) for future in self.futures]

    async def _move(self, client: Client, holders: Sequence[Sequence[str]], workers: Sequence[str]) -> None:
        self.workers = list(workers)
        moved: dict[int, Future] = {
            part: _derive(client, self.futures[part], None, None, target)
            for part, target in enumerate(self.workers)
            # One of several copies may be dropped at any time, so that one gets a key of its own.
            if set(holders[part]) != {target}
        }
        if moved:
            await _arrived(client, moved.values(), {self.workers[part] for part in moved})
            for part, future in moved.items():
                self.futures[part] = future


def _derive(client: Client, part: Future, start: int | None, stop: int | None, worker: str | None = None) -> Future:
    """Rows `start` to `stop` of a part (all: the part itself, moved) as a part of its own, on `worker`."""
    key = f"dask-bridges-part-{uuid.uuid4().hex}"
    graph = {key: sealed_task(key, cut, start, stop, inputs=(TaskRef(part.key),))}
    pinned = {} if worker is None else {"workers": [worker], "allow_other_workers": False}
    return client.get(graph, key, sync=False, priority=50, **pinned)


async def _done(futures: Iterable[Future]) -> None:
    """Wait for tasks and raise what they raised; nothing is fetched."""
    for error in await asyncio.gather(*(future.exception() for future in futures)):
        if error is not None:
            raise error


async def _arrived(client: Client, parts: Iterable[Future], targets: set[str]) -> None:
    """Wait for parts that are moved. A task pinned to a worker that is gone or paused would wait for ever."""
    done = asyncio.ensure_future(_done(parts))
    paused: dict[str, float] = {}  # since when
    try:
        while not (await asyncio.wait({done}, timeout=_LOOK_AGAIN))[0]:
            there, now = (await client.scheduler.identity(n_workers=-1))["workers"], time.monotonic()
            if gone := sorted(targets - set(there)):
                raise WorkerLeft(f"workers {gone} left the cluster while data were moved to them")
            paused = {w: paused.get(w, now) for w in sorted(targets) if there[w]["status"] == "paused"}
            if any(now - since >= config.seconds("timeout") for since in paused.values()):
                raise PlacementError(
                    f"workers {[*paused]} are paused, so data cannot be moved to them: memory is short"
                )
        done.result()
    finally:
        done.cancel()


async def load(
    client: Client,
    prepared: Prepared,
    *,
    inspect: Inspect | None = None,
    workers: Iterable[str] | None = None,
) -> Partitions:
    """Compute the collections on the cluster, once, and describe every partition.

    Parameters
    ----------
    client : Client
    prepared : Prepared
    inspect : callable, optional
        ``inspect(part)`` runs where the part is; its result is in `PartInfo.extra`.
    workers : iterable of str, optional
        Addresses where the partitions may be computed.

    Returns
    -------
    Partitions
        Not yet spread.

    Raises
    ------
    DataError
        If a partition cannot be computed (named with its collection), or the rows
        of the collections differ.
    """
    return (await load_all(client, [(prepared, inspect)], workers=workers))[0]


async def load_all(
    client: Client,
    sets: Sequence[tuple[Prepared, Inspect | None]],
    *,
    workers: Iterable[str] | None = None,
) -> list[Partitions]:
    """`load` what `prepare_all` has prepared, each set with its own inspect function."""
    graph: dict[Any, Any] = {}
    wanted = []
    for prepared, inspect in sets:
        graph.update(prepared.graph)
        name = "dask-bridges-describe-" + dask.base.tokenize(prepared.keys, inspect)
        looks = [(name, index) for index in range(len(prepared.keys))]
        for look, key in zip(looks, prepared.keys):
            graph[look] = sealed_task(look, describe, inspect, inputs=(TaskRef(key),))
        wanted.append([list(prepared.keys), looks])
    restriction = {} if workers is None else {"workers": list(workers), "allow_other_workers": False}
    packed = client.get(graph, wanted, sync=False, **restriction)
    try:
        described = await client.gather([infos for _, infos in packed])
        for (prepared, _), infos in zip(sets, described):
            _check_rows(tuple(prepared.aligned), infos)
    except BaseException as error:
        failed = next(
            ((prepared.aligned, index) for (prepared, _), (_, infos) in zip(sets, packed)
             for index, future in enumerate(infos) if future.status == "error"),
            (sets[0][0].aligned, 0),
        )  # fmt: skip
        for future in flatten(packed):  # now: the traceback, and who holds it, would keep the data on the workers
            future.release()
        if isinstance(error, DataError) or not isinstance(error, Exception):
            raise
        raise await _blame(client, *failed, error) from error
    return [
        Partitions(tuple(prepared.aligned), list(infos), list(futures))
        for (prepared, _), infos, (futures, _) in zip(sets, described, packed)
    ]


def _check_rows(roles: tuple[str, ...], infos: Sequence[PartInfo]) -> None:
    """Every partition must hold as many rows of each collection."""
    lead = roles[0]
    for other in roles[1:]:
        bad = [index for index, info in enumerate(infos) if info.rows[lead] != info.rows[other]]
        if bad:
            total = {role: sum(info.rows[role] for info in infos) for role in (lead, other)}
            first = infos[bad[0]].rows
            raise DataError(
                f"{lead} has {total[lead]} rows and {other} has {total[other]}; partition {bad[0]} holds "
                f"{first[lead]} rows of {lead} and {first[other]} of {other}. They must match row for row: "
                "give both the same partitions."
            )


async def _blame(client: Client, aligned: Mapping[str, Any], index: int, error: Exception) -> DataError:
    """Name the collection whose partition failed: computed apart, only the guilty one fails."""
    if isinstance(error, KilledWorker):  # computing it again would cost as many workers again
        index = error.task[1] if isinstance(error.task, tuple) else index
        return DataError(f"partition {index} of {' or '.join(aligned)} could not be computed: {error}")
    apart = {role: client.compute(_partition(c, index)) for role, c in aligned.items()}
    outcomes = await asyncio.gather(*(future.exception() for future in apart.values()), return_exceptions=True)
    guilty = [role for role, outcome in zip(apart, outcomes) if outcome is not None]
    for future in apart.values():
        future.release()
    return DataError(
        f"partition {index} of {' and '.join(guilty or aligned)} could not be computed: {type(error).__name__}: {error}"
    )


def _partition(collection: Any, index: int) -> Any:
    return collection.to_delayed()[index] if is_frame(collection) else collection.blocks[index]
