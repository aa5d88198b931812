"""One member of a gang, as it lives inside a Dask worker.

`run_member` is the body of the member's Dask task. Its first act is to present
the member's token to the arbiter; a refused one ends it before it has touched
anything. Then all members wait for each other, and only then does the adapter's
function run.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from distributed import Worker, get_worker, secede
from distributed.comm import get_address_host
from distributed.core import Status
from distributed.utils import sync

from dask_bridges import arbiter, turns
from dask_bridges.config import Deadlines
from dask_bridges.errors import GangTimeout, MemberFailed, MemberStopped, StaleMember
from dask_bridges.events import (
    Event,
    Failed,
    Finished,
    Log,
    Metrics,
    Progress,
    Span,
    Started,
    topic_of,
)

__all__ = ["Member", "MemberSpec", "run_member"]

logger = logging.getLogger(__name__)
EventT = TypeVar("EventT", bound=Event)


def never_collateral(error: BaseException) -> bool:
    """The default of `MemberSpec.collateral`: every failure may be the cause."""
    return False


@dataclass(frozen=True)
class MemberSpec:
    """All a member is told.

    Attributes
    ----------
    gang : str
        Id of the gang; with `attempt` and `rank` it is the member's token.
    attempt : int
        Which attempt of the gang, from 1.
    rank : int
        0 to world size - 1.
    workers : tuple of str
        Addresses of the gang's workers, by rank.
    label : str
        What people call the gang, in messages.
    function : callable
        ``function(member, payload)``, module-level; its return value is the member's result.
    payload : object
        This member's part of the work.
    collateral : callable
        Says of an exception whether a peer's failure is its likely reason
        (a broken collective), so that the root cause is found among all.
    deadlines : Deadlines
        How long it waits for what.
    """

    gang: str
    attempt: int
    rank: int
    workers: tuple[str, ...]
    label: str
    function: Callable[[Member, Any], Any]
    payload: Any
    deadlines: Deadlines
    collateral: Callable[[BaseException], bool] = never_collateral


class Member:
    """What the adapter's function gets to work with.

    Attributes
    ----------
    rank, world_size, attempt : int
    gang, label : str
    worker : distributed.Worker
        The Dask worker that hosts the member.
    host : str
        The host by which the other workers reach this one.
    """

    def __init__(self, spec: MemberSpec, worker: Worker) -> None:
        self.spec = spec
        self.gang = spec.gang
        self.label = spec.label
        self.attempt = spec.attempt
        self.rank = spec.rank
        self.world_size = len(spec.workers)
        self.worker = worker
        self.host: str = host_of(worker.address)
        self.outcome = ""  # how it ends, see `Arbiter.tell`; empty if it had no place
        self._failed = False
        self._step = 0
        self._stop_reason: str | None = None
        self._on_stop: list[Callable[[], Any]] = []
        self._lock = threading.Lock()

    # Talking

    def emit(self, kind: type[EventT], /, **fields: Any) -> None:
        """Send an event to whoever listens to the gang."""
        event = kind(gang=self.gang, attempt=self.attempt, rank=self.rank, **fields)
        self.worker.log_event(topic_of(self.gang), event.to_message())

    def progress(self, done: int, total: int = 0, unit: str = "round") -> None:
        """Say that `done` of `total` are over."""
        self.emit(Progress, done=int(done), total=int(total), unit=str(unit))

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Publish metric values after step `step`."""
        self.emit(Metrics, step=int(step), values={str(name): float(value) for name, value in values.items()})

    def log(self, text: str, level: int = logging.INFO) -> None:
        """Write a line to the worker's log and to the gang's events, with gang id and rank."""
        logger.log(level, "[gang %s rank %d] %s", self.gang, self.rank, text)
        self.emit(Log, text=text, level=level)

    @contextlib.contextmanager
    def span(self, kind: str) -> Iterator[None]:
        """Measure what happens inside as time spent on `kind`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.emit_span(kind, time.perf_counter() - start)

    def emit_span(self, kind: str, seconds: float) -> None:
        """Say that `seconds` went into `kind`: wait, receive, build, compute or communicate."""
        self.emit(Span, kind=kind, seconds=float(seconds))

    # Peers

    def ask(self, method: str, **request: Any) -> dict[str, Any]:
        """Ask the arbiter on the scheduler, with this member's token."""
        token = {"gang": self.gang, "attempt": self.attempt, "rank": self.rank}
        answer: dict[str, Any] = sync(self.worker.loop, turns.ask, self.worker, method=method, **token, **request)
        return answer

    def exchange(self, payload: Any = None, timeout: float | None = None) -> list[Any]:
        """All-gather `payload` (small, plain data) from every member; also a barrier.

        Returns
        -------
        list
            The payloads of all members, by rank.

        Raises
        ------
        MemberStopped
            If the gang ends meanwhile.
        GangTimeout
            If a peer has not called within `timeout` seconds (the start timeout).
        """
        deadline = self.spec.deadlines.start_timeout if timeout is None else timeout
        self._step += 1
        answer = self.ask("exchange", step=self._step, payload=payload, timeout=deadline)
        if "payloads" in answer:
            return list(answer["payloads"])
        if answer["ended"]:
            raise MemberStopped(answer["ended"])
        if self._step == 1:
            raise late_to_start(self.label, self.spec.workers, answer["missing"], deadline)
        who = _named(self.spec.workers, answer["missing"])
        raise GangTimeout(f"{self.label}: member {who} did not come to exchange {self._step} within {deadline:g} s")

    # Stopping

    @property
    def stopping(self) -> str | None:
        """Why the member is to end now; None while it may go on."""
        if self._stop_reason is None and self.leaving:
            self.stop(f"its worker is {self.worker.status.name}")
        return self._stop_reason

    def check(self) -> None:
        """Raise `MemberStopped` if the member was asked to stop: call it between rounds."""
        if reason := self.stopping:
            raise MemberStopped(reason)

    @property
    def leaving(self) -> bool:
        """Whether its worker is on its way out of the cluster."""
        return self.worker.status not in (Status.running, Status.paused)

    def on_stop(self, callback: Callable[[], Any]) -> None:
        """Call `callback` once the member is asked to stop (at once if it was), from another thread."""
        with self._lock:
            if self._stop_reason is None:
                self._on_stop.append(callback)
                return
        callback()

    def stop(self, reason: str) -> None:
        """Ask the member to end."""
        with self._lock:
            if self._stop_reason is not None:
                return
            self._stop_reason = reason
            callbacks = list(self._on_stop)
        for callback in callbacks:
            threading.Thread(target=callback, name=f"stop-{self.gang}-{self.rank}", daemon=True).start()

    # Ending

    def fail(self, error: BaseException) -> None:
        """Tell of a failure at once, before what cleaning up does to the peers makes them fail, too."""
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


def host_of(address: str) -> str:
    """The host in a worker's address, as the other workers use it; loopback for inproc."""
    return "127.0.0.1" if address.startswith("inproc") else str(get_address_host(address))


def late_to_start(label: str, workers: Sequence[str], missing: Sequence[int], deadline: float) -> GangTimeout:
    """The error for members that have not started in time."""
    return GangTimeout(
        f"{label}: {len(missing)} of {len(workers)} members had not started after {deadline:g} s: "
        f"member {_named(workers, missing)}. Are all threads of these workers busy with long tasks? "
        "Raise dask-bridges.start-timeout, or wait until they are free."
    )


def _named(workers: Sequence[str], ranks: Sequence[int]) -> str:
    return ", ".join(f"{rank} on {workers[rank]}" for rank in ranks)


_members: dict[tuple[str, str, int], Member] = {}


def _stop_members(worker: Worker, gang: str, reason: str) -> None:
    """Stream handler on a worker: end its members of a gang."""
    for (address, name, _), member in list(_members.items()):
        if address == worker.address and name == gang:
            member.stop(reason)


@contextlib.contextmanager
def _registered(member: Member) -> Iterator[None]:
    """Let the scheduler's word to stop reach the member, while it lives; then tell the scheduler how it ended."""
    key = (member.worker.address, member.gang, member.rank)
    member.worker.stream_handlers.setdefault(arbiter.STOP, functools.partial(_stop_members, member.worker))
    _members[key] = member
    try:
        yield
    finally:
        del _members[key]
        if member.outcome:
            member.tell(member.outcome, left=True)


def run_member(spec: MemberSpec) -> Any:
    """The Dask task of one member: present the token, wait for the peers, run, leave."""
    worker = get_worker()
    secede()
    member = Member(spec, worker)
    with _registered(member):
        member.outcome = "failed"  # where the answer is lost too: it may hold its place
        answer = member.ask("present", worker=worker.address)
        if refused := answer.get("refused"):
            member.outcome = ""
            raise StaleMember(f"{spec.label}: member {spec.rank} may not run here: {refused}")
        return _run_accepted(member)


def _run_accepted(member: Member) -> Any:
    try:
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


def _guarded(member: Member, error: BaseException) -> MemberFailed:
    """SystemExit must not leave the task: it would end the worker, and then the next, as Dask retries."""
    text = f"{member.label}: member {member.rank} raised {type(error).__name__}({error})"
    return MemberFailed(text, member.rank, member.worker.address, member.host)
