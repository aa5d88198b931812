"""Which worker is which rank of a training, and which partitions it has; anew after a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distributed import Client

from dask_bridges import placement
from dask_bridges.devices.members import Wanted
from dask_bridges.placement import WorkerInfo
from dask_xgboost import dmatrix
from dask_xgboost.datasets import Datasets
from dask_xgboost.devices import on_gpus
from dask_xgboost.dmatrix import PACKAGES
from dask_xgboost.places import LABEL, Places
from dask_xgboost.replacing import replace
from dask_xgboost.residency import Residency
from dask_xgboost.resuming import Placement

__all__ = ["Seating"]


class Seating:
    """Where the ranks of a training are, and the data with them.

    Parameters
    ----------
    client : Client
    sets : Datasets
    residency : Residency
    places : Places

    Attributes
    ----------
    ranks : list of str
        The addresses of the workers, by rank; empty before the first time.
    placement : tuple of tuple of int
        The rank of each partition, by matrix.
    devices : mapping of str to Wanted
        By the workers' addresses, where GPUs train.
    owned : bool
        Whether ranks train in their workers' processes.
    newly : list of WorkerInfo
        The workers of the ranks to which data were brought the first time.
    """

    def __init__(self, client: Client, sets: Datasets, residency: Residency, places: Places) -> None:
        self._client, self._sets, self._residency, self._places = client, sets, residency, places
        self._names: list[str] = []  # of the workers, by rank
        self.ranks: list[str] = []
        self.placement: Placement = ()
        self.devices: Mapping[str, Wanted] = {}
        self.owned = True
        self.newly: list[WorkerInfo] = []

    async def place(self) -> None:
        """See that the workers are there, by rank, with all data; after a loss where they were, as far as can be."""
        if self._names:
            await self._place_again()
        else:
            await self._place_first()

    async def place_as(self, before: Placement) -> None:
        """Give every rank the partitions that it had when a state was kept, where there are as many."""
        now = self.placement
        if now == before or max(before[0]) != max(now[0]) or [*map(len, before)] != [*map(len, now)]:
            return
        await self._move(self.ranks, before)
        self.placement = before

    async def _place_first(self) -> None:
        sets, places = self._sets, self._places
        usable = await self._usable()
        again = [worker for worker in usable if places.n_workers is None or worker.address in sets.matrix.among]
        enough = places.n_workers in (None, len(again))
        if enough and self._residency.complete([worker.address for worker in again]):
            self._settle(again)
            return
        addresses = [worker.address for worker in usable]
        placed = [matrix for matrix in sets.each if matrix.placed]
        await replace(self._client, placed, addresses if places.chosen else None)
        await dmatrix.place(self._client, sets.each, addresses if sets.gpus or places.chosen else None)
        usable = await places.fullest(self._client, await self._usable(), sets.matrix.parts)
        await self._spread([worker.address for worker in usable])
        self._settle(usable)
        self.newly = [worker for worker in usable if worker.address in self.ranks]

    async def _place_again(self) -> None:
        named = self._places.chosen
        back = await self._with_gpus(await placement.workers_back(self._client, self._names, others=not named))
        places = [worker.address for worker in back]
        await replace(self._client, self._sets.each, places if named else None)
        await self._check_packages(places)
        if len(places) == len(self._names):
            await self._move(places, self.placement)
        else:
            await self._spread(places)
        self._settle(back)

    async def _usable(self) -> list[WorkerInfo]:
        """The workers that can train now."""
        return await self._with_gpus(await self._places.usable(self._client))

    async def _with_gpus(self, workers: list[WorkerInfo]) -> list[WorkerInfo]:
        """Those that have a GPU, where GPUs train; once children have trained, they do so after a loss, too."""
        if not self._sets.gpus:
            return workers
        await self._check_packages([worker.address for worker in workers])
        named, timeout = self._places.workers is not None, self._places.timeout
        there = await on_gpus(self._client, workers, LABEL, named=named, owned=self.owned, timeout=timeout)
        self.devices, self.owned = there.wanted, there.owned
        return there.workers

    async def _check_packages(self, workers: Sequence[str]) -> None:
        await placement.check_packages(self._client, workers, PACKAGES, remedy=' ("dask-bridges[xgboost]")')

    async def _spread(self, places: Sequence[str]) -> None:
        matrix, *others = self._sets.each
        await matrix.parts.spread(self._client, places)
        matrix.among = frozenset(places)
        ranks = matrix.parts.holding()
        await self._check_packages(ranks)
        for other in others:
            await other.place_like(ranks, everywhere=bool(self._sets.categories()))

    async def _move(self, places: Sequence[str], by_rank: Placement) -> None:
        for matrix, ranks in zip(self._sets.each, by_rank):
            await matrix.parts.place(self._client, [places[rank] for rank in ranks])

    def _settle(self, workers: Sequence[WorkerInfo]) -> None:
        """Take down who is which rank, and what each one has."""
        self.ranks = self._sets.matrix.parts.holding()
        by_address = {worker.address: worker.name for worker in workers}
        self._names = [by_address[address] for address in self.ranks]
        numbers = {address: rank for rank, address in enumerate(self.ranks)}
        self.placement = tuple(
            tuple(numbers.get(address, 0) for address in matrix.parts.workers) for matrix in self._sets.each
        )
