"""What a member's time goes into where that is in thousands of pieces: added up, and told a few times a second."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dask_bridges.events import Spent

__all__ = ["Tally", "slept"]

#: Seconds between two tellings, and the share of the time since the beginning: a long run is told of less often.
PERIOD, SHARE = 0.5, 1 / 400


class Tally:
    """Adds up seconds, rows and bytes of a member; made with it, as `Member.tally`.

    It does nothing where nobody wants to know. Times are measured by the member's own thread; `fed` may be called
    from others.

    Parameters
    ----------
    emit : callable
        As `Member.emit`.
    wanted : bool

    Examples
    --------
    >>> told = []
    >>> tally = Tally(lambda kind, **fields: told.append(fields), True)
    >>> tally.begin()
    >>> with tally.timed("communicate"):
    ...     pass
    >>> tally.fed(1000, 8000)
    >>> tally.tell("compute", now=True)
    >>> sorted(told[0]["seconds"]), told[0]["rows"]
    (['communicate', 'compute'], 1000)
    """

    def __init__(self, emit: Callable[..., Any], wanted: bool) -> None:
        self.wanted = wanted
        self._emit = emit
        self._lock = threading.Lock()
        self._first = self._last = time.perf_counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._rows = self._nbytes = 0

    def begin(self) -> None:
        """What was before is nobody's; the next window begins now."""
        with self._lock:
            self._last = time.perf_counter()
            self._seconds.clear()

    def add(self, kind: str, seconds: float) -> None:
        """So many seconds of the present window went into `kind`."""
        if self.wanted:
            self._seconds[kind] += seconds

    def fed(self, rows: int, nbytes: int) -> None:
        """So many rows and bytes were handed to the framework."""
        if self.wanted:
            with self._lock:
                self._rows += int(rows)
                self._nbytes += int(nbytes)

    @contextlib.contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Add up the time of what happens inside, but for what is added there to other kinds."""
        if not self.wanted:
            yield
            return
        start, before = time.perf_counter(), sum(self._seconds.values())
        try:
            yield
        finally:
            inside = sum(self._seconds.values()) - before  # less where a window has ended inside
            self.add(kind, time.perf_counter() - start - max(0.0, inside))

    @property
    def due(self) -> bool:
        """Whether it is time to tell."""
        now = time.perf_counter()
        return self.wanted and now - self._last >= max(PERIOD, SHARE * (now - self._first))

    def tell(self, rest: str, *, now: bool = False) -> None:
        """End the window, if it is time or `now`; what was not added to a kind went into `rest`, if that is named."""
        if not (self.due or (now and self.wanted)):
            return
        with self._lock:
            moment = time.perf_counter()
            window = moment - self._last
            seconds, rows, nbytes = dict(self._seconds), self._rows, self._nbytes
            self._seconds.clear()
            self._rows = self._nbytes = 0
            self._last = moment
        if rest:
            seconds[rest] = seconds.get(rest, 0.0) + max(0.0, window - sum(seconds.values()))
        self._emit(Spent, window=window, seconds=seconds, rows=rows, nbytes=nbytes)


def slept() -> float:
    """Seconds for which this thread has neither run nor been ready to: it waited for others, or for a device.

    Only differences count. By Linux's account of the thread; elsewhere what is no processor time.
    """
    try:
        ran, ready, _ = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()
    except (OSError, ValueError):
        return time.perf_counter() - time.thread_time()
    return time.perf_counter() - (int(ran) + int(ready)) / 1e9
