"""What a child process writes to its standard output and standard error, line by line, on its way to people."""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

__all__ = ["Output"]

#: Seconds between two looks, so that many lines travel as one message; and how much is read at a time.
PAUSE, CHUNK = 0.05, 64 * 1024
#: Lines that are kept for an error message.
KEPT = 20


class Output:
    """Reads a child's output as it comes.

    A child that writes faster than its lines can be passed on waits.

    Attributes
    ----------
    deliver : callable
        ``deliver(stream, text)`` gets one or several whole lines of "stdout" or "stderr", from a thread;
        set it before the child has anything to say.
    theirs : tuple of int
        The descriptors that the child writes to, standard output first; closed by `started`.
    """

    def __init__(self) -> None:
        self.deliver: Callable[[str, str], None] = lambda stream, text: None
        self._streams: dict[int, str] = {}
        self._rests: dict[int, bytes] = {}
        self._last: collections.deque[str] = collections.deque(maxlen=KEPT)
        theirs = []
        for stream in ("stdout", "stderr"):
            ours, their = os.pipe()
            self._streams[ours] = stream
            self._rests[ours] = b""
            theirs.append(their)
        self.theirs = (theirs[0], theirs[1])
        self._ended = threading.Event()
        self._wakeup, self._wake = os.pipe()
        self._reader = threading.Thread(target=self._read, name="child-output", daemon=True)

    def started(self) -> None:
        """The child has its ends: begin to read."""
        for fd in self.theirs:
            os.close(fd)
        self._reader.start()

    def end(self) -> None:
        """The child has ended: pass on what is left."""
        if not self._ended.is_set():
            self._ended.set()
            os.close(self._wake)
        self._reader.join()

    @property
    def last_lines(self) -> str:
        """The newest lines of both streams."""
        return "\n".join(self._last)

    def _read(self) -> None:
        open_fds = {self._wakeup, *self._streams}
        while open_fds != {self._wakeup}:
            ended = self._ended.is_set()
            ready: Sequence[Any] = wait(list(open_fds), 0 if ended else None)
            if ended and ready == [self._wakeup]:  # what the child has started may hold its output open
                break
            for fd in ready:
                if fd != self._wakeup and not self._take(fd):
                    open_fds.discard(fd)
            self._ended.wait(PAUSE)
        for fd in self._streams:
            self._pass_on(fd, self._rests[fd])
        self._ended.wait()
        for fd in (self._wakeup, *self._streams):
            os.close(fd)

    def _take(self, fd: int) -> bool:
        """Read once and pass whole lines on; whether there may be more."""
        data = os.read(fd, CHUNK)
        lines, _, rest = (self._rests[fd] + data).rpartition(b"\n")
        if len(rest) > CHUNK:  # a line without an end
            lines, rest = rest, b""
        self._rests[fd] = rest
        self._pass_on(fd, lines)
        return bool(data)

    def _pass_on(self, fd: int, data: bytes) -> None:
        # A progress bar writes over its line: what it says last stays.
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in data.decode(errors="replace").split("\n")]
        lines = [line for line in lines if line.strip()]
        if lines:
            self._last.extend(lines)
            self.deliver(self._streams[fd], "\n".join(lines))
