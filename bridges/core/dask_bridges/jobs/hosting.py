"""A pool's devices on one worker: offered to Dask as a resource; each job gets its own, and a process.

The host of a pool is a member of a gang, so it ends with the pool, its client and its
worker. The jobs are ordinary Dask tasks that need some of the resource.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from distributed import Reschedule, Worker, get_worker, secede
from distributed.utils import sync

from dask_bridges import turns
from dask_bridges.devices import Device, Holder, leases_here
from dask_bridges.dispatcher import GIVE_BACK
from dask_bridges.events import Event, Log
from dask_bridges.jobs import job as in_child
from dask_bridges.jobs.arrivals import Arrivals
from dask_bridges.jobs.events import JobLog, Offered, Ran
from dask_bridges.jobs.job import FOLDER, Work
from dask_bridges.jobs.results import opened
from dask_bridges.jobs.spares import Spares
from dask_bridges.processes import Child, Environment
from dask_bridges.processes.inputs import Inputs
from dask_bridges.processes.interpreter import guard_current_frames
from dask_bridges.processes.memberspool import member_spool
from dask_bridges.processes.spool import Spool
from dask_bridges.task import WorkerMember
from dask_serializers.hooks import activate as models_move

__all__ = ["Hosting", "JobSpec", "extend_here", "host_devices", "resource_of", "run_job", "status_here"]

_PLUGIN = "dask-bridges-jobs"

#: Jobs that a worker takes for each device: one that runs, and the next one, see `dispatcher`.
AHEAD = 2


def resource_of(pool: str) -> str:
    """The Dask resource that the devices of a pool are."""
    return f"devices-{pool}"


@dataclass(frozen=True)
class Hosting:
    """What the host of a pool is told.

    Attributes
    ----------
    pool : str
    devices : tuple of Device
    ignored : frozenset of int
        Processes whose use of a device is nobody's job: those of Dask's workers.
    stop_timeout : float
        Seconds that a cancelled job may take to end.
    environment : Environment
        Of jobs that have no variables of their own.
    """

    pool: str
    devices: tuple[Device, ...]
    ignored: frozenset[int]
    stop_timeout: float
    environment: Environment


@dataclass(frozen=True)
class JobSpec:
    """One job.

    Attributes
    ----------
    pool, key : str
    call : bytes
    gpus : float
    memory : int
        Most bytes of each device; 0 for its share of the device, if that is less than all.
    environment : Environment
    limits : mapping of str to str
        See `Work`.
    """

    pool: str
    key: str
    call: bytes
    gpus: float
    memory: int
    environment: Environment
    limits: Mapping[str, str]


class _JobMember(WorkerMember):
    """A job, as its worker sees it."""

    def __init__(self, host: _Host, key: str) -> None:
        spec = host.member.spec
        deadlines = dataclasses.replace(spec.deadlines, child_stop_timeout=host.hosting.stop_timeout)
        super().__init__(dataclasses.replace(spec, label="job", name=key, deadlines=deadlines), host.member.worker)
        self.key = key
        self.cancelled = self.called_back = False
        self.waits = True  # for its devices
        self.processes = host.member.processes

    def emit(self, kind: type[Event], /, **fields: Any) -> None:
        if kind is Log:
            super().emit(JobLog, key=self.key, **fields)
        else:
            super().emit(kind, **fields)

    def may_wait(self) -> None:
        """Raise where it is not to wait for its devices any more."""
        self.check()
        if self.called_back:
            raise Reschedule()

    def give_back(self) -> None:
        """Have the scheduler send it elsewhere, if it has not begun."""
        self.called_back = True
        leases_here().wake()

    def cancel(self, reason: str) -> None:
        """End it; nobody waits for its result."""
        self.cancelled = True
        self.stop(reason)
        leases_here().wake()


@dataclass
class _Device:
    """What has happened on one device."""

    since: float = 0.0
    busy: float = 0.0
    jobs: int = 0


class _Host:
    """The devices of a pool on one worker."""

    def __init__(self, member: WorkerMember, hosting: Hosting, spool: Spool, folder: int) -> None:
        self.member = member
        self.hosting = hosting
        self.opened = time.time()
        self.arrivals = Arrivals()
        self._spool, self._folder = spool, folder
        self._lock = threading.Condition()
        self._closing = ""
        self._jobs: dict[str, _JobMember] = {}
        self._devices = {device.name: _Device() for device in hosting.devices}
        self._spares = Spares(member.worker, len(hosting.devices), hosting.environment)

    def run(self, spec: JobSpec, inputs: tuple[Any, ...]) -> Any:
        """Run a job on a device of its own, in a process of its own; the task of a job."""
        member = _JobMember(self, spec.key)
        with self._listed(member):
            try:
                holder = Holder(f"job {spec.key}", self.member.worker.address)
                self.arrivals.wait_for_those_before(spec.key)
                with (
                    leases_here().lease(self.hosting.devices, spec.gpus, holder, partial(self._asks, member)) as lease,
                    self._counted(lease.devices),
                    _told(member, lease.devices),
                    self._work(spec, inputs, lease) as work,
                    Child(
                        member,
                        spec.environment,
                        {FOLDER: self._folder, **lease.descriptors},
                        variables=lease.variables,
                        forked=self._spares.take(spec.environment),
                    ) as child,
                ):
                    member.waits = False
                    child.on_end(lease.close)  # the next job does not wait for what is still to do for this one
                    child.begin(in_child.run_here, work)
                    self._spares.fill(spec.environment)
                    result: bytes = child.finish()
                return opened(result)
            except BaseException:
                # Of a cancelled task Dask does not look at the end, unless somebody wants it again.
                if member.cancelled or member.leaving:
                    raise Reschedule() from None
                raise
            finally:
                self.arrivals.over(spec.key)

    def _asks(self, member: _JobMember) -> None:
        """Called when a job is in the queue for devices, and while it is."""
        self.arrivals.over(member.key)
        member.may_wait()

    @contextlib.contextmanager
    def _listed(self, member: _JobMember) -> Iterator[None]:
        with self._lock:
            if self._closing:
                raise Reschedule()
            self._jobs[member.key] = member
        task = member.worker.state.tasks.get(member.key)
        if task is None or task.state == "cancelled":
            member.cancel("it was cancelled")
        try:
            yield
        finally:
            with self._lock:
                del self._jobs[member.key]
                self._lock.notify_all()

    @contextlib.contextmanager
    def _counted(self, devices: tuple[Device, ...]) -> Iterator[None]:
        start = time.time()
        with self._lock:
            for device in devices:
                self._devices[device.name].since = start
        try:
            yield
        finally:
            with self._lock:
                for device in devices:
                    its = self._devices[device.name]
                    its.busy += time.time() - max(start, its.since)
                    its.jobs += 1

    @contextlib.contextmanager
    def _work(self, spec: JobSpec, values: tuple[Any, ...], lease: Any) -> Iterator[Work]:
        """What the process is told; large inputs are in the spool as long as it works."""
        inputs = Inputs.of(values, self._spool, spec.key) if values else Inputs()
        whole = min(device.memory for device in lease.devices)
        memory = spec.memory or (int(whole * lease.share) if lease.share < 1 else 0)
        names = tuple(device.name for device in lease.devices)
        try:
            yield Work(spec.key, spec.call, inputs, names, lease.share, memory, spec.limits)
        finally:
            if inputs.feed:
                self._spool.drop(inputs.feed)

    async def extend(self, more: tuple[Device, ...], ignored: frozenset[int]) -> None:
        """Offer more devices, which workers have brought that came later."""
        known = {device.key for device in self.hosting.devices}
        more = tuple(device for device in more if device.key not in known)
        with self._lock:
            if self._closing or not more:
                return
            self._devices |= {device.name: _Device() for device in more}
            self.hosting = dataclasses.replace(self.hosting, devices=(*self.hosting.devices, *more))
        leases_here().ignored |= ignored
        self._spares.count += len(more)
        worker, resource, amount = self.member.worker, resource_of(self.hosting.pool), len(self.hosting.devices)
        await worker.set_resources(**{resource: AHEAD * amount})
        token = {"gang": self.member.gang, "attempt": self.member.attempt, "rank": self.member.rank}
        await turns.ask(worker, "offer", **token, worker=worker.address, resource=resource, amount=amount)

    def give_back(self, key: str) -> None:
        """A job is wanted elsewhere; one that has not begun goes, that one if it can be."""
        with self._lock:
            meant = self._jobs.get(key)
            waiting = [member for member in self._jobs.values() if member.waits]
        if meant is None:  # it is on its way, here or back
            return
        for member in [meant] if meant.waits else waiting[-1:]:
            member.give_back()

    def cancel(self, key: str) -> None:
        """End a job, if it runs here."""
        with self._lock:
            member = self._jobs.get(key)
        if member is not None:
            member.cancel("it was cancelled")

    def close(self) -> None:
        """End all jobs and processes; they are gone when this returns."""
        with self._lock:
            self._closing = self.member.stopping or "the pool was closed"
            jobs = list(self._jobs.values())
        self.arrivals.close()
        for job in jobs:
            job.cancel(self._closing)
        with self._lock:
            self._lock.wait_for(lambda: not self._jobs)
        self._spares.close()

    def status(self) -> list[dict[str, Any]]:
        """A row for each device."""
        rows = leases_here().status(self.hosting.devices)
        lasted = max(time.time() - self.opened, 1e-9)
        with self._lock:
            for row in rows:
                its = self._devices[row["device"]]
                mine = row["state"] == "held" and row["since"] >= self.opened
                busy = its.busy + (time.time() - row["since"] if mine else 0.0)
                row |= {"worker": self.member.worker.address, "jobs": its.jobs, "utilisation": min(busy / lasted, 1.0)}
        return rows


@contextlib.contextmanager
def _told(member: _JobMember, devices: tuple[Device, ...]) -> Iterator[None]:
    """Tell how long a job has had its devices, where somebody wants to know."""
    start, error = time.perf_counter(), ""
    try:
        yield
    except BaseException as failure:
        error = f"{type(failure).__name__}: {failure}"[:500]
        raise
    finally:
        if member.spec.detail:
            seconds, names = time.perf_counter() - start, [device.name for device in devices]
            member.emit(Ran, key=member.key, devices=names, seconds=seconds, error=error)


_hosts: dict[tuple[str, str], _Host] = {}


class _Following:
    """Hears which tasks start, and which are cancelled while they run; a worker plugin."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def transition(self, key: Any, start: str, finish: str) -> None:
        """Dask's word that a task changes; on its event loop."""
        if finish != "executing" and start not in ("executing", "long-running"):
            return
        for (address, pool), host in list(_hosts.items()):
            if address != self._worker.address:
                continue
            if finish == "executing":
                if resource_of(pool) in self._worker.state.tasks[key].resource_restrictions:
                    host.arrivals.expect(key)
            elif finish != "long-running":
                host.arrivals.over(key)
                if finish == "released":
                    host.cancel(key)


def _give_back(worker: Worker, resource: str, key: str) -> None:
    """Stream handler on a worker: a job that it has not begun is wanted elsewhere."""
    for (address, pool), host in list(_hosts.items()):
        if address == worker.address and resource == resource_of(pool):
            host.give_back(key)


def host_devices(member: WorkerMember, hosting: Hosting) -> None:
    """The function of a pool's member: offer its devices until the pool is closed."""
    worker, resource = member.worker, resource_of(hosting.pool)
    stopped = threading.Event()
    member.on_stop(stopped.set)
    leases_here().ignored |= hosting.ignored
    guard_current_frames()  # each job has some threads
    worker.plugins.setdefault(_PLUGIN, _Following(worker))
    worker.stream_handlers.setdefault(GIVE_BACK, partial(_give_back, worker))
    with member_spool(member) as (spool, folder):
        host = _hosts[worker.address, hosting.pool] = _Host(member, hosting, spool, folder)
        try:
            _offer(member, resource, len(hosting.devices))
            member.emit(Offered, worker=worker.address, devices=[device.name for device in hosting.devices])
            while not stopped.wait(1.0) and member.stopping is None:
                pass
        finally:
            with contextlib.suppress(OSError, RuntimeError):  # the worker, or the scheduler, is gone
                _offer(member, resource, 0)
            host.close()
            del _hosts[worker.address, hosting.pool]


def _offer(member: WorkerMember, resource: str, amount: int) -> None:
    worker = member.worker
    sync(worker.loop, worker.set_resources, **{resource: AHEAD * amount})
    member.ask("offer", worker=worker.address, resource=resource, amount=amount)


def run_job(spec: JobSpec, *inputs: Any) -> Any:
    """The Dask task of a job.

    Raises
    ------
    MemberLost
        If its process ended without a result: it crashed, was killed or frozen, or called `os._exit`.
    MemberFailed
        If the function raised `SystemExit`.
    Exception
        Whatever else the function raised, with its traceback.
    """
    worker = get_worker()
    models_move()
    secede()  # a worker has as many jobs as devices, whatever number of threads it has
    host = _hosts.get((worker.address, spec.pool))
    if host is None:  # the pool was closed, or its host has just been lost
        raise Reschedule()
    return host.run(spec, inputs)


async def extend_here(pool: str, more: tuple[Device, ...], ignored: frozenset[int], dask_worker: Worker) -> None:
    """Offer more devices for a pool, if it is hosted on this worker."""
    host = _hosts.get((dask_worker.address, pool))
    if host is not None:
        await host.extend(more, ignored)


def status_here(pool: str, dask_worker: Worker) -> list[dict[str, Any]]:
    """A row for each device of a pool on this worker."""
    host = _hosts.get((dask_worker.address, pool))
    return [] if host is None else host.status()
