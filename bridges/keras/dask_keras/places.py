"""The workers that a training is on: chosen once, looked for again where one is lost, with devices for their ranks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from distributed import Client

from dask_bridges import config, placement
from dask_bridges.devices.members import Wanted, with_devices
from dask_bridges.errors import PlacementError
from dask_bridges.placement import WorkerInfo

__all__ = ["LABEL", "Places"]

logger = logging.getLogger(__name__)

#: What a training is called where others wait for it.
LABEL = "Keras training"


@dataclass
class Places:
    """Where the ranks of one call are.

    Attributes
    ----------
    client : Client
    workers : int, str, sequence of str, or None
        As asked for.
    gpus : int or None
        Of each rank.
    timeout : float, str or None
        Longest wait for workers and for devices.
    names : list of str
        Of the workers of the first attempt.
    """

    client: Client
    workers: int | str | Sequence[str] | None
    gpus: int | None
    timeout: float | str | None
    names: list[str] = field(default_factory=list)
    _devices: Mapping[str, Wanted] = field(default_factory=dict)  # by the workers' addresses

    @property
    def named(self) -> bool:
        """Whether the workers were asked for by their names."""
        return isinstance(self.workers, str | Sequence)

    def devices_of(self, worker: str) -> Wanted | None:
        """Those that the rank on a worker is to have; None where it is to see what the worker sees."""
        return None if self.gpus is None else self._devices[worker]

    async def find(self) -> list[str]:
        """Addresses of the workers that are to train: after a loss those of before, as far as they come back."""
        client, timeout = self.client, config.seconds("timeout", self.timeout)
        named = None if isinstance(self.workers, int) else self.workers
        if self.names:
            back = await placement.workers_back(client, self.names, others=not self.named)
            return [worker.address for worker in await self._with_devices(back)]
        usable = await placement.usable_workers(client, named, timeout)
        chosen = await self._with_devices(usable)
        if named is not None and len(chosen) < len(usable):
            left = ", ".join(worker.address for worker in usable if worker not in chosen)
            raise PlacementError(
                f"gpus_per_member={self.gpus}: there are too few devices for all of the workers named, and none for "
                f"{left}"
            )
        if isinstance(self.workers, int):
            if not 1 <= self.workers <= len(chosen):
                there = ", ".join(worker.address for worker in chosen)
                having = f" with {self.gpus} GPUs for each" if self.gpus else ""
                raise PlacementError(
                    f"workers={self.workers}, and the cluster has {len(chosen)} to use{having}: {there}"
                )
            chosen = chosen[: self.workers]
        self.names = [worker.name for worker in chosen]
        return [worker.address for worker in chosen]

    async def _with_devices(self, workers: Sequence[WorkerInfo]) -> list[WorkerInfo]:
        """Those of some workers whose ranks can have the devices that they need."""
        if self.gpus is None:
            return list(workers)
        fit, self._devices = await with_devices(self.client, workers, self.gpus, LABEL, self.timeout)
        return fit

    async def _there(self) -> list[WorkerInfo]:
        """The workers that a rank could be on now, if any."""
        there = await placement.usable_workers(self.client)
        if self.named:
            there = [worker for worker in there if worker.name in self.names]
        try:
            return await self._with_devices(there)
        except (PlacementError, OSError) as error:  # one that has devices is lost, or is being lost
            logger.info("no worker has devices now: %s", error)
            return []

    async def still_there(self, places: list[str], *, any_will_do: bool) -> list[str]:
        """Those of the places that have not left while the data were computed, elsewhere where they had to be."""
        there = await self._there()
        if any_will_do and there:  # an adaptive cluster's come and go until they have data
            self.names = [worker.name for worker in there]
            return [worker.address for worker in there]
        addresses = {worker.address for worker in there}
        left = [place for place in places if place in addresses]
        if not left:
            raise PlacementError("all workers that were to train have left the cluster while the data were computed")
        return left
