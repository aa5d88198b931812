"""Which workers a training may have: those named, those that declare resources, those that hold most of the data."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distributed import Client

from dask_bridges import config, placement
from dask_bridges.errors import PlacementError
from dask_bridges.partitions import Partitions
from dask_bridges.placement import WorkerInfo

__all__ = ["LABEL", "Places"]

#: What a training is called where somebody waits for its places.
LABEL = "XGBoost training"

#: Seconds between looks at whether enough workers have come.
_LOOK_AGAIN = 0.2


@dataclass(frozen=True)
class Places:
    """What `train` is told of where to train; see there.

    Raises
    ------
    ValueError
        If a number cannot be one.
    """

    workers: Sequence[str] | None = None
    n_workers: int | None = None
    resources: Mapping[str, float] | None = None
    timeout: float | str | None = None

    def __post_init__(self) -> None:
        number = self.n_workers
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise ValueError(f"n_workers={number!r}: give a whole number from 1")
        for name, amount in (self.resources or {}).items():
            if isinstance(amount, bool) or not isinstance(amount, (int, float)) or amount <= 0:
                raise ValueError(f"resources={{{name!r}: {amount!r}}}: give a number greater than 0")

    @property
    def chosen(self) -> bool:
        """Whether not every worker of the cluster will do."""
        return self.workers is not None or bool(self.resources)

    async def usable(self, client: Client) -> list[WorkerInfo]:
        """The workers that will do; waits until there are `n_workers` of them.

        Raises
        ------
        PlacementError
            If there are none, or after `timeout` too few.
        """
        timeout = config.seconds("timeout", self.timeout)
        deadline = time.monotonic() + timeout
        while True:
            there = await placement.usable_workers(client, self.workers, timeout)
            fit = [worker for worker in there if self._has_resources(worker)]
            if fit and len(fit) >= (self.n_workers or 1):
                return fit
            if self.n_workers is None or time.monotonic() > deadline:
                raise PlacementError(self._lacking(there, fit, timeout))
            await asyncio.sleep(_LOOK_AGAIN)

    async def fullest(self, client: Client, workers: list[WorkerInfo], parts: Partitions) -> list[WorkerInfo]:
        """Of `workers` the `n_workers` that hold the most rows; all of them where no number is given."""
        if self.n_workers is None:
            return workers
        if len(workers) < self.n_workers:
            raise PlacementError(self._lacking(workers, workers, 0))
        where = await client.scheduler.who_has(keys=[future.key for future in parts.futures])
        held: Counter[str] = Counter()
        for future, rows in zip(parts.futures, parts.rows):
            held.update(dict.fromkeys(where.get(future.key, ()), rows))
        best = sorted(workers, key=lambda worker: -held[worker.address])[: self.n_workers]
        return [worker for worker in workers if worker in best]

    def _has_resources(self, worker: WorkerInfo) -> bool:
        return all(worker.resources.get(name, 0) >= amount for name, amount in (self.resources or {}).items())

    def _lacking(self, there: Sequence[WorkerInfo], fit: Sequence[WorkerInfo], waited: float) -> str:
        wanted = f"n_workers={self.n_workers}" if self.n_workers else "a training"
        if self.resources:
            wanted += f" with resources={dict(self.resources)}"
        found = ", ".join(f"{worker.address} ({worker.resources or 'no resources'})" for worker in there)
        after = f" after {waited:g} s" if waited and self.n_workers else ""
        return (
            f"{wanted}: {len(fit)} of the {len(there)} workers will do{after}; there are {found}. Start more, with "
            "`dask worker --resources NAME=AMOUNT` where resources are wanted, or ask for less"
        )
