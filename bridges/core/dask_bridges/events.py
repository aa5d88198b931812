"""What members tell while they run: frozen event classes, and the stream that fans them out.

One Dask event topic a gang carries them. The scheduler keeps the last 1000 of a
topic, and a client can hold one handler a topic; `EventStream` is that handler
for its gang, keeps the whole run, and replays it to listeners that attach late.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

__all__ = [
    "Down",
    "Ended",
    "Event",
    "EventStream",
    "Failed",
    "FinishAsked",
    "Finished",
    "Listener",
    "Log",
    "Lost",
    "Memory",
    "Metrics",
    "Offered",
    "Placed",
    "Planned",
    "Progress",
    "Ran",
    "Reported",
    "Span",
    "Spent",
    "Started",
    "Up",
    "begun",
    "from_message",
    "topic_of",
]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """What all events have in common.

    Attributes
    ----------
    gang : str
        Id of the gang.
    attempt : int
        Which attempt of the gang, from 1.
    rank : int
        Rank of the member that speaks; -1 for the client and the scheduler.
    time : float
        Seconds since the epoch, by the clock of the process that speaks.
    """

    gang: str
    attempt: int = 1
    rank: int = -1
    time: float = dataclasses.field(default_factory=time.time)

    kinds: ClassVar[dict[str, type[Event]]] = {}

    def __init_subclass__(cls) -> None:
        Event.kinds[cls.__name__] = cls

    def to_message(self) -> dict[str, Any]:
        """The event as plain data, which Dask's event topics can carry."""
        return {"event": type(self).__name__, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Started(Event):
    """The member runs; all its peers have started too."""

    worker: str
    host: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """`done` of `total` units (rounds, epochs, steps) are over; `total` 0 means unknown."""

    done: int
    total: int = 0
    unit: str = "round"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metrics(Event):
    """The newest metric values, such as ``{"valid-auc": 0.91}``, after step `step` (from 0)."""

    step: int
    values: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span(Event):
    """`seconds` went into `kind`: wait, receive, build, compute, communicate or checkpoint."""

    kind: str
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spent(Event):
    """What the last `window` seconds went into, where it was in many pieces; told where a listener wants `detail`.

    Attributes
    ----------
    window : float
    seconds : dict of str to float
        By kind, see `Span`.
    rows, nbytes : int
        What was fed to the framework in that time.
    """

    window: float
    seconds: dict[str, float]
    rows: int = 0
    nbytes: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory(Event):
    """What the member's worker and the member's processes hold in memory; told where a listener wants `detail`."""

    nbytes: int
    limit: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log(Event):
    """Lines of text for people; `stream` is "stdout" or "stderr" where a child process wrote them."""

    text: str
    level: int = logging.INFO
    stream: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished(Event):
    """The member's function returned."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishAsked(Event):
    """Somebody has asked the members to end after the round they are at, with a result."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failed(Event):
    """The member's function raised. `cause` is False where a peer's failure is the likely reason."""

    error: str
    cause: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lost(Event):
    """The scheduler lost the worker of the member that `rank` names, which may be `replaceable`."""

    worker: str
    replaceable: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned(Event):
    """The client asks for a gang.

    Attributes
    ----------
    label : str
        What people call it.
    run : str
        What its attempts have in common: the id of the call that makes them.
    names : list of str
        Of the members, by rank.
    params, versions : dict
        What it was asked to do, and the versions of the packages that do it, as text.
    """

    label: str
    run: str = ""
    names: list[str] = dataclasses.field(default_factory=list)
    params: dict[str, str] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placed(Event):
    """Where the partitions of the set `name` lie: the member that has each, with its rows and bytes (0: unknown)."""

    name: str
    ranks: list[int]
    rows: list[int]
    nbytes: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Up(Event):
    """A member's process is there, the first time or again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Down(Event):
    """A member's process is gone, and starts again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offered(Event):
    """A worker offers its devices to the jobs of a pool."""

    worker: str
    devices: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ran(Event):
    """A job has had its devices for so many seconds, and is over; told where a listener wants `detail`."""

    key: str
    devices: list[str]
    seconds: float
    error: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reported(Event):
    """A job says how far it is: values such as ``{"val_loss": 0.3}`` after step `step`; `key` is its future's."""

    key: str
    step: int
    values: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended(Event):
    """The client's word that the gang is over; where it failed, why, and the rank of the cause (-1: none)."""

    error: str = ""
    cause: int = -1


Listener = Callable[[Event], None]

#: Called with the stream of each gang that this process starts, before it starts.
begun: list[Callable[[EventStream], None]] = []


def topic_of(gang: str) -> str:
    """The Dask event topic of a gang."""
    return f"dask-bridges-{gang}"


def from_message(message: dict[str, Any]) -> Event | None:
    """The event in a message of a topic; None for a kind this version does not know."""
    fields = dict(message)
    kind = Event.kinds.get(fields.pop("event", ""))
    if kind is None:
        return None
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in fields.items() if name in names})


class EventStream:
    """All events of one gang, in the order the client saw them.

    Listeners are called on the client's event loop and must not block; only the
    past is told to a new one where it is attached. One that raises is reported and
    dropped. One that has a true attribute `detail`, and is there before the gang starts, has
    members tell more (`Spent`, `Memory`).

    Parameters
    ----------
    gang : str
        Id of the gang.
    keep : int, optional
        How many events, the newest, are kept at least; all by default.

    Examples
    --------
    >>> stream = EventStream("g")
    >>> stream.publish(Log(gang="g", text="hello"))
    >>> seen = []
    >>> stream.listen(seen.append)      # attached late, sees the whole run
    >>> [event.text for event in seen]
    ['hello']
    """

    def __init__(self, gang: str, keep: int | None = None) -> None:
        self.gang = gang
        self.attempt = 1
        self.detail = False
        self.events: list[Event] = []
        self._keep = keep
        self._listeners: list[Listener] = []
        self._lock = threading.RLock()  # a synchronous client's user attaches from another thread

    def listen(self, listener: Listener) -> None:
        """Call `listener` with every event, those of the past first."""
        with self._lock:
            self.detail = self.detail or bool(getattr(listener, "detail", False))
            for event in list(self.events):
                listener(event)
            self._listeners.append(listener)

    def unlisten(self, listener: Listener) -> None:
        """Stop calling `listener`."""
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)

    def publish(self, event: Event) -> None:
        """Add an event of the present attempt and tell the listeners; stale ones are refused."""
        if event.gang != self.gang or event.attempt != self.attempt:
            return
        with self._lock:
            self.events.append(event)
            if self._keep is not None and len(self.events) > 2 * self._keep:
                del self.events[: -self._keep]
            for listener in list(self._listeners):
                try:
                    listener(event)
                except Exception:
                    logger.exception("[gang %s] a listener failed and is dropped", self.gang)
                    self.unlisten(listener)

    def receive(self, stamped: tuple[float, Any]) -> None:
        """Handler for the gang's topic: `stamped` is Dask's (time, message)."""
        message = stamped[1]
        event = from_message(message) if isinstance(message, dict) else None
        if event is not None:
            self.publish(event)
