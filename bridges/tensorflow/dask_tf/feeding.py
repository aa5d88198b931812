"""Dask collections on their way to the tasks of a TensorFlow cluster: spread, agreed upon, written beside each."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from distributed import Client, Future

from dask_bridges import partitions
from dask_bridges.events import Event, Placed
from dask_bridges.partitions import Partitions, Prepared
from dask_tf import encoding, hosting
from dask_tf.events import Spooled
from dask_tf.schema import Schema

if TYPE_CHECKING:
    from dask_tf.cluster import TensorFlowCluster

__all__ = ["Feed", "Feeding", "receivers"]


@dataclass(frozen=True)
class Feed:
    """What was fed under a name.

    Attributes
    ----------
    name : str
    schema : Schema
        Columns and dtypes; ``schema.vocabulary("column")`` is what the indices of a text column stand for.
    rows : dict of str to int
        Rows of each task, by its name.
    """

    name: str
    schema: Schema
    rows: dict[str, int]


def receivers(cluster: TensorFlowCluster, to: str | Sequence[str] | None) -> list[int]:
    """The ranks of the tasks that get the partitions.

    By default those that train: the workers, with the chief where no parameter server is
    there, which makes it one of them; without workers, all tasks but the parameter servers.

    Raises
    ------
    ValueError
        If a role has no task.
    """
    if to is not None:
        return [rank for role in ([to] if isinstance(to, str) else to) for rank in cluster._ranks(role)]
    roles = {task.role for task in cluster.tasks}
    wanted = ({"worker"} if "ps" in roles else {"worker", "chief"}) if "worker" in roles else roles - {"ps"}
    return [rank for rank, task in enumerate(cluster.tasks) if task.role in wanted]


@dataclass
class Feeding:
    """One feed, and what is needed to write a task's part of it again.

    Attributes
    ----------
    cluster : TensorFlowCluster
    name : str
    prepared : Prepared
        The collections.
    keep : bool
        Whether Dask keeps its partitions in memory beside the files.
    """

    cluster: TensorFlowCluster
    name: str
    prepared: Prepared
    keep: bool
    feed: Feed | None = None
    _numbers: dict[int, list[int]] = field(default_factory=dict)  # partitions of each rank
    _kept: list[Future] = field(default_factory=list)

    @property
    def client(self) -> Client:
        """That of the cluster."""
        return self.cluster.client

    async def run(self, ranks: Sequence[int]) -> Feed:
        """Compute the collections, spread them over the tasks and write them there."""
        cluster, roles = self.cluster, tuple(self.prepared.aligned)
        parts = await partitions.load(self.client, self.prepared, inspect=encoding.look)
        try:
            schema = encoding.merge([info.extra for info in parts.infos], roles)
            places = {rank: cluster._place(rank) for rank in ranks}
            await parts.spread(self.client, list(dict.fromkeys(places.values())))
            self._numbers = _by_rank(parts, places)
            rows = {cluster.tasks[rank].name: sum(parts.rows[n] for n in self._numbers[rank]) for rank in ranks}
            if cluster.events.detail:
                cluster.events.publish(self._placed(parts))
            await self._write(parts, schema, self._numbers)
        finally:
            parts.futures.clear()  # or what is raised would hold them by its traceback
        others = [rank for rank in range(len(cluster.tasks)) if rank not in places]
        await _all(cluster._call(rank, hosting.learn_in_task, self.name, schema) for rank in others)
        self.feed = Feed(self.name, schema, rows)
        return self.feed

    def _placed(self, parts: Partitions) -> Placed:
        """The rank of each partition, its rows and bytes."""
        ranks = {number: rank for rank, its in self._numbers.items() for number in its}
        filled = [number for number in parts.filled() if number in ranks]
        return Placed(
            gang=self.cluster.id,
            name=self.name,
            ranks=[ranks[number] for number in filled],
            rows=[int(parts.rows[number]) for number in filled],
            nbytes=[int(parts.infos[number].nbytes) for number in filled],
        )

    async def again(self, rank: int) -> None:
        """Write what a task had, where that was lost with its Dask worker."""
        feed, cluster = self.feed, self.cluster
        if feed is None:  # it is being fed just now, and that fails
            return
        numbers = self._numbers.get(rank)
        if numbers is None:
            await _all([cluster._call(rank, hosting.learn_in_task, self.name, feed.schema)])
            return
        some = replace(self.prepared, keys=[self.prepared.keys[number] for number in numbers])
        parts = await partitions.load(self.client, some, inspect=encoding.look)
        await parts.spread(self.client, [cluster._place(rank)])
        await self._write(parts, feed.schema, {rank: list(range(len(numbers)))})

    async def _write(self, parts: Partitions, schema: Schema, numbers: Mapping[int, Sequence[int]]) -> None:
        """Have every rank's worker write its partitions; let go of each as it is written."""
        held, ticket = dict(enumerate(parts.futures)), uuid.uuid4().hex
        keys = {rank: {number: held[number].key for number in its} for rank, its in numbers.items()}
        parts.futures.clear()

        def written(event: Event) -> None:
            if isinstance(event, Spooled) and event.ticket == ticket and not self.keep:
                held.pop(event.part).release()

        call = self.cluster._call
        self.cluster.events.listen(written)
        try:
            await _all(call(rank, hosting.spool_in_task, self.name, schema, its, ticket) for rank, its in keys.items())
            if self.keep:
                self._kept.extend(held.values())
        finally:
            self.cluster.events.unlisten(written)
            held.clear()


def _by_rank(parts: Partitions, places: Mapping[int, str]) -> dict[int, list[int]]:
    """The partitions of each rank; those that share a Dask worker divide what it holds by rows."""
    rows = dict.fromkeys(places, 0)
    numbers: dict[int, list[int]] = {rank: [] for rank in places}
    for number in sorted(range(len(parts.rows)), key=lambda number: -parts.rows[number]):
        here = [rank for rank, worker in places.items() if worker == parts.workers[number]]
        rank = min(here, key=lambda rank: (rows[rank], rank))
        rows[rank] += parts.rows[number]
        numbers[rank].append(number)
    return {rank: sorted(its) for rank, its in numbers.items()}


async def _all(futures: Iterable[Future]) -> None:
    """Wait for tasks that give nothing, and raise what the first one raised."""
    asked = list(futures)
    try:
        await asyncio.gather(*(future.result() for future in asked))
    finally:
        for future in asked:
            future.release()
