"""Who asks for an object's bytes: Dask, and with which serializers.

Neither pickle nor Dask tells a serializer this, so both questions are answered from the call stack. Where the stack
is not as we know it, the answers are those for a plain cluster: not Dask, and everything is allowed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

__all__ = ["asked_by_dask", "pickle_allowed"]


def _callers(limit: int) -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and limit > 0:
        yield frame
        frame, limit = frame.f_back, limit - 1


def asked_by_dask() -> bool:
    """Whether the pickling under way was begun by Dask, and not by a user's own ``pickle.dumps`` or ``deepcopy``."""
    return any(frame.f_globals.get("__name__") == "distributed.protocol.pickle" for frame in _callers(50))


def pickle_allowed() -> bool:
    """Whether the transfer under way may fall back to pickle (``Client(serializers=["dask"])`` forbids it)."""
    for frame in _callers(8):
        if frame.f_code.co_name == "serialize" and frame.f_globals.get("__name__") == "distributed.protocol.serialize":
            return "pickle" in frame.f_locals.get("serializers", ("pickle",))
    return True
