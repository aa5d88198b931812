"""What a run's events come to: who was doing what when, how the metrics went, where the data lay.

A `Story` is made event by event, stays small however long the run is, and is plain data: a
report holds it as JSON, and it can be had back from there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dask_bridges.events import (
    Down,
    Ended,
    Event,
    Failed,
    Finished,
    Log,
    Lost,
    Memory,
    Metrics,
    Offered,
    Placed,
    Planned,
    Progress,
    Ran,
    Reported,
    Span,
    Spent,
    Started,
    Up,
)

__all__ = ["Attempt", "Mark", "Piece", "Row", "Run", "Story"]

#: Most pieces, values and lines of each kind that are kept of a row; more are merged, or every second one dropped.
MOST = 4000
#: Into how many steps the time is cut for a page at most, and about how many pieces it shows in all.
FINEST, PIECES = 1500, 30_000
#: Most series of a chart: a search of thousands of jobs has as many curves.
SERIES = 60
#: What is left of a span between others in it, and is shorter than this, is no piece of its own.
SLIVER = 0.002
#: For how long a job may still be seen to while the next one has its device.
HANDOVER = 0.1


@dataclass
class Piece:
    """What some seconds went into.

    Attributes
    ----------
    start, end : float
        Seconds since the epoch.
    seconds : dict of str to float
        By kind: "wait", "start", "receive", "build", "compute", "communicate", "checkpoint", "restart".
    attempt : int
    text : str
        For people.
    """

    start: float
    end: float
    seconds: dict[str, float]
    attempt: int = 1
    text: str = ""

    def cut(self, start: float, end: float) -> Piece:
        """The part of it between two moments."""
        share = (end - start) / (self.end - self.start) if self.end > self.start else 1.0
        seconds = {kind: value * share for kind, value in self.seconds.items()}
        return dataclasses.replace(self, start=start, end=end, seconds=seconds)

    def rounded(self) -> Piece:
        """To a tenth of a millisecond."""
        seconds = {kind: round(value, 4) for kind, value in self.seconds.items()}
        return dataclasses.replace(self, start=round(self.start, 4), end=round(self.end, 4), seconds=seconds)

    def and_next(self, other: Piece) -> Piece:
        """Both in one."""
        kinds = dict.fromkeys((*self.seconds, *other.seconds))
        seconds = {kind: self.seconds.get(kind, 0.0) + other.seconds.get(kind, 0.0) for kind in kinds}
        return dataclasses.replace(self, end=other.end, seconds=seconds)


@dataclass
class Mark:
    """A moment: something was lost, failed, or began again."""

    time: float
    kind: str
    text: str


@dataclass
class Row:
    """A member, through all attempts; of a device pool a device.

    Attributes
    ----------
    name : str
    workers : dict of str to str
        Its Dask worker, by attempt.
    pieces : list of Piece
        One after another.
    marks : list of Mark
    fed : list of (float, float, int, int)
        From when to when how many rows and bytes were handed to the framework.
    memory : list of (float, int)
        Moments, and bytes.
    limit : int
        Of its worker's memory; 0 for none.
    device : bool
        Whether it is a device of a pool, or what shares one, and no member.
    """

    name: str
    workers: dict[str, str] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    fed: list[tuple[float, float, int, int]] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    limit: int = 0
    device: bool = False

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Row:
        """Undo `dataclasses.asdict`."""
        pieces = [Piece(**piece) for piece in plain["pieces"]]
        marks = [Mark(**mark) for mark in plain["marks"]]
        tuples = {name: [tuple(each) for each in plain[name]] for name in ("fed", "memory")}
        return cls(**{**plain, "pieces": pieces, "marks": marks, **tuples})

    def add(self, piece: Piece) -> None:
        """Add what was told last. What is inside it was told before it, and is what that time went into."""
        tail: list[Piece] = []
        while self.pieces and self.pieces[-1].end > piece.start:
            tail.append(self.pieces.pop())
        tail.reverse()
        self.pieces.extend(_merged(piece, tail))
        if len(self.pieces) > MOST:
            pairs = zip(self.pieces[::2], self.pieces[1::2])
            self.pieces = [one.and_next(other) for one, other in pairs] + self.pieces[len(self.pieces) // 2 * 2 :]

    def feed(self, start: float, end: float, rows: int, nbytes: int) -> None:
        """Rows and bytes went to the framework."""
        self.fed.append((start, end, rows, nbytes))
        if len(self.fed) > MOST:
            pairs = zip(self.fed[::2], self.fed[1::2])
            merged = [(one[0], other[1], one[2] + other[2], one[3] + other[3]) for one, other in pairs]
            self.fed = merged + self.fed[len(self.fed) // 2 * 2 :]

    def coarsened(self, step: float) -> Row:
        """The same with short pieces in one with their neighbours, as nothing shorter than `step` can be seen."""
        pieces: list[Piece] = []
        for piece in self.pieces:
            last = pieces[-1] if pieces else None
            short = last is not None and last.end - last.start < step and piece.start - last.end < step
            if last is not None and short and last.attempt == piece.attempt and last.text == piece.text:
                pieces[-1] = last.and_next(piece)
            else:
                pieces.append(piece)
        return dataclasses.replace(self, pieces=[piece.rounded() for piece in pieces])

    @property
    def rows(self) -> int:
        """Rows that it was fed."""
        return sum(rows for _, _, rows, _ in self.fed)

    @property
    def totals(self) -> dict[str, float]:
        """Seconds by kind."""
        found: dict[str, float] = {}
        for piece in self.pieces:
            for kind, seconds in piece.seconds.items():
                found[kind] = found.get(kind, 0.0) + seconds
        return found


def _merged(piece: Piece, inside: list[Piece]) -> list[Piece]:
    """Pieces that were told before, and what is left of one around them; slivers of it go to their neighbours."""
    if not inside:
        return [piece]
    found: list[Piece] = []
    at = piece.start
    for other in inside:
        if other.start - at > SLIVER:
            found.append(piece.cut(at, other.start))
        elif other.start > at and found:
            found[-1] = found[-1].and_next(piece.cut(at, other.start))
        elif other.start > at:
            sliver = piece.cut(at, other.start)
            other = dataclasses.replace(sliver.and_next(other), attempt=other.attempt, text=other.text)
        found.append(other)
        at = max(at, other.end)
    if piece.end - at > SLIVER:
        found.append(piece.cut(at, piece.end))
    elif piece.end > at:
        found[-1] = found[-1].and_next(piece.cut(at, piece.end))
    return found


@dataclass
class Attempt:
    """One gang.

    Attributes
    ----------
    gang : str
    number : int
    began, granted, ended : float
        When it was asked for, had its turn, and was over; 0 for not yet.
    error : str
    cause : int
        Rank of the member that failed or was lost first; -1 for none.
    sets : dict of str to dict
        Where the partitions lay, see `Placed`.
    """

    gang: str
    number: int
    began: float
    granted: float = 0.0
    ended: float = 0.0
    error: str = ""
    cause: int = -1
    sets: dict[str, dict[str, list[int]]] = field(default_factory=dict)


@dataclass
class Run:
    """One call, with its attempts.

    Attributes
    ----------
    id, label : str
    params, versions : dict of str to str
    attempts : list of Attempt
    rows : dict of str to Row
        Of members by rank, of devices by their names.
    curves : dict of str to list of (int, float)
        Steps, and values after them, by metric.
    done : dict of str to int
        How far it came: of "round", "batch", "step" or "job".
    log : list of str
        What people were told.
    """

    id: str
    label: str
    params: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    attempts: list[Attempt] = field(default_factory=list)
    rows: dict[str, Row] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    @property
    def error(self) -> str:
        """Of the last attempt."""
        return self.attempts[-1].error if self.attempts else ""

    def row(self, name: str) -> Row:
        """The row of that name, maybe new."""
        return self.rows.setdefault(name, Row(name))


@dataclass
class Story:
    """All runs of a report.

    Attributes
    ----------
    began, ended : float
        Seconds since the epoch.
    error : str
        What the call raised; "" where all went well.
    runs : list of Run
    """

    began: float
    ended: float = 0.0
    error: str = ""
    runs: list[Run] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._of_gangs: dict[str, tuple[Run, Attempt]] = {}
        self._names: dict[str, list[str]] = {}  # of the members, by gang
        self._since: dict[tuple[str, int], tuple[str, float]] = {}  # what members wait for, and since when
        self._started: dict[tuple[str, int], float] = {}  # whose processes are yet to come

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Story:
        """Undo `plain`."""
        runs = []
        for told in plain["runs"]:
            rows = {name: Row.from_plain(row) for name, row in told["rows"].items()}
            curves = {name: [(step, value) for step, value in curve] for name, curve in told["curves"].items()}
            attempts = [Attempt(**each) for each in told["attempts"]]
            runs.append(Run(**{**told, "rows": rows, "curves": curves, "attempts": attempts}))
        return cls(plain["began"], plain["ended"], plain["error"], runs)

    def plain(self) -> dict[str, Any]:
        """As plain data, as fine as a page can show it."""
        rows = sum(len(run.rows) for run in self.runs)
        step = (self.ended - self.began) / max(100, min(FINEST, PIECES // max(1, rows)))
        runs = []
        for run in self.runs:
            coarse = {name: row.coarsened(step) for name, row in run.rows.items()}
            runs.append(dataclasses.asdict(dataclasses.replace(run, rows=coarse)))
        return {"began": self.began, "ended": self.ended, "error": self.error, "runs": runs}

    # Events

    def add(self, event: Event) -> None:
        """Hear of one."""
        if isinstance(event, Planned):
            self._plan(event)
        elif event.gang in self._of_gangs:
            run, attempt = self._of_gangs[event.gang]
            if event.rank < 0 and not isinstance(event, Lost):
                self._of_client(run, attempt, event)
            else:
                self._of_member(run, attempt, event)

    def _plan(self, event: Planned) -> None:
        run = next((run for run in self.runs if run.id == event.run), None)
        if run is None:
            run = Run(event.run, event.label)
            self.runs.append(run)
        run.params, run.versions = event.params, event.versions
        attempt = Attempt(event.gang, event.attempt, event.time)
        self._of_gangs[event.gang] = run, attempt
        self._names[event.gang] = event.names
        before = run.attempts[-1] if run.attempts else None
        again = before is not None and bool(before.error) and event.attempt > before.number
        run.attempts.append(attempt)
        for rank, name in enumerate(event.names):
            run.row(name)
            self._since[event.gang, rank] = ("restart", before.ended) if before and again else ("wait", event.time)

    def _of_client(self, run: Run, attempt: Attempt, event: Event) -> None:
        match event:
            case Placed():
                lie = {"ranks": event.ranks, "rows": event.rows, "nbytes": event.nbytes}
                attempt.sets[event.name] = lie
            case Span(kind="wait"):
                attempt.granted = event.time
                for rank in self._waiting(event.gang, "wait"):
                    self._over(run, event, rank)
                    self._since[event.gang, rank] = "start", event.time
            case Ended():
                attempt.ended, attempt.error, attempt.cause = event.time, event.error, event.cause
                for rank in self._waiting(event.gang, "wait", "start", "restart"):
                    self._over(run, event, rank)
            case Log():
                run.log = [*run.log[-99:], event.text]

    def _waiting(self, gang: str, *kinds: str) -> list[int]:
        return [rank for (name, rank), (kind, _) in self._since.items() if name == gang and kind in kinds]

    def _over(self, run: Run, event: Event, rank: int) -> str:
        """What a member has waited for is there; what that was."""
        kind, since = self._since.pop((event.gang, rank), ("", event.time))
        if kind and event.time > since:
            row = run.row(self._names[event.gang][rank])
            row.add(Piece(since, event.time, {kind: event.time - since}, attempt=event.attempt))
        return kind

    def _of_member(self, run: Run, attempt: Attempt, event: Event) -> None:
        row, number = run.row(self._names[event.gang][event.rank]), attempt.number
        key = event.gang, event.rank
        match event:
            case Started() | Up():
                if isinstance(event, Up) and (since := self._started.pop(key, 0.0)):
                    self._since.setdefault(key, ("start", since))
                if self._over(run, event, event.rank) == "restart":
                    row.marks.append(Mark(event.time, "restarted", f"{row.name} is there again"))
                if isinstance(event, Started):
                    row.workers[str(number)], self._started[key] = event.worker, event.time
            case Down() | Lost():
                self._since[event.gang, event.rank] = "restart", event.time
                why = getattr(event, "reason", "") or f"lost with its worker {getattr(event, 'worker', '')}"
                row.marks.append(Mark(event.time, "lost", f"{row.name}: {why}"))
            case Failed():
                row.marks.append(Mark(event.time, "failed" if event.cause else "ended", f"{row.name}: {event.error}"))
            case Finished():
                row.marks.append(Mark(event.time, "finished", f"{row.name} has finished"))
            case Span():
                row.add(Piece(event.time - event.seconds, event.time, {event.kind: event.seconds}, attempt=number))
            case Spent():
                start = event.time - event.window
                if event.seconds:
                    row.add(Piece(start, event.time, dict(event.seconds), number))
                if event.rows or event.nbytes:
                    row.feed(start, event.time, event.rows, event.nbytes)
            case Memory():
                row.limit = event.limit
                row.memory = _thinned([*row.memory, (event.time, event.nbytes)])
            case Progress():
                run.done[event.unit] = event.done
            case Metrics():
                self._curve(run, event.step, event.values)
            case Reported():
                job = "…".join((event.key.partition("-")[0], event.key[-6:]))
                self._curve(run, event.step, {f"{job}-{name}": value for name, value in event.values.items()})
            case Offered() | Ran():
                self._of_device(run, event)

    def _of_device(self, run: Run, event: Offered | Ran) -> None:
        if isinstance(event, Offered):
            for device in event.devices:
                row = run.row(f"{device} on {event.worker}")
                row.device, row.workers["1"] = True, event.worker
            return
        run.done["job"] = run.done.get("job", 0) + 1
        worker = run.row(self._names[event.gang][event.rank]).workers.get("1", "")
        start, text = event.time - event.seconds, f"{event.key}{f': {event.error}' if event.error else ''}"
        for device in event.devices:
            row, lane = run.row(f"{device} on {worker}"), 1
            while row.pieces and row.pieces[-1].end > start + HANDOVER:  # jobs that share it
                lane += 1
                row = run.row(f"{device} on {worker}, {lane}")
                row.device = True
            row.add(Piece(start, event.time, {"compute": event.seconds}, text=text))
            if event.error:
                row.marks.append(Mark(event.time, "failed", text))

    def _curve(self, run: Run, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if name not in run.curves and len(run.curves) >= SERIES:
                continue
            curve = run.curves.setdefault(name, [])
            while curve and curve[-1][0] >= step:  # done again, after a loss
                curve.pop()
            if math.isfinite(value):
                curve.append((step, value))
                run.curves[name] = _thinned(curve)


def _thinned(values: list[Any]) -> list[Any]:
    """Every second value, where there are too many."""
    return values if len(values) <= MOST else [*values[:-1:2], values[-1]]
