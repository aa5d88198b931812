"""A framework with no framework in it: members sum the rows they hold, round after round.

It is a bridge like the others, so that the contract can be tested, and shown,
with nothing else installed.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed import Client

from dask_bridges import clients, config, partitions, placement
from dask_bridges.about import About
from dask_bridges.errors import MemberLost
from dask_bridges.events import Event
from dask_bridges.gang import Gang, GangPlan
from dask_bridges.member import Member
from dask_bridges.processes import run_in_child
from dask_bridges.reporting import asked, reported
from dask_bridges.task import WorkerMember
from dask_bridges.testing.faults import call_at

__all__ = ["LoopbackResult", "train"]


@dataclass(frozen=True)
class _Spec:
    keys: tuple[Any, ...]
    rounds: int
    fault: Callable[..., None] | None
    child: bool = False


@dataclass(frozen=True)
class LoopbackResult:
    """What a loopback training gives.

    Attributes
    ----------
    total : float
        Sum of X times y over all rows and columns, times the number of rounds.
    rows : list of int
        Rows of each rank.
    events : list of Event
        Everything the members said.
    """

    total: float
    rows: list[int]
    events: list[Event]


def _member(member: WorkerMember, spec: _Spec) -> tuple[float, int]:
    if spec.child:
        return run_in_child(member, _sum, (list(_Blocks(member, spec.keys)), spec))  # type: ignore[no-any-return]
    return _sum(member, (_Blocks(member, spec.keys), spec))


@dataclass(frozen=True)
class _Blocks:
    """The partitions a member holds, taken one at a time."""

    member: WorkerMember
    keys: tuple[Any, ...]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for key in self.keys:
            with self.member.span("receive"):
                part = partitions.take(self.member.worker, key)
            yield part


def _sum(member: Member, work: tuple[Iterable[dict[str, Any]], _Spec]) -> tuple[float, int]:
    blocks, spec = work
    total, rows = 0.0, 0
    call_at(spec.fault, member.rank, -1)
    for done in range(1, spec.rounds + 1):
        member.check()
        local, rows = 0.0, 0
        with member.span("compute"):
            for part in blocks:
                local += float((part["X"] * part["y"][:, None]).sum())
                rows += partitions.rows_of(part["X"])
                member.tally.fed(partitions.rows_of(part["X"]), part["X"].nbytes + part["y"].nbytes)
        with member.span("communicate"):
            total += sum(member.exchange(local))
        if member.rank == 0:
            member.metrics(done - 1, {"total": total})
            member.progress(done, spec.rounds)
        member.tally.tell("compute")
        call_at(spec.fault, member.rank, done - 1)
    member.tally.tell("compute", now=True)
    return total, rows


def train(
    client: Client | None,
    X: Any,
    y: Any,
    *,
    rounds: int = 1,
    workers: str | Sequence[str] | None = None,
    fault: Callable[..., None] | None = None,
    child: bool = False,
    exclusive: bool = True,
    timeout: float | str | None = None,
    listeners: Sequence[Callable[[Event], None]] = (),
    restarts: int = 0,
    report: str | Path | None = None,
) -> Any:
    """Sum ``X * y[:, None]`` over all rows, once a round.

    Parameters
    ----------
    client : Client or None
    X, y : dask array
        Of shapes (rows, columns) and (rows,).
    rounds : int
    workers, exclusive, timeout : optional
        As in every bridge.
    fault : callable, optional
        ``fault(rank=, round=)``, called in the member before the first round (-1) and after each.
    child : bool
        Whether members do their work in child processes of their workers.
    listeners : sequence of callable
        Called with every event.
    restarts : int
        How often it is begun anew where a member is lost.
    report : str or Path, optional
        A page of the run, see `dask_bridges.report`.

    Returns
    -------
    LoopbackResult
    """
    client = clients.current(client)
    recorder = asked(report)
    prepared = partitions.prepare(client, {"X": X, "y": y})
    name = uuid.uuid4().hex[:12]

    async def run() -> LoopbackResult:
        for number in range(1, restarts + 1):
            try:
                return await attempt(number)
            except MemberLost:
                continue
        return await attempt(restarts + 1)

    async def attempt(number: int) -> LoopbackResult:
        chosen = await placement.usable_workers(client, workers, config.seconds("timeout", timeout))
        parts = await partitions.load(client, prepared, workers=workers and [w.address for w in chosen])
        usable = await placement.usable_workers(client, workers)
        await placement.check_packages(client, [w.address for w in usable], ["dask_bridges"])
        await parts.spread(client, [w.address for w in usable])
        ranks = parts.holding()
        specs = [_Spec(parts.keys_on(worker), rounds, fault, child) for worker in ranks]
        about = About(name, {"rounds": rounds, "workers": workers}, ["numpy"], {"X": parts.lying(ranks)})
        plan = GangPlan("loopback", _member, specs, ranks, exclusive=exclusive, timeout=timeout, about=about)
        gang = Gang(client, plan, number)
        if recorder is not None:
            gang.events.listen(recorder)
        for listener in listeners:
            gang.events.listen(listener)
        results = await gang.run()
        return LoopbackResult(results[0][0], [rows for _, rows in results], gang.events.events)

    return clients.call(client, reported, recorder, run)
