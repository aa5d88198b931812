"""Which failure of a gang came first: its peers fail a moment later, for want of it.

`RootCause` looks at how the members left, in the order the arbiter saw it, and
turns the one that matters into the error the caller gets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distributed import Future

from dask_bridges.errors import BridgeError, MemberFailed, MemberLost, MemberStopped, StaleMember
from dask_bridges.events import EventStream, Failed
from dask_bridges.member import host_of, late_to_start

__all__ = ["RootCause"]


@dataclass(frozen=True)
class RootCause:
    """What is known of a gang that failed.

    Attributes
    ----------
    label : str
        What people call the gang.
    futures : sequence of Future
        The members' tasks, by rank.
    workers, names : sequence of str
        Their workers, and what people call them, by rank.
    events : EventStream
        What the members have said.
    lost : asyncio.Event
        Set when a worker of the gang is lost.
    start_timeout : float
        Seconds the members had to start.
    """

    label: str
    futures: Sequence[Future]
    workers: Sequence[str]
    names: Sequence[str]
    events: EventStream
    lost: asyncio.Event
    start_timeout: float

    async def find(self, raised: BaseException | None, settled: dict[str, Any]) -> BaseException:
        """The failure that came first and was no echo of another.

        Parameters
        ----------
        raised : exception or None
            What the first task that ended badly raised.
        settled : dict
            The arbiter's word, see `Arbiter.on_settle`.
        """
        outcomes: dict[int, str] = dict(settled["outcomes"])
        reasons: dict[int, str] = dict(settled["reasons"])
        for kinds in (("failed", "lost", "finished, then lost"), ("late",)):
            for rank, outcome in outcomes.items():
                if outcome in kinds:
                    return await self._describe(rank, outcome, reasons.get(rank, ""))
        absent = settled["absent"]
        if absent and raised is None:
            return late_to_start(self.label, self.workers, absent, self.start_timeout)
        for rank in absent:
            error = await self._exception_of(rank) if self.futures[rank].status == "error" else None
            if error is not None and not isinstance(error, StaleMember):
                return self._unplaced(rank, error)
        echoes = [rank for rank, outcome in outcomes.items() if outcome == "collateral"]
        if echoes and not isinstance(raised, MemberLost):
            return await self._describe(echoes[0], "collateral")
        return raised or BridgeError(f"{self.label} ended for no known reason")

    @staticmethod
    def stuck(settled: dict[str, Any]) -> list[str]:
        """What to say of members that did not end."""
        reasons = dict(settled["reasons"])
        return [reasons[rank] for rank in settled["stuck"] if rank in reasons]

    async def _describe(self, rank: int, outcome: str, reason: str = "") -> BaseException:
        worker = self.workers[rank]
        where = (rank, worker, host_of(worker))
        if "lost" in outcome:
            when = "after it had finished" if outcome.startswith("finished") else "while it ran"
            why = reason or "it died or left the cluster. The worker's (or its nanny's) log says why"
            return MemberLost(
                f"{self.label}: {self.names[rank]} was lost {when}, with its worker {worker}: {why}.", *where
            )
        original = await self._exception_of(rank)
        if isinstance(original, BridgeError) and not isinstance(original, MemberStopped):
            return original
        told = self._last_words(rank) if original is None else f"{type(original).__name__}: {original}"
        failed = MemberFailed(f"{self.label}: {self.names[rank]} on {worker} raised {told}", *where)
        failed.__cause__ = original
        return failed

    def _last_words(self, rank: int) -> str:
        """What a member said of its failure, where its worker was lost before the exception was here."""
        return next(
            (event.error for event in self.events.events if isinstance(event, Failed) and event.rank == rank),
            "an exception that was lost with its worker",
        )

    async def _exception_of(self, rank: int) -> BaseException | None:
        """The exception of a member's task: right after its farewell to the arbiter, or lost with its worker."""
        future = self.futures[rank]
        coming = asyncio.ensure_future(future.exception())
        lost = asyncio.ensure_future(self.lost.wait())
        try:
            await asyncio.wait({coming, lost}, timeout=5, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({coming}, timeout=0.5)
            error: BaseException | None = coming.result() if coming.done() else None
            return error.with_traceback(await future.traceback()) if error is not None else None
        finally:
            coming.cancel()
            lost.cancel()

    def _unplaced(self, rank: int, raised: BaseException) -> BaseException:
        """A member that took no place: its task could not be run."""
        if isinstance(raised, BridgeError):
            return raised
        worker = self.workers[rank]
        text = f"{self.label}: {self.names[rank]} could not start on {worker}: {type(raised).__name__}: {raised}"
        failed = MemberFailed(text, rank, worker, host_of(worker))
        failed.__cause__ = raised
        return failed
