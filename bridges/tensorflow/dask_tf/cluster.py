"""A TensorFlow cluster inside the workers of a Dask cluster, as its client sees it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dask._task_spec import TaskRef
from distributed import Client, Future
from distributed.protocol.pickle import dumps
from distributed.utils import Log as LogText
from distributed.utils import Logs

from dask_bridges import clients, partitions, turns
from dask_bridges.about import card
from dask_bridges.errors import DataError, GangTimeout, MemberLost
from dask_bridges.events import Event, EventStream, Listener, Log, Lost
from dask_bridges.gang import Gang
from dask_bridges.reporting import Recorder, asked, written
from dask_bridges.shipping import sealed_task
from dask_tf import here, hosting
from dask_tf.events import RoleDown, RoleEmpty, RoleUp
from dask_tf.feeding import Feed, Feeding, receivers
from dask_tf.roles import ClusterSpec, Task
from dask_tf.starting import LABEL, Start, plan

__all__ = ["TensorFlowCluster", "start_tensorflow"]

logger = logging.getLogger(__name__)

#: Seconds until it is known whether the loss of a task has ended the cluster.
CAUSE = 2.0


def start_tensorflow(
    client: Client | None = None,
    *,
    ps: int | None = None,
    worker: int | None = None,
    chief: int | None = None,
    evaluator: int | None = None,
    scorer: int | None = None,
    workers: str | Sequence[str] | None = None,
    resources: Mapping[str, float] | None = None,
    gpus: int | Mapping[str, int] | None = None,
    host: str | Mapping[str, str] | None = None,
    ports: int | str | tuple[int, int] | Mapping[str, Any] = 0,
    threads: int | Mapping[str, int] | None = None,
    share: bool = False,
    servers: bool | Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: float | str | None = None,
    allow_plaintext: bool | None = None,
    report: str | Path | None = None,
    **roles: int,
) -> Any:
    """Start a TensorFlow cluster inside the workers of a Dask cluster.

    Each task of it is a process of its own that belongs to a Dask worker: it has
    TensorFlow imported, knows the addresses of the others, and ends with its
    worker, with the cluster, and with the client.

    Parameters
    ----------
    client : Client, optional
        The current one by default.
    ps, worker, chief, evaluator, scorer : int, optional
        Number of tasks of each role; other roles by their own names. With none named,
        one "worker" on every Dask worker.
    workers : str or list of str, optional
        Addresses or names of the Dask workers to use.
    resources : mapping, optional
        Dask resources that a worker must have to be used.
    gpus : int or mapping, optional
        How many GPUs each task of a role has for itself, ``{"worker": 1}``, or of all that were asked for. They
        are of its host, and leased as a `dask_bridges.jobs.DevicePool` leases them, until the cluster ends. Other
        tasks then see none. By default each task sees what its Dask worker sees.
    host : str or mapping, optional
        What to advertise in place of the Dask workers' own host, for all or by role.
    ports : int, str, tuple or mapping, optional
        A port, or a range such as "9000:9010", for all or by role; any free one by default.
    threads : int or mapping, optional
        Of TensorFlow's pools, for all or by role; as many as the Dask worker has by default.
    share : bool
        Whether tasks may share a Dask worker where there are fewer of these.
    servers : bool or list of str, optional
        The roles that run a `tf.distribute.Server`; "ps" and "worker" where there is a
        "ps", and else none, since `MultiWorkerMirroredStrategy` starts its own.
    environment : mapping, optional
        Environment variables for the tasks, such as ``{"TF_CPP_MIN_LOG_LEVEL": "0"}``.
    timeout : float or str, optional
        Longest wait for Dask workers, and for GPUs (``dask-bridges.timeout``).
    allow_plaintext : bool, optional
        Whether a ``tls://`` cluster may do this: TensorFlow's traffic is not encrypted.
    report : str or Path, optional
        Where to write a page of who did what when, as the cluster ends, see `dask_bridges.report`.

    Returns
    -------
    TensorFlowCluster
        An awaitable of one with an asynchronous client. It unpacks to a cluster
        specification and the Dask addresses by role.

    Raises
    ------
    PlacementError
        If there are too few Dask workers, free ports or GPUs, if others hold the GPUs for too long, or if a
        Dask worker lacks TensorFlow.
    MemberLost
        If a task's process dies while it starts; its last lines are in the message.
    GangTimeout
        If some task is not there in time (``dask-bridges.start-timeout``).
    NotImplementedError
        Where Dask workers do not run on Linux.

    Examples
    --------
    >>> from distributed import Client
    >>> from dask_tf import start_tensorflow
    >>> def name_of(cluster):
    ...     return f"{cluster.role} {cluster.index}"
    >>> with Client(n_workers=3, threads_per_worker=1) as client:
    ...     with start_tensorflow(client, ps=1, worker=2) as cluster:
    ...         client.gather(cluster.run("worker", name_of, cluster))
    ['worker 0', 'worker 1']
    """
    counts = {"ps": ps, "worker": worker, "chief": chief, "evaluator": evaluator, "scorer": scorer, **roles}
    client = clients.current(client)
    start = Start(
        counts, workers, resources, gpus, host, ports, threads, share, servers, environment, timeout, allow_plaintext
    )
    start.check()
    return clients.call(client, _start, client, start, asked(report))


async def _start(client: Client, start: Start, recorder: Recorder | None) -> TensorFlowCluster:
    try:
        tasks, gang_plan = await plan(client, start)
    except BaseException as error:
        await written(recorder, error)
        raise
    cluster = TensorFlowCluster(client, Gang(client, gang_plan), tasks, recorder)
    cluster._asked = len(tasks) if start.counts.get("chief") else len([t for t in tasks if t.role != "chief"])
    try:
        await cluster._until_up()
    except BaseException as error:
        cluster._failure = error
        await asyncio.shield(cluster._close())
        raise
    return cluster


class TensorFlowCluster:
    """A TensorFlow cluster that runs; made by `start_tensorflow`.

    A context manager, also an asynchronous one, that closes it at its end.

    Attributes
    ----------
    client : Client
    tasks : tuple of Task
        All tasks, the chief first.
    events : EventStream
        What all tasks have told, from the start: logs, metrics, which went down and came up.
    """

    def __init__(self, client: Client, gang: Gang, tasks: tuple[Task, ...], recorder: Recorder | None = None) -> None:
        self.client = client
        self.tasks = tasks
        self.events: EventStream = gang.events
        self._gang = gang
        self._asked = len(tasks)  # the coordinator that nobody asked for comes last
        self._up: dict[int, RoleUp] = {}
        self._last: dict[int, RoleUp] = {}  # of those that are down, too
        self._downs = dict.fromkeys(range(len(tasks)), 0)
        self._changed = asyncio.Event()
        self._feedings: dict[str, Feeding] = {}
        self._used: set[int] = set()  # tasks whose process has been a coordinator
        self._refeeding: set[asyncio.Task[None]] = set()
        self._recorder = recorder
        self._failure: BaseException | None = None  # with which the caller leaves it
        self.events.listen(self._notice)
        if recorder is not None:
            self.events.listen(recorder)
        self._running = asyncio.ensure_future(gang.run())
        self._running.add_done_callback(self._ended)

    # Its life

    def _notice(self, event: Event) -> None:
        if isinstance(event, RoleUp):
            self._up[event.rank] = self._last[event.rank] = event
        elif isinstance(event, RoleDown) or (isinstance(event, Lost) and event.replaceable):
            self._up.pop(event.rank, None)
            self._downs[event.rank] += 1
            if isinstance(event, RoleDown) and not event.wanted:
                logger.warning("[gang %s] %s, and starts again", self.id, event.reason)
        elif isinstance(event, RoleEmpty):
            work = asyncio.ensure_future(self._refeed(event.rank))
            self._refeeding.add(work)
            work.add_done_callback(self._refeeding.discard)
        self._tell_change()

    async def _refeed(self, rank: int) -> None:
        """Give a task that was lost with its Dask worker what it had, and let it start."""
        try:
            for feeding in list(self._feedings.values()):
                await feeding.again(rank)
            await self._call(rank, hosting.complete_task)
        except Exception:
            logger.exception("[gang %s] %s cannot be fed again", self.id, self.tasks[rank].name)
            await self._close()

    def _ended(self, running: asyncio.Future[Any]) -> None:
        self._up.clear()
        self._tell_change()
        if running.cancelled() or self.client.status != "running":
            return
        if (error := running.exception()) is not None:
            logger.error("[gang %s] the TensorFlow cluster has ended: %s", self.id, error)

    async def _until_up(self) -> None:
        """Wait until all tasks are up, or one has failed."""
        devices = [spec.devices for spec in self._gang.plan.payloads]
        limit = self._gang.deadlines.start_timeout + max(wanted.timeout if wanted else 0.0 for wanted in devices)
        try:
            async with asyncio.timeout(limit):
                while len(self._up) < len(self.tasks):
                    self._check()
                    await self._change()
        except TimeoutError:
            late = [task.name for rank, task in enumerate(self.tasks) if rank not in self._up]
            raise GangTimeout(
                f"{LABEL}: {', '.join(late)} was not up after {limit:g} s; raise dask-bridges.start-timeout"
            ) from None

    def _tell_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self) -> None:
        """Wait until something changes."""
        await self._changed.wait()

    def _check(self) -> None:
        """Raise why it has ended, if it has."""
        if not self._running.done():
            return
        if self._running.cancelled():
            raise MemberLost(f"{LABEL}: it was closed")
        error = self._running.exception()
        raise error if error is not None else MemberLost(f"{LABEL}: its tasks have ended")

    @property
    def _alive(self) -> bool:
        return not self._running.done() and bool(self.client.status == "running")

    async def _cause(self, lost: MemberLost) -> BaseException:
        """Why a call was lost: what has ended the cluster, if something has."""
        await asyncio.wait({self._running}, timeout=CAUSE)
        if self._running.done() and not self._running.cancelled():
            return self._running.exception() or lost
        return lost

    def _log(self, text: str) -> None:
        """Tell people what happens; the gang writes it to the client's log."""
        self.events.publish(Log(gang=self.id, text=text, level=logging.WARNING))

    def close(self) -> Any:
        """End all its processes; they are gone when this returns."""
        return clients.call(self.client, self._close)

    async def _close(self) -> None:
        with contextlib.suppress(OSError):  # without a scheduler they have ended
            await turns.ask(self.client, "settle", gang=self.id, reason="it was closed")
            await asyncio.wait({self._running}, timeout=self._gang.deadlines.child_stop_timeout)
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        recorder, self._recorder = self._recorder, None
        ended = None if self._running.cancelled() else self._running.exception()
        await written(recorder, self._failure or ended)

    def __enter__(self) -> TensorFlowCluster:
        return self

    def __exit__(self, kind: Any, failure: BaseException | None, traceback: Any) -> None:
        self._failure = failure
        self.close()

    async def __aenter__(self) -> TensorFlowCluster:
        return self

    async def __aexit__(self, kind: Any, failure: BaseException | None, traceback: Any) -> None:
        self._failure = failure
        await self._close()

    def __reduce__(self) -> tuple[Any, ...]:
        return here.find, (self.id,)

    # What it is

    @property
    def id(self) -> str:
        """Of the gang whose members its tasks are."""
        return self._gang.id

    @property
    def tf_spec(self) -> ClusterSpec:
        """Addresses of the tasks that were asked for, by role."""
        return ClusterSpec(self._by_role("address"))

    @property
    def dask_spec(self) -> dict[str, list[str]]:
        """Addresses of their Dask workers, by role."""
        return self._by_role("worker")

    def _by_role(self, what: str) -> dict[str, list[str]]:
        by_role: dict[str, list[str]] = {}
        for rank, task in enumerate(self.tasks[: self._asked]):
            by_role.setdefault(task.role, []).append(getattr(self._last.get(rank), what, ""))
        return by_role

    def __iter__(self) -> Iterator[Any]:
        """``tf_spec, dask_spec = start_tensorflow(client)``."""
        return iter((self.tf_spec, self.dask_spec))

    def status(self) -> list[dict[str, Any]]:
        """What is known of each task.

        Returns
        -------
        list of dict
            With "task", "state" ("up", "starting" or "ended"), "address", "worker", "pid" and
            "restarts", by rank.
        """
        ended = self._running.done()
        table = []
        for rank, task in enumerate(self.tasks):
            up = self._up.get(rank)
            table.append(
                {
                    "task": task.name,
                    "state": "up" if up else "ended" if ended else "starting",
                    "address": up.address if up else "",
                    "worker": up.worker if up else "",
                    "pid": up.pid if up else 0,
                    "restarts": self._downs[rank],
                }
            )
        return table

    def logs(self) -> Logs:
        """What each task has written to its standard output and error, and logged.

        Returns
        -------
        dict of str to str
            Lines by the task's name.
        """
        lines: dict[str, list[str]] = {task.name: [] for task in self.tasks}
        for event in list(self.events.events):
            if isinstance(event, Log) and 0 <= event.rank < len(self.tasks):
                lines[self.tasks[event.rank].name].append(event.text)
        return Logs({name: LogText("\n".join(text)) for name, text in lines.items()})

    def listen(self, listener: Listener) -> None:
        """Call `listener` with every event, those of the past first."""
        self.events.listen(listener)

    def __repr__(self) -> str:
        states = ", ".join(f"{row['task']} {row['state']}" for row in self.status())
        return f"<TensorFlowCluster {self.id}: {states}>"

    def _repr_html_(self) -> str:
        rows = self.status()
        return card(f"TensorFlow cluster {self.id}", list(rows[0]), [list(row.values()) for row in rows])

    # What it does

    def run(self, role: str | Task, function: Any, *args: Any, **kwargs: Any) -> list[Future]:
        """Call a function in the processes of a role's tasks, on a thread of its own in each.

        Parameters
        ----------
        role : str
            All its tasks, or one: "worker:1".
        function : callable
        args, kwargs
            Arguments; this cluster among them becomes the task's own view of it
            (`dask_tf.here.RoleProcess`).

        Returns
        -------
        list of Future
            One a task, in their order. Where a task is lost its future raises `MemberLost`.

        Notes
        -----
        Called in a Dask task, it has that task secede: the calls may need its slot.
        """
        call = dumps((function, args, kwargs))
        clients.lend_slot()
        return [self._call(rank, hosting.call_in_task, call) for rank in self._ranks(role)]

    def feed(
        self,
        X: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        name: str = "train",
        to: str | Sequence[str] | None = None,
        keep: bool = False,
    ) -> Any:
        """Give Dask collections to the tasks of a role, each the partitions on its own machine.

        They are written where the tasks' processes read them at memory speed; `dataset`
        makes a `tf.data.Dataset` of them there. Nothing passes through the client.

        Parameters
        ----------
        X : dask array of any rank, or dask dataframe
        y, sample_weight : dask array or series, optional
            Of as many rows.
        name : str
            What to find it under; "train" by default.
        to : str or list of str, optional
            Roles, or tasks such as "worker:1", that get the rows. By default the workers, and the chief
            where there are no parameter servers.
        keep : bool
            Whether Dask keeps its copy in memory as well; by default each partition is let go as soon as it
            is written.

        Returns
        -------
        Feed
            With the schema, which holds the vocabularies of text columns, and the rows of each task.

        Raises
        ------
        DataError
            If lengths differ, a column is of no use to TensorFlow, or the name is taken; it says which.
        """
        given = {"X": X, "y": y, "sample_weight": sample_weight}
        collections = {role: collection for role, collection in given.items() if collection is not None}
        ranks = receivers(self, to)
        if name in self._feedings:
            raise DataError(
                f"something was fed under the name {name!r} already: pass another name=, or unfeed it first"
            )
        prepared = partitions.prepare(self.client, collections)
        return clients.call(self.client, self._feed, Feeding(self, name, prepared, keep), ranks)

    async def _feed(self, feeding: Feeding, ranks: Sequence[int]) -> Feed:
        name = feeding.name
        self._feedings[name] = feeding
        try:
            return await feeding.run(ranks)
        except BaseException:
            await asyncio.shield(self._unfeed(name))
            raise

    @property
    def feeds(self) -> dict[str, Feed]:
        """What was fed, by name."""
        return {name: feeding.feed for name, feeding in self._feedings.items() if feeding.feed is not None}

    def unfeed(self, name: str) -> Any:
        """Remove what was fed under a name, and free its memory.

        Raises
        ------
        DataError
            If nothing was.
        """
        if name not in self._feedings:
            raise DataError(f"nothing was fed under the name {name!r} (there is {list(self._feedings)})")
        return clients.call(self.client, self._unfeed, name)

    async def _unfeed(self, name: str) -> None:
        del self._feedings[name]
        calls = [self._call(rank, hosting.drop_in_task, name) for rank in range(len(self.tasks))]
        await asyncio.gather(*(call.exception() for call in calls), return_exceptions=True)

    def restart(self, role: str, index: int) -> Any:
        """End the process of a task and bring another up at its address; returns once it is there."""
        (rank,) = self._ranks(f"{role}:{index}")
        return clients.call(self.client, self._restart, rank)

    async def _restart(self, rank: int) -> None:
        start = self._up[rank].start if rank in self._up else 0
        await self._call(rank, hosting.restart_task)
        while rank not in self._up or self._up[rank].start <= start:
            self._check()
            await self._change()

    def _place(self, rank: int) -> str:
        """The Dask worker of a task."""
        self._check()
        spec = self._gang.members.spec_of(rank)
        if spec is None:
            raise MemberLost(f"{LABEL}: {self.tasks[rank].name} does not run")
        return spec.workers[rank]

    def _ranks(self, role: str | Task) -> list[int]:
        wanted = role.name if isinstance(role, Task) else role
        ranks = [rank for rank, task in enumerate(self.tasks) if wanted in (task.role, task.name)]
        if not ranks:
            raise ValueError(f"no task {wanted!r}; there are {', '.join(task.name for task in self.tasks)}")
        return ranks

    def _call(self, rank: int, function: Any, *args: Any, inputs: tuple[TaskRef, ...] = ()) -> Future:
        """A Dask task on the worker of one of ours; elsewhere, where that is lost, it says so."""
        key = f"{self.tasks[rank].name}-{function.__name__}-{uuid.uuid4().hex}"
        graph = {key: sealed_task(key, function, self.id, rank, self.tasks[rank].name, *args, inputs=inputs)}
        return self.client.get(
            graph, key, sync=False, workers=[self._place(rank)], allow_other_workers=True, priority=100, retries=0
        )
