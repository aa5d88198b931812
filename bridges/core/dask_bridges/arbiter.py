"""Whose turn it is, decided in one place: a small plugin on the scheduler.

It grants a gang all its places or none, in the order asked; checks each member's
token once; carries the small messages by which members find each other; and
frees everything when a client or a worker goes, or does not end when asked to. It
is sent by value, so it uses the standard library and distributed only: nothing of
ours is installed where the scheduler runs.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import time
from collections.abc import Coroutine
from typing import Any

from distributed.diagnostics.plugin import SchedulerPlugin

from dask_bridges.attempt import Attempt
from dask_bridges.dispatcher import Dispatcher
from dask_bridges.watchdog import Watchdog, last_words

__all__ = ["OPERATION", "STOP", "Arbiter"]

#: Bumped when the messages change: two versions then live side by side, unaware of each other.
PROTOCOL = 5
#: Name of the plugin, of its comm handler and of its stream handler on the scheduler.
OPERATION = f"dask_bridges_arbiter_{PROTOCOL}"
#: Name of the stream handler on the workers by which members are asked to stop.
STOP = f"dask_bridges_stop_{PROTOCOL}"
#: The same, of that by which they are asked to end after what they are at, with a result.
FINISH = f"dask_bridges_finish_{PROTOCOL}"
#: Of how many ended gangs the scheduler keeps the events.
KEPT_TOPICS = 100

logger = logging.getLogger("dask_bridges.arbiter")


class Arbiter(SchedulerPlugin):  # type: ignore[misc]
    """Grants places on workers to gangs. Every method answers plain data."""

    name = OPERATION
    idempotent = True  # registered by every client, started once

    def __init__(self) -> None:
        self.gangs: dict[str, Attempt] = {}  # in the order asked
        self.ended: collections.deque[str] = collections.deque()  # topics of gangs that are over
        self.tasks: set[asyncio.Task[None]] = set()

    async def start(self, scheduler: Any) -> None:
        """Answer on this scheduler."""
        self.scheduler = scheduler
        self.watchdog = Watchdog(scheduler, self.held)
        scheduler.handlers[OPERATION] = self.handle
        scheduler.stream_handlers[OPERATION] = self.tell

    async def close(self) -> None:
        """The scheduler closes."""
        self.watchdog.close()
        for task in self.tasks:
            task.cancel()

    def background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine for as long as the scheduler lives."""
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def handle(self, method: str, **request: Any) -> dict[str, Any]:
        """The one comm handler: `method` is the name of one of the methods ``on_…``."""
        answer: dict[str, Any] = await getattr(self, f"on_{method}")(**request)
        return answer

    # Turns

    async def on_acquire(self, gang: str, client: str, wait: float, **request: Any) -> dict[str, Any]:
        """Queue for places, or go on waiting for them, for at most `wait` seconds.

        Answers ``{"granted": [address by rank]}``, ``{"waiting_for": [...]}``, or
        ``{"lacking": [addresses that are gone]}``.
        """
        if client not in self.scheduler.clients:
            return {"lacking": [], "reason": "the client is gone"}
        asked = self.gangs.get(gang)
        if asked is None:
            asked = self.gangs[gang] = Attempt(gang, client, request)
            # The client's own subscription takes another road and may come after a first loss.
            self.scheduler.subscribe_topic(asked.topic, client)
            self.grant()
        gone = self._gone(asked)
        if not gone:
            await asked.until(lambda: asked.workers or asked.ending or self._gone(asked), wait)
            gone = self._gone(asked)
        if asked.workers and not asked.ending:
            return {"granted": asked.workers}
        if gone or asked.ending:
            if not asked.live:
                self._forget(asked)
            self.grant()
            return {"lacking": gone, "reason": asked.ending}
        return {"waiting_for": self._ahead_of(asked)}

    def _gone(self, gang: Attempt) -> list[str]:
        """Candidates that left the cluster, where too few remain."""
        gone = [worker for worker in gang.candidates if worker not in self.scheduler.workers]
        return gone if not gang.workers and len(gang.candidates) - len(gone) < gang.places else []

    def _ahead_of(self, gang: Attempt) -> list[dict[str, Any]]:
        """Who holds, or asked earlier for, places that `gang` waits for."""
        wanted = set(gang.candidates)
        ahead = []
        for other in self.gangs.values():
            if other is gang:
                break
            workers = other.holds() if other.workers else set(other.candidates)
            if workers & wanted:
                ahead.append({"gang": other.gang, "label": other.label, "client": other.client,
                              "workers": sorted(workers & wanted), "running": bool(other.workers)})  # fmt: skip
        return ahead

    def grant(self) -> None:
        """Give places to those who wait, first come, first served; nobody overtakes on a shared worker."""
        exclusive: set[str] = set()
        shared: set[str] = set()
        for gang in self.gangs.values():
            (exclusive if gang.exclusive else shared).update(gang.holds())
        reserved: set[str] = set()
        for gang in list(self.gangs.values()):
            if gang.workers or gang.ending:
                continue
            taken = exclusive | reserved | (shared if gang.exclusive else set())
            free = [w for w in gang.candidates if w not in taken and w in self.scheduler.workers]
            if len(free) < gang.places:
                reserved.update(gang.candidates)
                continue
            gang.workers = free[: gang.places]
            states = [self.scheduler.workers[worker] for worker in gang.workers]
            gang.nannies = [(state.nanny, state.pid) for state in states]
            gang.hosts = [state.host for state in states]
            (exclusive if gang.exclusive else shared).update(gang.workers)
            gang.touch()
            self.watchdog.wake()

    def held(self) -> dict[str, dict[str, float]]:
        """The workers that members are on, each with the shortest deadlines of its gangs."""
        held: dict[str, dict[str, float]] = {}
        for gang in self.gangs.values():
            for worker in gang.holds():
                others = held.get(worker, gang.deadlines)
                held[worker] = {name: min(limit, others[name]) for name, limit in gang.deadlines.items()}
        return held

    # Members

    async def on_present(self, gang: str, attempt: int, rank: int, incarnation: int, worker: str) -> dict[str, Any]:
        """A member's first act: its token (gang, attempt, rank, incarnation) is accepted once, from its own worker."""
        known = self.gangs.get(gang)
        refused = ""
        if known is None or known.attempt != attempt or not known.workers:
            refused = "its gang has ended"
        elif known.ending:
            refused = known.ending
        elif known.workers[rank] != worker:
            refused = f"its place is on {known.workers[rank]}"
        elif rank in known.presented or known.incarnations[rank] != incarnation:
            refused = "it has run already"
        if refused or known is None:
            return {"refused": refused}
        known.presented.add(rank)
        return {"finishing": True} if known.finishing else {}

    async def on_exchange(
        self, gang: str, attempt: int, rank: int, step: int, payload: Any, timeout: float
    ) -> dict[str, Any]:
        """All-gather of one small payload a member; answers once every member has called."""
        known = self.gangs.get(gang)
        if known is None or known.attempt != attempt:
            return {"ended": "its gang has ended"}
        gathered = known.payloads.setdefault(step, {})
        gathered[rank] = payload
        world = len(known.workers)
        if len(gathered) == world:  # waking all for each arrival would cost the square of the world
            known.agreed = [gathered[r] for r in range(world)]
            known.payloads.pop(step, None)  # whoever waits for it holds it
            known.touch()
        await known.until(lambda: len(gathered) == world or known.ending, timeout)
        if len(gathered) < world:
            missing = [r for r in range(world) if r not in gathered]
            return {"ended": known.ending, "missing": missing}
        return {"payloads": [gathered[r] for r in range(world)]}

    async def on_recall(self, gang: str, attempt: int, rank: int) -> dict[str, Any]:
        """The payloads of the last exchange that is over."""
        known = self.gangs.get(gang)
        return {"payloads": [] if known is None or known.attempt != attempt else known.agreed}

    async def on_offer(
        self, gang: str, attempt: int, rank: int, worker: str, resource: str, amount: float
    ) -> dict[str, Any]:
        """A worker has so many devices for the jobs of a pool from now on; 0 for no more."""
        dispatcher = self.scheduler.plugins.get(Dispatcher.name)
        if dispatcher is None:
            dispatcher = Dispatcher(self.scheduler)
            self.scheduler.add_plugin(dispatcher, name=Dispatcher.name)
        dispatcher.offer(resource, worker, amount)
        if not dispatcher.pools:
            self.scheduler.remove_plugin(Dispatcher.name)
        return {}

    def tell(self, gang: str, attempt: int, rank: int, outcome: str, left: bool, worker: str = "") -> None:
        """A member says how it ends (stream message), when it knows, and when it has `left`.

        It has finished or failed, or comes late with a failure when it was already
        asked to stop, or its failure is collateral, or it is lost. All but the first
        end the gang.
        """
        try:
            known = self.gangs.get(gang)
            if known is None or known.attempt != attempt or rank not in known.live:
                return
            if worker and known.workers[rank] != worker:
                return
            known.outcomes.setdefault(rank, outcome)
            if left:
                known.left.add(rank)
            if outcome != "finished":
                self.end(known, f"{known.names[rank]} failed")
            self._settled(known)
        except Exception:  # an error here would close the stream of an innocent worker
            logger.exception("arbiter: word of %s rank %s", gang, rank)

    # Ends

    def end(self, gang: Attempt, reason: str) -> None:
        """No member starts any more, and those that run are asked to stop."""
        gang.ending = gang.ending or reason
        for rank in gang.live:
            worker = gang.workers[rank]
            if worker in self.scheduler.workers:
                self.scheduler.worker_send(worker, {"op": STOP, "gang": gang.gang, "reason": reason})
        if gang.live and gang.enforced is None:
            gang.enforced = self.background(self._enforce(gang))
        gang.touch()

    async def on_finish(self, gang: str) -> dict[str, Any]:
        """Ask the members of a gang to end after the round they are at; who starts later is told at once.

        Answers whether there is such a gang.
        """
        known = self.gangs.get(gang)
        if known is None or known.ending:
            return {"known": False}
        known.finishing = True
        self._tell(known, {"event": "FinishAsked", "rank": -1})
        for rank in known.live:
            if known.workers[rank] in self.scheduler.workers:
                self.scheduler.worker_send(known.workers[rank], {"op": FINISH, "gang": gang})
        return {"known": True}

    async def _enforce(self, gang: Attempt) -> None:
        """Restart the workers of members that do not end: nothing else ends a thread inside a framework."""
        timeout = gang.deadlines["stop_timeout"]
        if await gang.until(lambda: not gang.live, timeout):
            return
        for rank in sorted(gang.live):
            worker = gang.workers[rank]
            gang.reasons[rank] = f"{gang.names[rank]} of {gang.label} on {worker} had not ended after {timeout:g} s"
            if gang.nannies[rank][0] is None:
                gang.reasons[rank] += ", and has no nanny that could restart its worker"
            else:
                gang.restarted.add(rank)
                gang.left.add(rank)
                gang.reasons[rank] += ", so its worker was restarted"
                self.background(self.watchdog.end(worker, gang.reasons[rank]))
        self._settled(gang)

    async def on_settle(self, gang: str, reason: str) -> dict[str, Any]:
        """End a gang and wait until its members have left.

        Answers the "outcomes", pairs of rank and how it ended, in that order; the
        "stuck" ranks, which did not end by themselves; the "absent" ones, which never
        started; and the "reasons" of those lost or stuck.
        """
        known = self.gangs.get(gang)
        if known is None:
            return {"outcomes": [], "stuck": [], "absent": [], "reasons": []}
        self.end(known, reason)
        if known.enforced is not None:
            await asyncio.wait([known.enforced])
        for rank, outcome in known.outcomes.items():
            if "lost" in outcome and rank not in known.reasons:
                known.reasons[rank] = await self._last_words(known, rank)
        return {
            "outcomes": list(known.outcomes.items()),
            "stuck": sorted(known.live | known.restarted),
            "absent": sorted(set(range(len(known.workers))) - known.presented),
            "reasons": list(known.reasons.items()),
        }

    async def _last_words(self, gang: Attempt, rank: int) -> str:
        nanny, pid = gang.nannies[rank]
        words = await self.watchdog.ask_nanny(nanny, 2, last_words, pid)
        return f'its nanny says: "{words}"' if words else ""

    async def on_release(self, gang: str, reason: str) -> dict[str, Any]:
        """The client is done with a gang: its places are free as soon as its members have left."""
        known = self.gangs.get(gang)
        if known is not None:
            known.released = True
            self.end(known, reason)
            self._settled(known)
        return {}

    def _settled(self, gang: Attempt) -> None:
        gang.touch()
        if gang.released and not gang.live:
            self._forget(gang)
        self.grant()

    def _forget(self, gang: Attempt) -> None:
        """A gang is over; its events stay until enough others are."""
        if self.gangs.pop(gang.gang, None) is not None:
            self.ended.append(gang.topic)
        while len(self.ended) > KEPT_TOPICS:
            # Topics have no public end: an empty one stays in the scheduler's memory.
            self.scheduler._broker._topics.pop(self.ended.popleft(), None)

    def add_worker(self, scheduler: Any, worker: str) -> None:
        """A worker has come: gangs that run go on as they are, and their clients hear of it."""
        for gang in self.gangs.values():
            gang.touch()
            if gang.workers and not gang.ending:
                text = f"goes on with its {gang.places} workers; {worker}, which has just joined, is left out"
                self._tell(gang, {"event": "Log", "rank": -1, "text": text, "level": logging.INFO})

    def _tell(self, gang: Attempt, event: dict[str, Any]) -> None:
        """Send an event to whoever listens to the gang."""
        message = {**event, "gang": gang.gang, "attempt": gang.attempt, "time": time.time()}
        self.scheduler.log_event(gang.topic, message)

    def remove_client(self, scheduler: Any, client: str) -> None:
        """A client is gone: its gangs end, and give back their places."""
        for gang in list(self.gangs.values()):
            if gang.client == client:
                gang.released = True
                self.end(gang, "its client is gone")
                self._settled(gang)

    def remove_worker(self, scheduler: Any, worker: str, **kwargs: Any) -> None:
        """A worker is gone: gangs with a member there end, and their clients hear of it."""
        reason = self.watchdog.reasons.pop(worker, "")
        for gang in list(self.gangs.values()):
            for rank in [rank for rank, its in enumerate(gang.workers) if its == worker]:
                self._lose(gang, rank, reason)
            self._settled(gang)

    def restart(self, scheduler: Any) -> None:
        """All tasks are forgotten and all workers restarted: no member lives on."""
        for gang in list(self.gangs.values()):
            gang.replaceable.clear()
            for rank in range(len(gang.workers)):
                self._lose(gang, rank, "somebody restarted the cluster (client.restart)")
            self._settled(gang)

    def _lose(self, gang: Attempt, rank: int, reason: str) -> None:
        """Note the loss of a member, in its place among the ends of the others, and end its gang."""
        if rank in gang.replaceable and not gang.ending:
            self._vacate(gang, rank)
            return
        worker, before = gang.workers[rank], gang.outcomes.get(rank, "")
        gang.presented.add(rank)
        if rank in gang.restarted or (gang.released and rank in gang.left):
            return
        gang.left.add(rank)
        if before == "finished":  # it is lost with its result, and only now is that a reason to end
            del gang.outcomes[rank]
        if before != "failed":  # an echo of its peers' failures was the first sign of the loss
            gang.outcomes[rank] = "finished, then lost" if before == "finished" else "lost"
        if reason:
            gang.reasons[rank] = reason
        if not gang.released:
            self._tell(gang, {"event": "Lost", "rank": rank, "worker": worker})
            self.end(gang, f"worker {worker} of {gang.names[rank]} was lost")

    def _vacate(self, gang: Attempt, rank: int) -> None:
        """A member that can be replaced is lost: the others go on."""
        gang.incarnations[rank] += 1
        gang.presented.discard(rank)
        gang.outcomes.pop(rank, None)
        gang.left.discard(rank)
        self._tell(gang, {"event": "Lost", "rank": rank, "worker": gang.workers[rank], "replaceable": True})

    async def on_replace(self, gang: str, rank: int, wait: float) -> dict[str, Any]:
        """A new place for a lost member, on the same host, where its peers will look for it.

        Answers ``{"worker": address, "incarnation": number}``, ``{"host": name}`` if after
        `wait` seconds that host has no worker, or ``{"ended": reason}``.
        """
        known = self.gangs.get(gang)
        if known is None:
            return {"ended": "its gang has ended"}
        found: list[str] = []

        def look() -> bool:
            states = [state for state in self.scheduler.workers.values() if state.host == known.hosts[rank]]
            free = sorted((known.workers.count(state.address), state.address) for state in states)
            found[:] = [address for _, address in free if address != known.workers[rank]]
            return bool(found or known.ending)

        await known.until(look, wait)
        if known.ending:
            return {"ended": known.ending}
        if not found:
            return {"host": known.hosts[rank]}
        state = self.scheduler.workers[found[0]]
        known.workers[rank], known.nannies[rank] = found[0], (state.nanny, state.pid)
        return {"worker": found[0], "incarnation": known.incarnations[rank]}

    async def on_status(self) -> dict[str, Any]:
        """Who holds and who waits, for people and tests."""
        return {
            "gangs": [
                {"gang": gang.gang, "label": gang.label, "client": gang.client, "workers": gang.workers,
                 "live": sorted(gang.live), "ending": gang.ending, "attempt": gang.attempt,
                 "finishing": gang.finishing, "finishes": gang.finishes}
                for gang in self.gangs.values()
            ]
        }  # fmt: skip
