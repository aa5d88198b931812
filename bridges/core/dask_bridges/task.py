"""A member as a Dask task, in its worker's process.

`run_member` is the body of the task. Its first act is to present the member's
token to the arbiter; a refused one ends it before it has touched anything. Then
all members wait for each other, and only then does the adapter's function run.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator
from typing import Any

import psutil
from distributed import Worker, get_worker, secede
from distributed.core import Status
from distributed.utils import sync

from dask_bridges import arbiter, safekeeping, turns
from dask_bridges.errors import MemberFailed, MemberStopped, StaleMember
from dask_bridges.events import Failed, Finished, Memory, Spent, Started, topic_of
from dask_bridges.member import Member, MemberSpec
from dask_bridges.watchdog import time_used
from dask_serializers.hooks import activate as models_move

__all__ = ["WorkerMember", "run_member", "worker_of"]

#: Seconds between two looks at a member's memory, and the share of its time so far: a long run is told of less often.
WEIGH, WEIGH_SHARE = 0.5, 1 / 200
#: Share of the time that a process uses the processor for which counts as none.
IDLE = 0.02

#: Below Dask's own, whose lines `Client.get_worker_logs` shows.
logger = logging.getLogger("distributed.worker.dask_bridges")


class WorkerMember(Member):
    """A member on a thread of its Dask worker.

    Attributes
    ----------
    worker : distributed.Worker
        The Dask worker that hosts the member.
    outcome : str
        How it ends, see `Arbiter.tell`; empty if it had no place.
    processes : set of int
        Those that work for it.
    by_processor : bool
        Whether nothing else tells when these compute than that they use the processor.
    """

    def __init__(self, spec: MemberSpec, worker: Worker) -> None:
        super().__init__(spec)
        self.worker = worker
        self.outcome = ""
        self.processes: set[int] = set()
        self.by_processor = False
        self._failed = False

    def send(self, message: dict[str, Any]) -> None:
        """Send an event, as plain data; a line for people goes to the worker's log as well."""
        if message["event"] == "Log":
            for line in message["text"].splitlines():
                logger.log(message["level"], "[gang %s %s] %s", self.gang, self.name, line)
        self.worker.log_event(topic_of(self.gang), message)

    def ask(self, method: str, **request: Any) -> dict[str, Any]:
        """Ask the arbiter on the scheduler, with this member's token."""
        token = {"gang": self.gang, "attempt": self.attempt, "rank": self.rank}
        answer: dict[str, Any] = sync(self.worker.loop, turns.ask, self.worker, method=method, **token, **request)
        return answer

    def keep(self, step: int, state: Any) -> None:
        """Keep a state in this worker's memory, in place of the one before, see `safekeeping.collect`."""
        safekeeping.keep(self.worker, self.gang, self.rank, step, state)

    @property
    def stopping(self) -> str | None:
        """Why the member is to end now; None while it may go on."""
        if self._stop_reason is None and self.leaving:
            self.stop(f"its worker is {self.worker.status.name}")
        return self._stop_reason

    @property
    def leaving(self) -> bool:
        """Whether its worker is on its way out of the cluster."""
        return self.worker.status not in (Status.running, Status.paused)

    # Ending

    def fail(self, error: BaseException) -> None:
        """Tell of a failure at once."""
        if self._failed:
            return
        self._failed = True
        self.outcome = self._classify(error)
        self.emit(Failed, error=f"{type(error).__name__}: {error}"[:2000], cause=self.outcome == "failed")
        self.tell(self.outcome)

    def _classify(self, error: BaseException) -> str:
        echo = isinstance(error, MemberStopped) or self.spec.collateral(error)
        if self.stopping is not None or echo:
            return "lost" if self.leaving else "collateral" if echo else "late"
        return "failed"

    def tell(self, outcome: str, left: bool = False) -> None:
        """Tell the arbiter how this member ends, and when it has left, ahead of the task's own result."""
        message = {"op": arbiter.OPERATION, "gang": self.gang, "attempt": self.attempt,
                   "rank": self.rank, "outcome": outcome, "left": left}  # fmt: skip
        self.worker.loop.add_callback(self.worker.batched_send, message)


def worker_of(member: Member) -> Worker:
    """The Dask worker in whose process a member is; a member in a child process has none."""
    assert isinstance(member, WorkerMember)
    return member.worker


class _Weighing:
    """Tells what a member's worker and processes hold in memory, from the worker's event loop, until it is closed."""

    def __init__(self, member: WorkerMember) -> None:
        self.member = member
        self._began = self._looked = time.monotonic()
        self._used = 0.0
        self._next: object | None = None
        self._closed = False
        member.worker.loop.add_callback(self._weigh)

    def _weigh(self) -> None:
        member = self.member
        if self._closed:
            return
        worker = member.worker
        held = worker.monitor.get_process_memory() + sum(map(_resident, list(member.processes)))
        member.emit(Memory, nbytes=int(held), limit=int(worker.memory_manager.memory_limit or 0))
        self._tell_used()
        pause = max(WEIGH, WEIGH_SHARE * (time.monotonic() - self._began))
        self._next = worker.loop.call_later(pause, self._weigh)

    def _tell_used(self) -> None:
        """Tell the time for which the member's processes have used the processor, where nothing else tells."""
        now, used = time.monotonic(), sum(map(_time_used, list(self.member.processes)))
        window, computed, self._looked, self._used = now - self._looked, used - self._used, now, used
        if self.member.by_processor and computed > IDLE * window:  # less where one has ended
            self.member.emit(Spent, window=window, seconds={"compute": min(computed, window)})

    def close(self) -> None:
        self._closed = True
        self.member.worker.loop.add_callback(self._forget)

    def _forget(self) -> None:
        if self._next is not None:
            self.member.worker.loop.remove_timeout(self._next)


def _resident(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:  # it has just ended
        return 0


def _time_used(pid: int) -> float:
    try:
        return time_used(pid)
    except (OSError, psutil.Error):
        return 0.0


_members: dict[tuple[str, str, int], WorkerMember] = {}


def _stop_members(worker: Worker, gang: str, reason: str) -> None:
    """Stream handler on a worker: end its members of a gang."""
    for (address, name, _), member in list(_members.items()):
        if address == worker.address and name == gang:
            member.stop(reason)


def _finish_members(worker: Worker, gang: str) -> None:
    """Stream handler on a worker: its members of a gang end after what they are at."""
    for (address, name, _), member in list(_members.items()):
        if address == worker.address and name == gang:
            member.finish()


@contextlib.contextmanager
def _registered(member: WorkerMember) -> Iterator[None]:
    """Let the scheduler's word to stop reach the member, while it lives; then tell the scheduler how it ended."""
    key = (member.worker.address, member.gang, member.rank)
    for operation, handler in ((arbiter.STOP, _stop_members), (arbiter.FINISH, _finish_members)):
        member.worker.stream_handlers.setdefault(operation, functools.partial(handler, member.worker))
    _members[key] = member
    weighing = _Weighing(member) if member.spec.detail else None
    try:
        yield
    finally:
        if weighing is not None:
            weighing.close()
        del _members[key]
        safekeeping.leave(member.worker, member.gang, member.rank)
        if member.outcome:
            member.tell(member.outcome, left=True)


def run_member(spec: MemberSpec) -> Any:
    """The Dask task of one member: present the token, wait for the peers, run, leave."""
    worker = get_worker()
    models_move()  # what it returns may be one, or hold one
    secede()
    member = WorkerMember(spec, worker)
    with _registered(member):
        member.outcome = "failed"  # where the answer is lost too: it may hold its place
        answer = member.ask("present", worker=worker.address, incarnation=spec.incarnation)
        if refused := answer.get("refused"):
            member.outcome = ""
            raise StaleMember(f"{spec.label}: {member.name} may not run here: {refused}")
        if answer.get("finishing"):
            member.finish()
        return _run_accepted(member)


def _run_accepted(member: WorkerMember) -> Any:
    try:
        if not member.incarnation:  # the peers of a later one run already
            member.exchange()
        member.emit(Started, worker=member.worker.address, host=member.host)
        result = member.spec.function(member, member.spec.payload)
        member.emit(Finished)
        member.outcome = "finished"
        return result
    except BaseException as error:
        member.fail(error)
        if isinstance(error, Exception):
            raise
        raise _guarded(member, error) from None


def _guarded(member: WorkerMember, error: BaseException) -> MemberFailed:
    """SystemExit must not leave the task: it would end the worker, and then the next, as Dask retries."""
    text = f"{member.label}: {member.name} raised {type(error).__name__}({error})"
    return MemberFailed(text, member.rank, member.worker.address, member.host)
