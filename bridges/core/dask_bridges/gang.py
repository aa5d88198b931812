"""N members on N workers that start together, know each other, and end together.

`Gang` is the client's side: it waits for its turn, submits one pinned Dask task a
member, watches, and gives either every member's result or the one root cause.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from distributed import Client, Future

from dask_bridges import config, events, turns
from dask_bridges.about import About, card
from dask_bridges.config import Deadlines
from dask_bridges.errors import GangTimeout, MemberFailed, MemberLost, PlacementError, WorkerLeft
from dask_bridges.events import Ended, Event, EventStream, Log, Lost, Placed, Planned, Span, Started, topic_of
from dask_bridges.member import MemberSpec, never_collateral
from dask_bridges.rootcause import RootCause
from dask_bridges.running import RunningMembers
from dask_serializers.hooks import activate as models_move

__all__ = ["Gang", "GangPlan"]

logger = logging.getLogger(__name__)

#: Seconds for which late events of an ended gang are still received, to no effect.
LINGER = 10.0


@dataclass(frozen=True)
class GangPlan:
    """What a gang is to do.

    Attributes
    ----------
    label : str
        What people call it: "XGBoost training". Shown to whoever waits for it.
    function : callable
        ``function(member, payload)``: module-level, so that it is found on the workers.
    payloads : sequence
        One a member, by rank: its length is the world size.
    workers : sequence of str
        Addresses to choose places from. As many as payloads: rank i runs on ``workers[i]``.
    exclusive : bool
        Whether the workers are held alone (the default) or shared with other sharing gangs.
    timeout, start_timeout, stop_timeout : float or str, optional
        Longest waits for the turn, for all to start, and for all to end; from the
        configuration by default.
    collateral : callable
        See `MemberSpec.collateral`.
    names : sequence of str
        What people call the members, by rank: "worker:1".
    replaceable : collection of int
        Ranks without which the others go on: one that is lost with its worker starts again on another
        worker of its host.
    about : About
        What a report tells of it.
    finishes : bool
        Whether members look at `Member.finishing`, and end early with a result.
    """

    label: str
    function: Callable[[Any, Any], Any]
    payloads: Sequence[Any]
    workers: Sequence[str]
    exclusive: bool = True
    timeout: float | str | None = None
    start_timeout: float | str | None = None
    stop_timeout: float | str | None = None
    collateral: Callable[[BaseException], bool] = field(default=never_collateral)
    names: Sequence[str] = ()
    replaceable: Collection[int] = ()
    about: About = field(default_factory=About)
    finishes: bool = False

    @property
    def called(self) -> tuple[str, ...]:
        """What people call the members, by rank."""
        return tuple(self.names) or tuple(f"member {rank}" for rank in range(len(self.payloads)))


class Gang:
    """One gang, run once.

    Parameters
    ----------
    client : Client
    plan : GangPlan
    attempt : int
        Counts from 1; a member of another attempt is refused.

    Attributes
    ----------
    id : str
    events : EventStream
        Everything the members tell, live, and from the start for who attaches late.
    members : RunningMembers
        Their tasks, while they run.
    """

    def __init__(self, client: Client, plan: GangPlan, attempt: int = 1) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.client = client
        self.plan = plan
        self.attempt = attempt
        self.deadlines = Deadlines.configured(start_timeout=plan.start_timeout, stop_timeout=plan.stop_timeout)
        self.events = EventStream(self.id)
        self.events.attempt = attempt
        self._lost, self._started = asyncio.Event(), asyncio.Event()
        self.members = RunningMembers(client)
        self._replacing: set[asyncio.Task[None]] = set()
        self._state = "new"
        self.events.listen(self._notice)
        for told in list(events.begun):
            told(self.events)

    def __repr__(self) -> str:
        return f"<Gang {self.id}: {self.plan.label}, {len(self.plan.payloads)} members, {self._state}>"

    def _repr_html_(self) -> str:
        workers: Sequence[str] = self.members.workers
        rows = zip(self.plan.called, workers or [""] * len(self.plan.payloads))
        return card(
            f"{self.plan.label}, gang {self.id}, attempt {self.attempt}: {self._state}", ["member", "worker"], rows
        )

    async def run(self) -> list[Any]:
        """Run it to its end.

        Returns
        -------
        list
            Every member's result, by rank.

        Raises
        ------
        PlacementError
            If the workers are not to be had.
        GangTimeout
            If the turn, or the start of all members, took too long.
        MemberFailed
            If a member raised; the root cause is its ``__cause__``.
        MemberLost
            If a worker died.
        """
        models_move()
        self._tell_plan()
        await turns.register(self.client)
        topic = topic_of(self.id)
        self.client.subscribe_topic(topic, self.events.receive)
        reason, error = "the client gave up", ""
        self._state = "waits for its turn"
        try:
            workers = await self._take_turn()
            self._state = "runs"
            results = await self._run_members(workers)
            reason = "finished"
            return results
        except BaseException as failure:
            error = f"{type(failure).__name__}: {failure}"
            self._tell_end(error, getattr(failure, "rank", -1))
            raise
        finally:
            self._state = f"failed: {error}" if error else "finished"
            await asyncio.shield(self._release(topic, reason))
            if not error:
                self._tell_end()

    def _tell_plan(self) -> None:
        """What the gang is to do, where somebody wants to know."""
        if self.events.detail:
            about, plan = self.plan.about, self.plan
            told = {"run": about.run or self.id, "params": about.told, "versions": about.versions}
            self._emit(Planned, label=plan.label, names=list(plan.called), **told)
            for name, lie in about.sets.items():
                self._emit(Placed, name=name, **lie)

    def _tell_end(self, error: str = "", cause: int = -1) -> None:
        if self.events.detail:
            self._emit(Ended, error=error, cause=cause)

    async def _release(self, topic: str, reason: str) -> None:
        """Give the places back; without a scheduler there are none."""
        try:
            if self._connected:
                await turns.ask(self.client, "release", gang=self.id, reason=reason)
                self.client.unsubscribe_topic(topic)
        except (OSError, ValueError):
            logger.info("[gang %s] no scheduler to release it at", self.id)
        finally:
            # Events under way would be an error in the client's log without a handler.
            handlers = self.client._event_handlers
            handlers[topic] = _ignore
            asyncio.get_running_loop().call_later(LINGER, handlers.pop, topic, None)

    @property
    def _connected(self) -> bool:
        return bool(self.client.status == "running")

    # The turn

    async def _take_turn(self) -> tuple[str, ...]:
        """Wait until all places are ours; say for whom we wait."""
        plan, start = self.plan, time.monotonic()
        if len(plan.workers) < len(plan.payloads):
            raise PlacementError(
                f"{plan.label} needs {len(plan.payloads)} workers, and has {len(plan.workers)} to choose from: "
                f"{', '.join(plan.workers) or 'none'}. Wait for more (client.wait_for_workers)."
            )
        timeout, notice = config.seconds("timeout", plan.timeout), config.seconds("wait-notice")
        request = {
            "gang": self.id,
            "client": self.client.id,
            "label": plan.label,
            "attempt": self.attempt,
            "candidates": list(plan.workers),
            "places": len(plan.payloads),
            "exclusive": plan.exclusive,
            "topic": topic_of(self.id),
            "names": list(plan.called),
            "replaceable": list(plan.replaceable),
            "finishes": plan.finishes,
            "deadlines": asdict(self.deadlines),
        }
        told = ""
        while True:
            left = timeout - (time.monotonic() - start)
            try:
                answer = await turns.ask(self.client, "acquire", wait=max(0.0, min(notice, left)), **request)
            except OSError as gone:
                raise PlacementError(f"{plan.label}: the scheduler is gone, and with it the turn: {gone}") from gone
            if "granted" in answer:
                self._emit(Span, kind="wait", seconds=time.monotonic() - start)
                return tuple(answer["granted"])
            if "lacking" in answer:
                raise WorkerLeft(self._lacking(answer))
            told = self._tell_wait(answer["waiting_for"], told)
            if left <= notice:
                raise GangTimeout(
                    f"{plan.label} had no turn within {timeout:g} s: {told}. "
                    "Raise dask-bridges.timeout, or use other workers."
                )

    def _lacking(self, answer: dict[str, Any]) -> str:
        gone = ", ".join(answer["lacking"]) or answer.get("reason", "")
        return (
            f"{self.plan.label} needs {len(self.plan.payloads)} of {len(self.plan.workers)} workers, "
            f"but some have left the cluster: {gone}"
        )

    def _tell_wait(self, ahead: Sequence[dict[str, Any]], told: str) -> str:
        """Log for whom we wait, when that has changed."""
        if not ahead:
            return told or "no worker was free"
        who = "; ".join(
            f"{'running' if a['running'] else 'queued'} {a['label']} (gang {a['gang']}) on {', '.join(a['workers'])}"
            for a in ahead
        )
        text = f"waits for {who}"
        if text != told:
            self._emit(Log, text=text)
        return text

    def _emit(self, kind: type[Event], /, **fields: Any) -> None:
        self.events.publish(kind(gang=self.id, attempt=self.attempt, **fields))

    # The members

    def _specs(self, workers: Sequence[str]) -> list[MemberSpec]:
        plan = self.plan
        return [
            MemberSpec(
                gang=self.id,
                attempt=self.attempt,
                rank=rank,
                workers=tuple(workers),
                label=plan.label,
                function=plan.function,
                payload=payload,
                collateral=plan.collateral,
                deadlines=self.deadlines,
                name=name,
                detail=self.events.detail,
            )
            for rank, (name, payload) in enumerate(zip(plan.called, plan.payloads))
        ]

    def _notice(self, event: Event) -> None:
        """Listen to what matters for the course of the gang."""
        if isinstance(event, Lost) and event.replaceable:
            work = asyncio.ensure_future(self._replace(event.rank))
            self._replacing.add(work)
            work.add_done_callback(self._replacing.discard)
        elif isinstance(event, Lost):
            self._lost.set()
        elif isinstance(event, Started):
            self._started.set()
        elif isinstance(event, Log) and event.rank < 0:
            logger.log(event.level, "[gang %s] %s %s", self.id, self.plan.label, event.text)

    async def _replace(self, rank: int) -> None:
        """Start a lost member again, once its host has a worker for it."""
        told, notice, name = False, config.seconds("wait-notice"), self.plan.called[rank]
        while True:
            try:
                place = await turns.ask(self.client, "replace", gang=self.id, rank=rank, wait=notice)
            except OSError:  # the scheduler is gone, which others see as well
                return
            if "host" not in place:
                break
            if not told:
                told = True
                text = f"{name} waits for a Dask worker on its host, {place['host']}; the others go on"
                self._emit(Log, text=text, level=logging.WARNING)
        lost = self.members.spec_of(rank)
        if "ended" in place or lost is None:
            return
        workers = list(lost.workers)
        workers[rank] = place["worker"]
        self.members.submit([replace(lost, workers=tuple(workers), incarnation=place["incarnation"])])
        self._emit(Log, text=f"{name} was lost with its worker, and starts again on {place['worker']}")

    async def _run_members(self, workers: tuple[str, ...]) -> list[Any]:
        members = self.members
        members.submit(self._specs(workers))
        lost = asyncio.ensure_future(self._lost.wait())
        try:
            await self._until_one_fails(lost)
            if not lost.done() and members.finished:
                fetched = await self._fetch(members.futures, lost)
                if fetched is not None:
                    return fetched
            error = await self._root_cause(members.error)
            raise error from error.__cause__
        finally:
            for task in (*self._replacing, lost):
                task.cancel()
            await asyncio.gather(*self._replacing, lost, return_exceptions=True)
            await members.release()

    async def _until_one_fails(self, lost: asyncio.Future[Any]) -> None:
        """Wait until all members have ended, or one that is not replaced has done so badly."""
        members = self.members
        while True:
            members.replaced.clear()
            finished = asyncio.ensure_future(asyncio.wait(members.ends, return_when=asyncio.FIRST_EXCEPTION))
            replaced = asyncio.ensure_future(members.replaced.wait())
            try:
                await self._until_over({finished, lost, replaced})
                if not replaced.done():
                    return
            finally:
                finished.cancel()
                replaced.cancel()

    async def _until_over(self, over: set[asyncio.Future[Any]]) -> None:
        """Wait until one of `over` has come, or the members are late to start."""
        started = asyncio.ensure_future(self._started.wait())
        try:
            await asyncio.wait(
                {started, *over}, timeout=self.deadlines.start_timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if started.done():
                await asyncio.wait(over, return_when=asyncio.FIRST_COMPLETED)
        finally:
            started.cancel()

    async def _fetch(self, futures: Sequence[Future], lost: asyncio.Future[Any]) -> list[Any] | None:
        """All results; None if a worker, or the scheduler, was lost before they were here."""
        results = asyncio.ensure_future(self.client.gather(list(futures), asynchronous=True))
        try:
            await asyncio.wait({results, lost}, return_when=asyncio.FIRST_COMPLETED)
            error = results.exception() if results.done() else None
            if not results.done() or (error is not None and (lost.done() or not self._connected)):
                return None
            if error is not None:
                text = str(error).partition("\n")[0]
                raise MemberFailed(f"{self.plan.label}: a result could not be sent to the client: {text}") from error
            return list(results.result())
        finally:
            results.cancel()
            await asyncio.gather(results, return_exceptions=True)

    async def _root_cause(self, raised: BaseException | None) -> BaseException:
        """Wait until all members have ended, and tell which failure came first."""
        reason = "a member failed" if raised is not None or self._lost.is_set() else "some members were late to start"
        try:
            if not self._connected:
                raise ConnectionAbortedError("the client has lost the scheduler, or was closed")
            settled = await turns.ask(self.client, "settle", gang=self.id, reason=reason)
        except OSError as gone:
            return MemberLost(f"{self.plan.label}: the scheduler is gone, and the members with it: {gone}")
        known = RootCause(
            self.plan.label,
            self.members.futures,
            self.members.workers,
            self.plan.called,
            self.events,
            self._lost,
            self.deadlines.start_timeout,
        )
        cause = await known.find(raised, settled)
        for note in known.stuck(settled):
            logger.warning("[gang %s] %s", self.id, note)
            cause.add_note(note)
        return cause


def _ignore(event: Any) -> None:
    """Handle an event of a gang that has ended."""
