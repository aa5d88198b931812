"""Values that a worker holds on their way into a child process: pickled, with what is large in the spool."""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from distributed.protocol.pickle import dumps

from dask_bridges.processes.spool import Spool

__all__ = ["Inputs"]

#: Bytes from which a part of the inputs goes to the spool, and not through the pipe.
LARGE = 64 * 1024


@dataclass(frozen=True)
class Inputs:
    """Values on their way into a child process.

    Attributes
    ----------
    pickled : bytes
    parts : tuple
        Their buffers in order: bytes, or None for those in the spool.
    feed : str
        Where these are, as ``<number of the buffer>``; empty without any.
    """

    pickled: bytes = b""
    parts: tuple[bytes | None, ...] = ()
    feed: str = ""

    @classmethod
    def of(cls, values: Sequence[Any], spool: Spool, feed: str) -> Inputs:
        """Inputs whose large parts are in a new feed of that name; without any, there is no such feed."""
        buffers: list[pickle.PickleBuffer] = []
        pickled = bytes(dumps(tuple(values), buffer_callback=buffers.append))
        raw = [buffer.raw() for buffer in buffers]
        large = {number: part for number, part in enumerate(raw) if part.nbytes >= LARGE}
        if large:
            with spool.writer(feed) as writer:
                for number, part in large.items():
                    writer.array(str(number), np.frombuffer(part, np.uint8))
        parts = tuple(None if number in large else bytes(part) for number, part in enumerate(raw))
        return cls(pickled, parts, feed if large else "")

    def open(self, spool: str) -> tuple[Any, ...]:
        """The values; large arrays are mapped, and can be written to without anybody seeing it."""
        if not self.pickled:
            return ()
        folder = Path(spool, self.feed)
        buffers = [_mapped(folder / str(n)) if part is None else part for n, part in enumerate(self.parts)]
        return tuple(pickle.loads(self.pickled, buffers=buffers))


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size, access=mmap.ACCESS_COPY)
