"""Jobs that own their devices, from the client's side."""

from __future__ import annotations

import asyncio
import logging
import sys
import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dask._task_spec import TaskRef
from dask.utils import funcname
from distributed import Client, Future

from dask_bridges import clients, config, placement
from dask_bridges.about import card
from dask_bridges.devices.finding import find_groups
from dask_bridges.errors import BridgeError, GangTimeout, PlacementError
from dask_bridges.events import EventStream, Listener
from dask_bridges.jobs import hosting
from dask_bridges.jobs.calls import pack
from dask_bridges.jobs.hosting import JobSpec, resource_of, run_job
from dask_bridges.jobs.offering import LABEL, Offering, Shared
from dask_bridges.jobs.setup import Setup
from dask_bridges.jobs.status import PoolStatus
from dask_bridges.jobs.terms import Terms
from dask_bridges.reporting import asked, written
from dask_bridges.shipping import sealed_task

__all__ = ["DevicePool"]

logger = logging.getLogger(__name__)

#: Seconds between two looks at whether workers have come.
LOOK = 2.0
#: How many of its events a pool keeps.
KEPT = 10_000
#: How many jobs are cancelled at once: that takes Dask's scheduler time that grows with the square of it.
CANCELLED = 100


class DevicePool:
    """The devices of a cluster, for jobs that each have theirs to themselves.

    A job is a function call in a new process that sees its own devices only, and has
    the frameworks imported already. Its result is an ordinary Dask future. A context
    manager, also an asynchronous one; `close` ends all jobs.

    Parameters
    ----------
    client : Client, optional
        The current one by default.
    devices : mapping of str to sequence of str, optional
        By a worker's name or address, or by a host, the names of its devices, as in ``CUDA_VISIBLE_DEVICES``;
        any names where there is no GPU, for jobs that share nothing else. By default those that the workers'
        ``CUDA_VISIBLE_DEVICES`` name, else all that NVML knows, else as many as the workers declare as their
        Dask resource "GPU".
    workers : str or list of str, optional
        Addresses or names of the workers to use.
    preload : sequence of str, optional
        Modules that the jobs' processes have imported when they start. They may not touch a device as they are
        imported. By default the frameworks that this process has imported, and the workers have in the same versions.
    timeout : float or str, optional
        Longest wait for workers (``dask-bridges.timeout``).
    report : str or Path, optional
        Where to write a page of which job had which device when, as the pool is closed, see `dask_bridges.report`.

    Attributes
    ----------
    client : Client
    id : str
    events : EventStream
        What the jobs have written and reported, newest 10,000.

    Raises
    ------
    PlacementError
        If there is no device anywhere; it says what there is.

    Notes
    -----
    With an asynchronous client it is awaited: ``async with DevicePool(client) as pool``.
    Workers that join later are used, too. A host's devices are offered by one of its
    workers. A pool holds its workers shared: a training that wants them alone waits
    until it is closed.

    Examples
    --------
    >>> from distributed import Client, as_completed
    >>> from dask_bridges.jobs import DevicePool
    >>> def train(rate):
    ...     return 1 / rate
    >>> with Client(n_workers=1, threads_per_worker=1) as client:  # doctest: +SKIP
    ...     with DevicePool(client, devices={"0": ["0", "1"]}) as pool:
    ...         futures = pool.map(train, [0.1, 0.2, 0.5])
    ...         sorted(client.gather(futures))
    [2.0, 5.0, 10.0]
    """

    def __init__(
        self,
        client: Client | None = None,
        *,
        devices: Mapping[str, Sequence[str]] | None = None,
        workers: str | Iterable[str] | None = None,
        preload: Sequence[str] | None = None,
        timeout: float | str | None = None,
        report: str | Path | None = None,
    ) -> None:
        if sys.platform == "win32":
            raise NotImplementedError("jobs need Dask workers on Linux, and a client that is no Windows")
        self.client = clients.current(client)
        self._recorder = asked(report)
        self._failure: BaseException | None = None  # with which the caller leaves it
        self.id = uuid.uuid4().hex[:12]
        self.events = EventStream(self.id, KEPT)
        self._named = devices
        self._workers = [workers] if isinstance(workers, str) else workers and list(workers)
        self._preload = preload
        limit = None if timeout is None else config.seconds("timeout", timeout)
        self._shared = Shared(self.client, self.id, self.events, limit, Setup.of(preload), self._recorder)
        self._hosts: dict[str, Offering] = {}
        self._futures: weakref.WeakSet[Future] = weakref.WeakSet()
        self._watching: asyncio.Future[None] | None = None
        self._state = "new"
        if not self.client.asynchronous:
            clients.call(self.client, self._open)

    # Its life

    async def _open(self) -> DevicePool:
        if self._state == "open":
            return self
        self._state = "open"
        try:
            await self._look(first=True)
            await self._until_offered()
        except BaseException as error:
            self._failure = error
            await asyncio.shield(self._close())
            raise
        self._watching = asyncio.ensure_future(self._watch())
        return self

    async def _look(self, first: bool = False) -> None:
        """Find the devices of workers that have come."""
        workers = await placement.usable_workers(self.client, self._workers, self._shared.timeout)
        there = {worker.address for worker in workers}
        if first or there - self._shared.seen:
            groups = await find_groups(self.client, workers, self._named, strict=first)
            if not groups and first:
                table = "\n  ".join(f"{worker.address}: resources {worker.resources or 'none'}" for worker in workers)
                raise PlacementError(
                    f"no worker has a device:\n  {table}\n"
                    "Neither NVML (is nvidia-ml-py installed there?), nor CUDA_VISIBLE_DEVICES, nor a Dask resource "
                    'GPU names one. Name them yourself: DevicePool(client, devices={"worker or host": ["0", "1"]})'
                )
            hosting_ones = sorted({address for group in groups for address in group.workers})
            await self._check_modules(hosting_ones)
            for name in [name for name, host in self._hosts.items() if not host.offered]:
                if not there.intersection(self._hosts[name].group.workers):  # they have come back as others
                    await self._hosts.pop(name).close()
            for group in groups:
                if group.name in self._hosts:
                    await self._hosts[group.name].update(group)
                else:
                    self._hosts[group.name] = Offering(self._shared, group)
            self._shared.seen = there

    async def _check_modules(self, workers: Sequence[str]) -> None:
        """See that the workers have what is imported ahead; what nobody has named is left out otherwise."""
        for module in self._shared.setup.modules:
            try:
                await placement.check_packages(self.client, workers, [module], imports=False)
            except PlacementError as error:
                if self._preload is not None:
                    raise
                logger.info("[pool %s] %s is not imported ahead for the jobs: %s", self.id, module, error)
                self._shared.setup = self._shared.setup.without(module)

    async def _until_offered(self) -> None:
        """Wait until the devices of all hosts are offered."""
        limit = config.seconds("start-timeout")
        try:
            async with asyncio.timeout(limit):
                while not all(host.offered for host in self._hosts.values()):
                    for host in self._hosts.values():
                        if host.failed is not None:
                            raise host.failed
                    await self._shared.change()
        except TimeoutError:
            late = ", ".join(host.group.name for host in self._hosts.values() if not host.offered)
            raise GangTimeout(
                f"{LABEL}: the devices of {late} were not there after {limit:g} s; raise dask-bridges.start-timeout"
            ) from None

    async def _watch(self) -> None:
        """Use the workers that come."""
        while True:
            await asyncio.sleep(LOOK)
            try:
                await self._look()
            except (OSError, BridgeError) as error:
                logger.info("[pool %s] %s", self.id, error)

    def close(self) -> Any:
        """Cancel the jobs that are not done, and end; no process, lease or file is left when this returns."""
        return clients.call(self.client, self._close)

    async def _close(self) -> None:
        if self._state == "closed":
            return
        self._state = "closed"
        if self._watching is not None:
            self._watching.cancel()
        unfinished = [future for future in list(self._futures) if not future.done()]
        if unfinished and self.client.status == "running":
            await self._cancel(unfinished)
        await asyncio.gather(*(host.close() for host in self._hosts.values()), return_exceptions=True)
        await written(self._recorder, self._failure)

    def __enter__(self) -> DevicePool:
        return self

    def __exit__(self, kind: Any, failure: BaseException | None, traceback: Any) -> None:
        self._failure = failure
        self.close()

    def __await__(self) -> Any:
        return self._open().__await__()

    async def __aenter__(self) -> DevicePool:
        return await self._open()

    async def __aexit__(self, kind: Any, failure: BaseException | None, traceback: Any) -> None:
        self._failure = failure
        await self._close()

    # Jobs

    def submit(
        self,
        fn: Callable[..., Any],
        *args: Any,
        gpus: float = 1,
        memory: int | str | None = None,
        priority: int = 0,
        retries: int = 0,
        env: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> Future:
        """Call a function on devices of its own.

        Parameters
        ----------
        fn : callable
        *args, **kwargs
            Futures among them, also in lists, tuples, sets and dicts, become their results.
        gpus : float
            How many devices, all of one host; or 1/2, 1/4, 1/8, …: a share of one, by agreement.
        memory : int or str, optional
            Most that the job may use on each device, in bytes or as "8 GiB", where its framework keeps to it
            (TensorFlow, and Keras on it). By default no limit, and for a share of a device that share of its memory.
        priority : int
            Of those that wait, the highest runs first.
        retries : int
            How often it is tried again.
        env : mapping of str to str, optional
            Environment variables, set before a framework is imported.

        Returns
        -------
        Future
            It raises what `fn` raised; `MemberLost` if the process crashed, was killed or left with
            ``os._exit``, with its last lines; `MemberFailed` for ``sys.exit``.

        Raises
        ------
        PlacementError
            If no host has so many devices, or the pool is closed.
        ValueError, TypeError
            If `gpus` or `memory` is no such number, or `fn` cannot be pickled.
        """
        (future,) = self._submit(fn, [(args, kwargs)], Terms(gpus, memory, priority, retries, env))
        return future

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        gpus: float = 1,
        memory: int | str | None = None,
        priority: int = 0,
        retries: int = 0,
        env: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> list[Future]:
        """Call a function once for the items of each of `iterables`, as `submit` does.

        Parameters
        ----------
        fn : callable
        *iterables
            Arguments in their order; as many calls as the shortest has items.
        gpus, memory, priority, retries, env
            See `submit`.
        **kwargs
            The same for all calls.

        Returns
        -------
        list of Future
            In the order of the items.
        """
        calls = [(args, kwargs) for args in zip(*iterables)]
        return self._submit(fn, calls, Terms(gpus, memory, priority, retries, env))

    def _submit(
        self,
        fn: Callable[..., Any],
        calls: Sequence[tuple[Sequence[Any], Mapping[str, Any]]],
        terms: Terms,
    ) -> list[Future]:
        if not callable(fn):
            raise TypeError(f"the first argument is the function to call, not {type(fn).__name__}")
        self._check(terms.gpus)
        setup, limit = self._shared.setup, terms.limit
        environment = setup.environment(self.id, terms.env)
        name, number = funcname(fn), uuid.uuid4().hex
        graph, keys, digits = {}, [], len(str(len(calls)))
        for at, (args, kwargs) in enumerate(calls):
            call, futures = pack(fn, args, kwargs)
            key = f"{name}-{number}-{at:0{digits}}" if len(calls) > 1 else f"{name}-{number}"  # Dask sorts them
            spec = JobSpec(self.id, key, call, terms.gpus, limit, environment, setup.limits)
            graph[key] = sealed_task(key, run_job, spec, inputs=tuple(TaskRef(future.key) for future in futures))
            keys.append(key)
        clients.lend_slot()
        futures = self.client.get(
            graph,
            keys,
            sync=False,
            priority=terms.priority,
            retries=terms.retries,
            resources={resource_of(self.id): terms.gpus},
            fifo_timeout="0s",  # strictly in the order asked
        )
        self._futures.update(futures)
        return list(futures)

    def _check(self, gpus: float) -> None:
        if self._state != "open":
            hint = "was closed" if self._state == "closed" else "is not open yet: await it, or use `async with`"
            raise PlacementError(f"the pool {hint}")
        most = max((len(host.group.devices) for host in self._hosts.values()), default=0)
        if gpus > most:
            there = ", ".join(f"{host.group.name} has {len(host.group.devices)}" for host in self._hosts.values())
            raise PlacementError(f"gpus={gpus!r}: a job's devices are all of one host, and {there}")

    def cancel(self, futures: Future | Iterable[Future]) -> Any:
        """Cancel jobs: those that wait do not run, those that run are ended, with what they have started.

        It returns once this is asked: who begins in these milliseconds is ended, too.
        """
        listed = [futures] if isinstance(futures, Future) else list(futures)
        return clients.call(self.client, self._cancel, listed)

    async def _cancel(self, futures: Sequence[Future]) -> None:
        for start in range(0, len(futures), CANCELLED):
            await self.client.cancel(futures[start : start + CANCELLED], asynchronous=True)

    def status(self) -> Any:
        """What the devices do now.

        Returns
        -------
        PoolStatus
            A row for each device; an awaitable of it with an asynchronous client.
        """
        return clients.call(self.client, self._status)

    async def _status(self) -> PoolStatus:
        places = [host.worker for host in self._hosts.values() if host.worker]
        found = await self.client.run(hosting.status_here, self.id, workers=places, on_error="ignore")
        rows = [row for place in places for row in found.get(place, [])]
        return PoolStatus(rows, sum(not future.done() for future in list(self._futures)))

    def listen(self, listener: Listener) -> None:
        """Call `listener` with every event of the jobs, `JobLog` and `Reported`, those of the past first.

        It is called on the client's event loop and must not block.
        """
        self.events.listen(listener)

    def __repr__(self) -> str:
        devices = sum(len(host.group.devices) for host in self._hosts.values())
        return f"<DevicePool {self.id}: {devices} devices on {len(self._hosts)} hosts, {self._state}>"

    def _repr_html_(self) -> str:
        unfinished = sum(not future.done() for future in list(self._futures))
        rows = [
            (device.name, host.group.name, host.worker or "not offered now")
            for host in self._hosts.values()
            for device in host.group.devices
        ]
        caption = f"DevicePool {self.id}: {self._state}, {unfinished} jobs unfinished"
        return card(caption, ["device", "of", "offered by"], rows)
