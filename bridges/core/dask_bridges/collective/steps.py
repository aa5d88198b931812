"""Who sends what to whom: each operation as views that are ready to be sent, and views that are to be filled.

Filling one may make more ready. A rank sends its own part first, and then passes on
what has come, so what it sends is always what it received before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

__all__ = ["Array", "Steps", "broadcasting", "bytes_of", "circulating", "reducing"]

Array = np.ndarray[Any, Any]
Steps = tuple[deque[memoryview], Iterator[memoryview]]

#: Bytes that are added, and passed on, at a time: they stay in a core's cache.
PIECE = 1 << 18


def bytes_of(flat: Array) -> memoryview:
    """The memory of a 1-D array."""
    return memoryview(flat.view("uint8"))


def _pieces(flat: Array) -> Iterator[Array]:
    length = PIECE // flat.itemsize
    return (flat[start : start + length] for start in range(0, flat.size, length))


def reducing(rank: int, size: int, flat: Array) -> Steps:
    """Sum `flat`, of at least `size` elements, over all ranks: reduce-scatter, then all-gather.

    Chunk i is summed from rank i on, once round, so its sum exists once and is then copied.
    """
    bounds = [flat.size * i // size for i in range(size + 1)]
    chunks = [flat[start:end] for start, end in pairwise(bounds)]
    ready = deque(bytes_of(piece) for piece in _pieces(chunks[rank]))

    def wants() -> Iterator[memoryview]:
        scratch = np.empty(PIECE // flat.itemsize, flat.dtype)
        for step in range(1, size):
            for piece in _pieces(chunks[(rank - step) % size]):
                theirs = scratch[: piece.size]
                yield bytes_of(theirs)
                piece += theirs
                ready.append(bytes_of(piece))
        for step in range(size - 1):
            for piece in _pieces(chunks[(rank - step) % size]):
                yield bytes_of(piece)
                if step < size - 2:
                    ready.append(bytes_of(piece))

    return ready, wants()


def circulating(rank: int, size: int, blocks: Sequence[memoryview]) -> Steps:
    """Fill the blocks of all other ranks; any may be empty."""
    ready = deque([blocks[rank]] if len(blocks[rank]) else [])

    def wants() -> Iterator[memoryview]:
        for step in range(1, size):
            if len(block := blocks[(rank - step) % size]):
                yield block
                if step < size - 1:
                    ready.append(block)

    return ready, wants()


def broadcasting(rank: int, size: int, flat: Array, root: int) -> Steps:
    """Fill `flat` with that of `root`."""
    pieces = [bytes_of(piece) for piece in _pieces(flat)]
    ready = deque(pieces if rank == root else [])

    def wants() -> Iterator[memoryview]:
        for piece in [] if rank == root else pieces:
            yield piece
            if (rank + 1) % size != root:
                ready.append(piece)

    return ready, wants()
