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
    "Event",
    "EventStream",
    "Failed",
    "FinishAsked",
    "Finished",
    "Listener",
    "Log",
    "Lost",
    "Metrics",
    "Progress",
    "Span",
    "Started",
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
    """`seconds` went into `kind`: wait, receive, build, compute or communicate."""

    kind: str
    seconds: float


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


Listener = Callable[[Event], None]


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
    dropped.

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
        self.events: list[Event] = []
        self._keep = keep
        self._listeners: list[Listener] = []
        self._lock = threading.RLock()  # a synchronous client's user attaches from another thread

    def listen(self, listener: Listener) -> None:
        """Call `listener` with every event, those of the past first."""
        with self._lock:
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
