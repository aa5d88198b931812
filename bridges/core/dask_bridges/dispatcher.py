"""Which worker gets the next job of a pool of devices, decided on the scheduler when a device is free.

Dask sends a task to a worker as soon as some worker has enough of its resource *in
all*, and it waits there, also while another worker has some to spare. So the
scheduler is told that no worker has any: tasks wait with it, as those that no worker
can run, and each is let go to a worker of our choice once there is room for it. The
order is Dask's own; the first is not overtaken. Sent by value, as the arbiter is.

Where jobs are brief, each device has its next one sent ahead: it waits on the worker,
and begins when the device is free. It is called back when a device is free elsewhere,
when one of higher priority comes, or when it has been overtaken too often. A worker
gives back what has not begun, and Dask charges nobody for it. Who has begun is
presumed; where a worker has begun another one, it gives back the one that waits.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from dataclasses import dataclass
from typing import Any

from distributed.core import Status
from distributed.diagnostics.plugin import SchedulerPlugin

__all__ = ["GIVE_BACK", "Dispatcher"]

logger = logging.getLogger("dask_bridges.dispatcher")

#: Name of the stream handler on the workers by which jobs that were sent ahead are called back.
GIVE_BACK = "dask_bridges_give_back"
#: Seconds until it is tried again where no worker with room is running, and where a job that was called back stays.
AGAIN, CALL_AGAIN = 1.0, 0.2
#: Jobs that last longer, in seconds, are not sent ahead: that would save them next to nothing.
BRIEF = 2.0


@dataclass
class _Placed:
    """A job on its worker."""

    resource: str
    worker: str
    amount: float
    order: tuple[Any, ...]
    suspicious: int  # how often Dask has seen a worker die with it
    begun: float = 0.0  # when it had its devices
    passed: int = 0  # jobs that have begun elsewhere since, though they come after it
    called: float = 0.0  # when it was called back last


class _Pool:
    """The jobs that wait for one resource, and who has how much of it."""

    def __init__(self) -> None:
        self.total: dict[str, float] = {}
        self.used: dict[str, float] = {}
        self.ahead: dict[str, list[str]] = {}  # what was sent to each worker and has not begun
        self.slow: set[str] = set()  # workers from which a job was called back since they began one
        self.waiting: list[tuple[Any, str]] = []  # a heap of (order, key)
        self.lasts = float("inf")  # seconds; a running mean

    def room(self, worker: str) -> float:
        return self.total.get(worker, 0.0) - self.used.get(worker, 0.0)

    def fits(self, worker: str, amount: float) -> bool:
        """Whether a job would begin there at once."""
        return not self.ahead.get(worker) and self.room(worker) >= amount


class Dispatcher(SchedulerPlugin):  # type: ignore[misc]
    """Lets jobs go to workers that have room for them; one a scheduler, there while it has pools."""

    name = "dask-bridges-dispatcher"

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.pools: dict[str, _Pool] = {}
        self.placed: dict[str, _Placed] = {}  # the jobs under way
        self.due: Any = None
        self.sent = 0

    def offer(self, resource: str, worker: str, amount: float) -> None:
        """A worker has so much of a resource from now on; 0 for no more."""
        pool = self.pools.setdefault(resource, _Pool())
        pool.total[worker] = amount
        if amount:
            self.begin(pool, worker)
        else:
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
                for of_worker in (pool.total, pool.used, pool.ahead):
                    of_worker.pop(worker, None)
                if not pool.total and resource is not None:
                    del self.pools[name]

    # What Dask tells

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        """A task changes: it waits, has gone to a worker, or has come back from there."""
        if start == "processing" and key in self.placed:
            self.left(key, self.placed.pop(key), finish)
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
                    self.placed[key] = _Placed(resource, worker, amount, _order(task), task.suspicious)
                    task.suspicious -= 1  # a worker that dies before it has begun there is no fault of its own
                    pool.ahead.setdefault(worker, []).append(key)
                    self.begin(pool, worker)

    def remove_worker(self, scheduler: Any, worker: str, **kwargs: Any) -> None:
        """A worker is gone; its tasks are told of beside that."""
        self.withdraw(worker)

    # Accounts

    def begin(self, pool: _Pool, worker: str) -> None:
        """Of the jobs that a worker has, those begin in their order for which there is room."""
        if worker not in self.scheduler.workers:  # it has died, which is about to be said of its jobs
            return
        waiting = pool.ahead.get(worker, [])
        while waiting and pool.room(worker) >= self.placed[waiting[0]].amount:
            job = self.placed[key := waiting.pop(0)]
            job.begun = time.monotonic()
            pool.used[worker] = pool.used.get(worker, 0.0) + job.amount
            self.settle(key, job)
            pool.slow.discard(worker)
            for other in self.sent_ahead(pool):
                other.passed += other.worker != worker and other.order < job.order

    def left(self, key: str, job: _Placed, finish: str) -> None:
        """A job is done, or comes back."""
        pool = self.pools.get(job.resource)
        if not job.begun:
            self.settle(key, job)
            if pool is not None and key in pool.ahead.get(job.worker, ()):
                pool.ahead[job.worker].remove(key)
        elif pool is not None and job.worker in pool.used:
            pool.used[job.worker] -= job.amount
            if finish == "memory":
                lasted = time.monotonic() - job.begun
                pool.lasts = (min(pool.lasts, lasted) + lasted) / 2  # the first waits for its framework
            self.begin(pool, job.worker)
        self.wake()

    def settle(self, key: str, job: _Placed) -> None:
        """From now on it is charged for its worker's death; for one that has died before it is not."""
        if (task := self.scheduler.tasks.get(key)) is not None:
            task.suspicious = job.suspicious

    def sent_ahead(self, pool: _Pool) -> list[_Placed]:
        """The jobs that have been sent and have not begun."""
        return [self.placed[key] for keys in pool.ahead.values() for key in keys]

    # Letting go

    def wake(self, after: float = 0.0) -> None:
        """Look soon, once for all that happens until then."""
        if self.due is not None and self.due.when() > asyncio.get_running_loop().time() + after:
            self.due.cancel()
            self.due = None
        if self.due is None:
            self.due = asyncio.get_running_loop().call_later(after, self.dispatch)

    def dispatch(self) -> None:
        """Let go whoever is first in its pool and has room, and call back who would do better elsewhere."""
        self.due = None
        try:
            for resource, pool in list(self.pools.items()):
                while pool.waiting and self.let_go(resource, pool):
                    pass
                self.call_back(resource, pool)
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
        if not (worker := self.choose(pool, amount, order)):
            return False
        self.sent += 1
        task.priority = (*task.priority[:-1], self.sent)  # the worker keeps to this order, too
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

    def choose(self, pool: _Pool, amount: float, order: tuple[Any, ...]) -> str:
        """A worker for a job: with room, or else where it is sent ahead; empty for none."""
        fit = [worker for worker in pool.total if pool.fits(worker, amount)]
        if fit and any(job.order < order for job in self.sent_ahead(pool)):
            return ""  # which is called back, and takes that place
        # Whole devices where most are free; shares where one has been begun, so that whole ones stay whole.
        if running := list(filter(self.runs, fit)):
            return min(running, key=lambda w: (amount >= 1 or pool.room(w) % 1 < amount, -pool.room(w)))
        if fit:
            self.wake(AGAIN)
            return ""
        if amount != 1 or pool.lasts > BRIEF:
            return ""
        sent = {worker: len(pool.ahead.get(worker, ())) / pool.total[worker] for worker in {*pool.total} - pool.slow}
        return min(
            (worker for worker in sent if sent[worker] < 1 and self.runs(worker)), key=sent.__getitem__, default=""
        )

    def runs(self, worker: str) -> bool:
        """Whether a worker takes tasks now."""
        return bool(getattr(self.scheduler.workers.get(worker), "status", None) == Status.running)

    def call_back(self, resource: str, pool: _Pool) -> None:
        """Have workers give back what should begin elsewhere, or not yet."""
        now = time.monotonic()
        free = sum(int(pool.room(worker)) for worker in pool.total if pool.fits(worker, 1) and self.runs(worker))
        devices, first = sum(pool.total.values()), pool.waiting[0][0][0] if pool.waiting else float("inf")
        for job in sorted(self.sent_ahead(pool), key=lambda job: job.order):
            if not (free > 0 or first < job.order[0] or job.passed > devices):
                continue
            free -= 1
            if job.passed > devices:
                pool.slow.add(job.worker)
            if now > job.called + CALL_AGAIN:
                job.called = now
                message = {"op": GIVE_BACK, "resource": resource, "key": job.order[-1]}
                self.scheduler.worker_send(job.worker, message)
            self.wake(CALL_AGAIN)


def _order(task: Any) -> tuple[Any, ...]:
    """Dask's priority: what the user said, then who came first; of those that came together, by their keys."""
    return (*task.priority[:-1], task.key)
