"""A deadlock of CPython that Dask's profiler and many short threads bring about (python/cpython#106883).

`sys._current_frames`, which a Dask worker calls a hundred times a second, holds the
lock of all threads. Where the garbage collector runs in it, and that a callback, a
thread that ends at this moment waits for the lock while it holds the interpreter's:
the worker stands still for ever. Retired by a Python whose `_current_frames` switches
the collector off itself.
"""

from __future__ import annotations

import functools
import gc
import sys
from types import FrameType

__all__ = ["guard_current_frames"]


class _Frames(dict[int, FrameType | None]):
    """Also of threads that have ended since their numbers were noted: Dask notes them first, and a job's end soon."""

    def __missing__(self, ident: int) -> None:
        return None


@functools.cache
def guard_current_frames() -> None:
    """Have the collector wait while this process looks at its frames; once a process."""
    real = sys._current_frames

    def current_frames() -> dict[int, FrameType | None]:
        collects = gc.isenabled()
        gc.disable()
        try:
            return _Frames(real())
        finally:
            if collects:
                gc.enable()

    vars(sys)["_current_frames"] = current_frames
