"""Keep every worker busy with scheduled functions of several steps each, and hand back results as they come."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dask_bridges.errors import DataError
from dask_tf.training.coordinator import Coordinator
from dask_tf.training.steps import name

__all__ = ["Done", "Pace", "Pump"]

#: Functions a worker has: one running, one to go on with.
AHEAD = 2
#: Seconds a function should take: long beside the 2.5 ms it costs to send, short for whoever waits to stop.
TARGET = 0.25
#: Seconds to wait for what is under way after an error.
DRAINED = 30.0


@dataclass(frozen=True)
class Done:
    """One scheduled function has come back: `steps` steps are over, with `values` after the last."""

    steps: int
    values: Any


class Pace:
    """How many steps to put in a scheduled function.

    Parameters
    ----------
    workers : int
    total : int
        Steps until a barrier (an epoch's end): near it the workers should not wait for each other for long.
    fixed : int, optional
        Always so many.

    Examples
    --------
    >>> pace = Pace(workers=2, total=1000)
    >>> pace.size()
    1
    >>> pace.took(steps=1, now=0.0); pace.took(steps=1, now=0.01); pace.size()
    4
    """

    def __init__(self, workers: int, total: int, fixed: int | None = None) -> None:
        self.workers = workers
        self.fixed = fixed
        self.limit = max(1, total // (8 * workers))
        self._size = 1
        self._began: float | None = None
        self._steps = 0

    def size(self) -> int:
        """Steps for the next function."""
        return self.fixed or min(self._size, self.limit)

    def took(self, steps: int, now: float | None = None) -> None:
        """Learn from a function that came back; the first one only starts the clock, as it was traced and sent."""
        now = time.monotonic() if now is None else now
        if self._began is None:
            self._began = now
            return
        self._steps += steps
        rate = self._steps / max(now - self._began, 1e-6)
        self._size = max(1, min(int(rate / self.workers * TARGET), 4 * self._size))


class Pump:
    """Schedules one function again and again.

    Parameters
    ----------
    coordinator : Coordinator
    function : tf.function
        See :class:`~dask_tf.training.steps.ManySteps`.
    iterator : PerWorkerValues
        From :meth:`Coordinator.iterate`.
    """

    def __init__(self, coordinator: Coordinator, function: Any, iterator: Any) -> None:
        self.coordinator = coordinator
        self.function = function
        self.iterator = iterator
        self.window = AHEAD * coordinator.workers
        self._sent: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._came: queue.SimpleQueue[tuple[int, Any, Exception | None]] = queue.SimpleQueue()
        self._over = threading.Event()
        self._under_way = 0
        self._empty: set[float] = set()  # workers whose last answer was that they have no data
        self._names, _ = coordinator.iterate(name)
        for n in range(self.window):
            threading.Thread(target=self._wait, name=f"dask-tf-wait-{n}", daemon=True).start()

    def run(self, steps: int, pace: Pace, stop: Callable[[], bool]) -> Iterator[Done]:
        """Have `steps` steps done in all, or fewer where `stop` says so; yields once nothing more is under way.

        Raises
        ------
        DataError
            The dataset is empty in every worker.
        ServerLost, WorkersLost
            See :class:`Coordinator`. Whatever else a step raised is raised as it is.
        """
        left, resting = steps, 0
        heard = time.monotonic()
        while left > 0 or self._under_way:
            if left > 0 and stop():
                left = 0
            # A worker without data answers at once, and would be asked again and again: for each such answer
            # one function less is under way, until one with data comes back.
            while left > 0 and self._under_way + resting < self.window:
                size = min(pace.size(), left)
                self._send(size)
                left -= size
            if not self._under_way:
                if left > 0:
                    self._ask_again(time.monotonic() - heard)
                    resting = self.window - 1
                continue
            size, done = self._next()
            if done.steps < size:
                left += size - done.steps if not stop() else 0
            resting = resting + 1 if done.steps == 0 else max(0, resting - 1)
            if done.steps:
                heard = time.monotonic()
                pace.took(done.steps)
                yield done

    def _ask_again(self, silent: float) -> None:
        """All answers were empty: another worker may not have come to answer yet."""
        workers = self.coordinator.workers
        if len(self._empty) >= workers or silent > self.coordinator.timeout:
            answers = "every worker" if len(self._empty) >= workers else "every worker that answers"
            raise DataError(f"the dataset is empty in {answers}: no step could be done")
        self._over.wait(0.05)

    def drain(self) -> None:
        """Wait, after an error, until no worker does anything more; further errors are not raised."""
        deadline = time.monotonic() + DRAINED
        while time.monotonic() < deadline:
            try:
                if self.coordinator.cluster.done():
                    return
            except Exception:
                continue  # TensorFlow tells each error once
            self._over.wait(0.02)

    def close(self) -> None:
        """End the threads that wait for results."""
        self._over.set()
        for _ in range(self.window):
            self._sent.put(None)

    def _send(self, size: int) -> None:
        import tensorflow as tf

        try:
            value = self.coordinator.cluster.schedule(
                self.function, args=(self.iterator, self._names, tf.constant(size, tf.int32))
            )
        except Exception as error:
            raise self.coordinator.cause(error) from error
        self._under_way += 1
        self._sent.put((size, value))

    def _next(self) -> tuple[int, Done]:
        began = time.monotonic()
        while True:
            try:
                size, value, error = self._came.get(timeout=0.25)
            except queue.Empty:
                self.coordinator.check()
                self.coordinator.check_workers(time.monotonic() - began)
                continue
            self._under_way -= 1
            if error is not None:
                self.coordinator.check()
                raise self.coordinator.cause(error) from error
            (steps, worker), values = value
            (self._empty.discard if steps else self._empty.add)(float(worker))
            return size, Done(int(steps), values)

    def _wait(self) -> None:
        """In a thread of its own: TensorFlow tells nobody that a result is there."""
        import tensorflow as tf

        again = (tf.errors.UnavailableError, tf.errors.AbortedError)
        while (sent := self._sent.get()) is not None:
            size, value = sent
            while not self._over.is_set():
                try:
                    self._came.put((size, value.fetch(), None))
                except again:  # its worker went while the result was copied: it will be done again elsewhere
                    self._over.wait(0.05)
                    continue
                except Exception as error:
                    self._came.put((size, None, error))
                break
