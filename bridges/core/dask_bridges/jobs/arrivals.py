"""The order in which jobs that a worker has started come to ask for their devices."""

from __future__ import annotations

import threading

__all__ = ["Arrivals"]


class Arrivals:
    """Jobs that Dask has started and that have not asked for devices: they do in that order, however threads run."""

    def __init__(self) -> None:
        self._coming: dict[str, None] = {}
        self._changed = threading.Condition()
        self._closed = False

    def expect(self, key: str) -> None:
        """Dask starts a job."""
        with self._changed:
            self._coming[key] = None

    def wait_for_those_before(self, key: str) -> None:
        """Return once all that were started earlier have asked, or it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or key not in self._coming or key == next(iter(self._coming)))

    def over(self, key: str) -> None:
        """A job has asked, or will not."""
        with self._changed:
            if key in self._coming:
                del self._coming[key]
                self._changed.notify_all()

    def close(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
