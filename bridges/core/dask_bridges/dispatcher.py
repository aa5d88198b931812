"""Which worker gets the next job of a pool of devices, decided on the scheduler when a device is free.

Dask sends a task to a worker as soon as some worker has enough of its resource *in
all*, and it waits there, also while another worker has some to spare. So the
scheduler is told that no worker has any: tasks wait with it, as those that no worker
can run, and each is let go to a worker of our choice once there is room for it. The
order is Dask's own; the first is not overtaken. Sent by value, as the arbiter is.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from typing import Any

from distributed.core import Status
from distributed.diagnostics.plugin import SchedulerPlugin

__all__ = ["Dispatcher"]

logger = logging.getLogger("dask_bridges.dispatcher")

#: Seconds until it is tried again where no worker with room is running.
AGAIN = 1.0


class _Pool:
    """The jobs that wait for one resource, and who has how much of it."""

    def __init__(self) -> None:
        self.total: dict[str, float] = {}
        self.used: dict[str, float] = {}
        self.waiting: list[tuple[Any, str]] = []  # a heap of (order, key)

    def room(self, worker: str) -> float:
        return self.total.get(worker, 0.0) - self.used.get(worker, 0.0)


class Dispatcher(SchedulerPlugin):  # type: ignore[misc]
    """Lets jobs go to workers that have room for them; one a scheduler, there while it has pools."""

    name = "dask-bridges-dispatcher"

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.pools: dict[str, _Pool] = {}
        self.placed: dict[str, tuple[str, str, float]] = {}  # resource, worker and amount of each job under way
        self.due: Any = None

    def offer(self, resource: str, worker: str, amount: float) -> None:
        """A worker has so much of a resource from now on; 0 for no more."""
        pool = self.pools.setdefault(resource, _Pool())
        pool.total[worker] = amount
        if not amount:
            self.withdraw(worker, resource)
        self.hide()
        self.wake()

    def hide(self) -> None:
        """Have Dask see none of our resources."""
        for resource in self.pools:
            there = self.scheduler.resources.get(resource, {})
            for worker in there:
                there[worker] = 0

    def withdraw(self, worker: str, resource: str | None = None) -> None:
        """A worker has nothing any more."""
        for name, pool in list(self.pools.items()):
            if resource in (None, name):
                pool.total.pop(worker, None)
                pool.used.pop(worker, None)
                if not pool.total and resource is not None:
                    del self.pools[name]

    # What Dask tells

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        """A task changes: it waits, has gone to a worker, or has come back from there."""
        if start == "processing" and key in self.placed:
            resource, worker, amount = self.placed.pop(key)
            pool = self.pools.get(resource)
            if pool is not None and worker in pool.used:
                pool.used[worker] -= amount
            self.wake()
        if finish in ("no-worker", "processing"):
            task = self.scheduler.tasks[key]
            for resource, amount in (task.resource_restrictions or {}).items():
                if (pool := self.pools.get(resource)) is None:
                    continue
                if finish == "no-worker":
                    heapq.heappush(pool.waiting, (_order(task), key))
                    self.wake()
                else:
                    worker = task.processing_on.address
                    pool.used[worker] = pool.used.get(worker, 0.0) + amount
                    self.placed[key] = resource, worker, amount

    def remove_worker(self, scheduler: Any, worker: str, **kwargs: Any) -> None:
        """A worker is gone; its tasks are told of beside that."""
        self.withdraw(worker)

    # Letting go

    def wake(self, after: float = 0.0) -> None:
        """Look soon, once for all that happens until then."""
        if self.due is None:
            self.due = asyncio.get_running_loop().call_later(after, self.dispatch)

    def dispatch(self) -> None:
        """Let go whoever is first in its pool and has room."""
        self.due = None
        try:
            for resource, pool in list(self.pools.items()):
                while pool.waiting and self.let_go(resource, pool):
                    pass
        except Exception:
            logger.exception("dispatcher")

    def let_go(self, resource: str, pool: _Pool) -> bool:
        """Send the first job that waits to a worker, if one has room; whether to go on."""
        order, key = pool.waiting[0]
        task = self.scheduler.tasks.get(key)
        if task is None or task.state != "no-worker" or _order(task) != order:  # cancelled, or asked anew
            heapq.heappop(pool.waiting)
            return True
        amount = task.resource_restrictions[resource]
        fit = [worker for worker in pool.total if pool.room(worker) >= amount]
        running = [w for w in fit if getattr(self.scheduler.workers.get(w), "status", None) == Status.running]
        if not running:
            if fit:
                self.wake(AGAIN)
            return False
        # Whole devices where most are free; shares where one has been begun, so that whole ones stay whole.
        worker = min(running, key=lambda w: (amount >= 1 or pool.room(w) % 1 < amount, -pool.room(w)))
        self.scheduler.resources[resource][worker] = amount
        try:
            self.scheduler.transitions({key: "processing"}, f"{self.name}-{time.time()}")
        finally:
            self.scheduler.resources[resource][worker] = 0
        if task.state == "no-worker":  # Dask would not have it
            self.wake(AGAIN)
            return False
        if pool.waiting and pool.waiting[0][1] == key:
            heapq.heappop(pool.waiting)
        return True


def _order(task: Any) -> tuple[Any, ...]:
    """Dask's priority: what the user said, then who came first; of those that came together, by their keys."""
    return (*task.priority[:-1], task.key)
