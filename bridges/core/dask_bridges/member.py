"""One member of a gang, wherever it lives: in a Dask worker's process, or in a child of it.

What an adapter's function gets to work with: it talks, finds its peers, and
hears when it is to stop.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from distributed.comm import get_address_host

from dask_bridges.config import Deadlines
from dask_bridges.errors import GangTimeout, MemberStopped
from dask_bridges.events import Event, Log, Metrics, Progress, Span, Up
from dask_bridges.tally import Tally

__all__ = ["Member", "MemberSpec"]

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
    name : str
        What people call the member, "worker:1"; "member 1" by default.
    incarnation : int
        How often it was lost with its worker and replaced.
    detail : bool
        Whether somebody wants to know what its time goes into, see `Member.tally`.
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
    name: str = ""
    incarnation: int = 0
    detail: bool = False


class Member(ABC):
    """What the adapter's function gets to work with.

    Attributes
    ----------
    spec : MemberSpec
    rank, world_size, attempt, incarnation : int
    gang, label, name : str
    host : str
        The host by which the other workers reach this one.
    tally : Tally
        Adds up what is too short for a `span` each.
    finishing : bool
        Whether somebody has asked it to end after what it is at, with a result. Not all members hear of it at the
        same time: those that go in step agree first.
    """

    def __init__(self, spec: MemberSpec) -> None:
        self.spec = spec
        self.gang = spec.gang
        self.label = spec.label
        self.attempt = spec.attempt
        self.rank = spec.rank
        self.name = spec.name or f"member {spec.rank}"
        self.incarnation = spec.incarnation
        self.world_size = len(spec.workers)
        self.host: str = host_of(spec.workers[spec.rank])
        self.tally = Tally(self.emit, spec.detail)
        self.finishing = False
        self._step = 0
        self._stop_reason: str | None = None
        self._on_stop: list[Callable[[], Any]] = []
        self._on_finish: list[Callable[[], Any]] = []
        self._lock = threading.Lock()

    # Talking

    def emit(self, kind: type[EventT], /, **fields: Any) -> None:
        """Send an event to whoever listens to the gang."""
        self.send(kind(gang=self.gang, attempt=self.attempt, rank=self.rank, **fields).to_message())

    @abstractmethod
    def send(self, message: dict[str, Any]) -> None:
        """Send an event, as plain data."""

    def progress(self, done: int, total: int = 0, unit: str = "round") -> None:
        """Say that `done` of `total` are over."""
        self.emit(Progress, done=int(done), total=int(total), unit=str(unit))

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Publish metric values after step `step`."""
        self.emit(Metrics, step=int(step), values={str(name): float(value) for name, value in values.items()})

    def log(self, text: str, level: int = logging.INFO) -> None:
        """Write a line to the worker's log and to the gang's events, with gang id and rank."""
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
        """Say that `seconds` went into `kind`: wait, receive, build, compute, communicate or checkpoint."""
        self.emit(Span, kind=kind, seconds=float(seconds))

    def ready(self) -> None:
        """All that comes before the work is over, and was starting; told where somebody wants to know."""
        self.tally.begin()
        if self.spec.detail:
            self.emit(Up)

    # Peers

    @abstractmethod
    def ask(self, method: str, **request: Any) -> dict[str, Any]:
        """Ask the arbiter on the scheduler, with this member's token."""

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

    def recall(self) -> list[Any]:
        """What the members have told each other last, by `exchange`: for one that was not there yet."""
        return list(self.ask("recall")["payloads"])

    # Keeping

    @abstractmethod
    def keep(self, step: int, state: Any) -> None:
        """Keep a state in the worker's memory, in place of the one before, see `safekeeping.collect`."""

    # Stopping

    @abstractmethod
    def fail(self, error: BaseException) -> None:
        """Tell of a failure at once, before what cleaning up does to the peers makes them fail, too."""

    @property
    def stopping(self) -> str | None:
        """Why the member is to end now; None while it may go on."""
        return self._stop_reason

    def check(self) -> None:
        """Raise `MemberStopped` if the member was asked to stop: call it between rounds."""
        if reason := self.stopping:
            raise MemberStopped(reason)

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
        self._call_each(callbacks, "stop")

    def on_finish(self, callback: Callable[[], Any]) -> None:
        """Call `callback` once the member is asked to finish (at once if it was), from another thread."""
        with self._lock:
            if not self.finishing:
                self._on_finish.append(callback)
                return
        callback()

    def finish(self) -> None:
        """Ask the member to end after what it is at, with a result."""
        with self._lock:
            if self.finishing:
                return
            self.finishing = True
            callbacks = list(self._on_finish)
        self._call_each(callbacks, "finish")

    def _call_each(self, callbacks: Sequence[Callable[[], Any]], why: str) -> None:
        for callback in callbacks:
            threading.Thread(target=callback, name=f"{why}-{self.gang}-{self.rank}", daemon=True).start()


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
