"""A task of a TensorFlow cluster, as its Dask worker hosts it.

`host_task` is the member's function: it holds the task's port, its devices and the
folder of its partitions for as long as the task lives, and starts the task's process again
where that is lost and the others go on without it.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from distributed import secede

from dask_bridges.devices.members import leased_together, meet
from dask_bridges.errors import MemberLost, MemberStopped
from dask_bridges.partitions import Part, take
from dask_bridges.ports import held_port
from dask_bridges.processes import Child
from dask_bridges.processes.memberspool import member_spool
from dask_bridges.processes.spool import Spool
from dask_bridges.task import WorkerMember
from dask_tf import encoding, serving
from dask_tf.events import RoleDown, RoleEmpty, RoleUp, Spooled
from dask_tf.here import SPOOL_FD
from dask_tf.roles import RoleSpec, RoleWork, Task
from dask_tf.schema import Schema

__all__ = [
    "Hosted",
    "call_in_task",
    "complete_task",
    "drop_in_task",
    "host_task",
    "learn_in_task",
    "restart_task",
    "spare_task",
    "spool_in_task",
]

#: A task whose process is lost more often than this within that many seconds is not started again.
RESTARTS, WITHIN = 5, 60.0

_hosted: dict[tuple[str, int], Hosted] = {}


class Hosted:
    """One task on this Dask worker.

    Attributes
    ----------
    feeds : dict
        Schema of each feed that its process knows, by name.
    replaceable : bool
        Whether its process is started again where it is lost.
    """

    def __init__(self, member: WorkerMember, spec: RoleSpec, address: str, spool: Spool) -> None:
        self.member = member
        self.spec = spec
        self.address = address
        self.spool = spool
        self.replaceable = spec.replaceable
        self.feeds: dict[str, Any] = {}
        self._changed = threading.Condition()
        self._child: Child | None = None
        self._over = ""
        self._fed = threading.Event()
        self._wanted = False  # somebody has asked for the restart
        self._starts = 0
        self._losses: collections.deque[float] = collections.deque(maxlen=RESTARTS)

    @property
    def task(self) -> Task:
        """The task it hosts."""
        return self.spec.tasks[self.member.rank]

    def run(self, work: Callable[[], RoleWork], descriptors: Mapping[int, int], variables: Mapping[str, str]) -> None:
        """Run the task's process, again where it is lost, until it is to stop."""
        try:
            while True:
                started = time.monotonic()
                self._starts += 1
                try:
                    with Child(self.member, self.spec.environment, descriptors, variables=variables) as child:
                        threading.Thread(target=self._announce, args=(child, started), daemon=True).start()
                        child.run(serving.serve, work())
                except MemberLost as lost:
                    self._down(str(lost), lost)
        finally:
            with self._changed:
                self._child, self._over = None, self.member.stopping or "it was lost"
                self._changed.notify_all()

    def wait_for_feeds(self) -> None:
        """Wait until all that was fed before is here again."""
        self.member.on_stop(self._fed.set)
        self._fed.wait()
        self.member.check()

    def complete(self) -> None:
        """All that was fed before is here again."""
        self._fed.set()

    def spool_feed(self, name: str, schema: Schema, keys: Mapping[int, Any], ticket: str) -> None:
        """Write the partitions of these keys, by their numbers, as a feed, and tell of each as it is written."""
        with self.member.span("receive"), self.spool.writer(name) as writer:
            encoding.write(self._taken(keys, ticket), schema, writer)
        self.learn(name, schema)

    def _taken(self, keys: Mapping[int, Any], ticket: str) -> Iterator[Part]:
        for number, key in keys.items():
            self.member.check()
            yield take(self.member.worker, key)
            self.member.emit(Spooled, ticket=ticket, part=number)

    def learn(self, name: str, schema: Schema) -> None:
        """Let the process know of a feed, now or when it starts."""
        with self._changed:
            self.feeds[name] = schema
            child = self._child
        if child is not None:
            with contextlib.suppress(MemberLost, MemberStopped):  # the next one will know
                child.call(serving.add_feed, name, schema)

    def forget(self, name: str) -> None:
        """Remove a feed; the process knows of it no more."""
        with self._changed:
            self.feeds.pop(name, None)
            child = self._child
        self.spool.drop(name)
        if child is not None:
            with contextlib.suppress(MemberLost, MemberStopped):
                child.call(serving.drop_feed, name)

    def _announce(self, child: Child, started: float) -> None:
        """Say that a process is up, once it is."""
        with contextlib.suppress(MemberLost, MemberStopped):
            child.call(serving.wait_until_up)
            with self._changed:
                self._child, feeds = child, dict(self.feeds)
                self._changed.notify_all()
            self.member.by_processor = True  # its graphs run without Python, which could tell
            for name, schema in feeds.items():  # some have come since it was told
                child.call(serving.add_feed, name, schema)
            member, task = self.member, self.task
            worker, seconds = member.spec.workers[member.rank], time.monotonic() - started
            member.emit(
                RoleUp, role=task.role, index=task.index, address=self.address, worker=worker,
                pid=child.pid, start=self._starts, seconds=seconds,
            )  # fmt: skip

    def _down(self, reason: str, lost: MemberLost) -> None:
        """Its process is gone: raise, or let it start again."""
        with self._changed:
            was_up, self._child = self._child is not None, None
            self.member.by_processor = False
            wanted, self._wanted = self._wanted, False
        if self.member.stopping:
            raise MemberStopped(self.member.stopping) from lost
        now = time.monotonic()
        if not wanted:
            often = len(self._losses) == RESTARTS and now - self._losses[0] < WITHIN
            if not self.replaceable or often or not (was_up or self._starts > 1):
                raise lost
            self._losses.append(now)
        self.member.emit(RoleDown, role=self.task.role, index=self.task.index, reason=reason, wanted=wanted)

    def child(self) -> Child:
        """Its process, waited for while it starts.

        Raises
        ------
        MemberLost
            If it has ended for good, or does not come.
        """
        limit = self.member.spec.deadlines.start_timeout
        with self._changed:
            self._changed.wait_for(lambda: self._child is not None or self._over, limit)
            if self._child is None:
                raise MemberLost(f"{self.member.label}: {self.task.name} is not there: {self._over or 'it is late'}")
            return self._child

    def restart(self) -> None:
        """End its process, and wait for the next."""
        child = self.child()
        with self._changed:
            self._wanted, self._child = True, None
        child.kill("it was restarted")
        self.child()


def host_task(member: WorkerMember, spec: RoleSpec) -> None:
    """The function of a member: host its task until the cluster ends."""
    task, host = spec.tasks[member.rank], spec.host or member.host
    with contextlib.ExitStack() as stack:
        if member.incarnation:  # it was elsewhere on this host, and its peers know its address
            seats = member.recall()
            addresses = [seat["says"] for seat in seats]
            port = int(addresses[member.rank].rpartition(":")[2])
            stack.enter_context(held_port(range(port, port + 1), host, task.name, again=True))
        else:
            port = stack.enter_context(held_port(spec.ports, host, task.name))
            seats = meet(member, spec.devices, f"{host}:{port}")
            addresses = [seat["says"] for seat in seats]
        by_role: dict[str, list[str]] = {}
        for other, address in zip(spec.tasks, addresses):
            by_role.setdefault(other.role, []).append(address)
        spool, descriptor = stack.enter_context(member_spool(member))
        hosted = Hosted(member, spec, addresses[member.rank], spool)
        threads = spec.threads or member.worker.state.nthreads

        def work() -> RoleWork:
            return RoleWork(member.gang, task, by_role, spec.serves, threads, dict(hosted.feeds))

        with (
            _known(hosted),
            contextlib.suppress(MemberStopped),  # which is how a task ends well
            leased_together(member, spec.devices, seats) as lease,
        ):
            if member.incarnation:
                member.emit(RoleEmpty, worker=member.worker.address)
                hosted.wait_for_feeds()
            locks, variables = (lease.descriptors, lease.variables) if lease else ({}, spec.variables)
            hosted.run(work, {SPOOL_FD: descriptor, **locks}, variables)


@contextlib.contextmanager
def _known(hosted: Hosted) -> Iterator[None]:
    key = (hosted.member.gang, hosted.member.rank)
    _hosted[key] = hosted
    try:
        yield
    finally:
        del _hosted[key]


# As Dask tasks on the worker that hosts


def find(cluster: str, rank: int, name: str) -> Hosted:
    """The task of that rank on this Dask worker.

    Raises
    ------
    MemberLost
        If it is not here: Dask runs what was meant for a worker that is gone elsewhere.
    """
    hosted = _hosted.get((cluster, rank))
    if hosted is None:
        raise MemberLost(
            f"TensorFlow cluster: {name} is not there: its cluster was closed, or its Dask worker is lost or paused"
        )
    return hosted


def call_in_task(cluster: str, rank: int, name: str, call: bytes, *inputs: Any) -> Any:
    """Call a function in the process of a task, which alone opens the `call`, and give what it returns."""
    hosted = find(cluster, rank, name)
    secede()
    try:
        child = hosted.child()
        return child.call(serving.apply, call, inputs) if inputs else child.call_pickled(call)
    except MemberStopped as stopped:
        raise MemberLost(f"TensorFlow cluster: {name} was stopped: {stopped}") from None


def spool_in_task(
    cluster: str, rank: int, name: str, feed: str, schema: Schema, keys: Mapping[int, Any], ticket: str
) -> None:
    """Write partitions that this Dask worker holds where the process of a task reads them."""
    hosted = find(cluster, rank, name)
    secede()
    hosted.spool_feed(feed, schema, keys, ticket)


def learn_in_task(cluster: str, rank: int, name: str, feed: str, schema: Schema) -> None:
    """Tell the process of a task of a feed that others hold."""
    find(cluster, rank, name).learn(feed, schema)


def drop_in_task(cluster: str, rank: int, name: str, feed: str) -> None:
    """Remove a feed."""
    hosted = find(cluster, rank, name)
    secede()
    hosted.forget(feed)


def complete_task(cluster: str, rank: int, name: str) -> None:
    """All that was fed to a task before is there again: it may start."""
    find(cluster, rank, name).complete()


def spare_task(cluster: str, rank: int, name: str, spare: bool) -> None:
    """Have the process of a task start again where it is lost, or not."""
    find(cluster, rank, name).replaceable = spare


def restart_task(cluster: str, rank: int, name: str) -> None:
    """End the process of a task and wait until another is up at its address."""
    hosted = find(cluster, rank, name)
    secede()
    hosted.restart()
