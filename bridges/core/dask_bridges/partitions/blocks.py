"""What happens to partitions on the workers: packed together, described, taken from the store."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dask.sizeof import sizeof
from distributed import Worker

from dask_bridges.errors import DataError

__all__ = ["Inspect", "Part", "PartInfo", "describe", "pack", "rows_of", "size_of", "take"]

#: The blocks of one partition, by the role of their collection ("X", "y", "weight").
Part = dict[str, Any]
#: An adapter's look at a part, on the worker that holds it: anything small.
Inspect = Callable[[Part], Any]


@dataclass(frozen=True)
class PartInfo:
    """What the client knows of a partition.

    Attributes
    ----------
    rows : dict of str to int
        Rows of each collection's block.
    nbytes : int
        Size of all blocks together, in bytes.
    extra : object
        What the adapter's inspect function found.
    """

    rows: dict[str, int]
    nbytes: int
    extra: Any = None


def rows_of(block: Any) -> int:
    """Number of rows of a block (numpy, scipy.sparse, pandas)."""
    return int(block.shape[0]) if hasattr(block, "shape") else len(block)


def size_of(block: Any) -> int:
    """Bytes of a block; of a sparse one those of its values and indices."""
    if hasattr(block, "indptr"):
        return int(block.data.nbytes + block.indices.nbytes + block.indptr.nbytes)
    return int(sizeof(block))


def pack(roles: tuple[str, ...], *blocks: Any) -> Part:
    """Bring the blocks of one partition together on one worker; nothing is copied."""
    return dict(zip(roles, blocks))


def join(order: tuple[str, ...], with_frames: bool, arrays: tuple[str, ...], *blocks: Any) -> Part:
    """One part of the frames' part, if there is one, and of the arrays' blocks, in the given order."""
    part = {**(blocks[0] if with_frames else {}), **pack(arrays, *blocks[with_frames:])}
    return {role: part[role] for role in order}


def describe(inspect: Inspect | None, part: Part) -> PartInfo:
    """Rows, size and whatever `inspect` finds."""
    rows = {role: rows_of(block) for role, block in part.items()}
    extra = inspect(part) if inspect is not None and len(set(rows.values())) == 1 else None
    return PartInfo(rows, sum(size_of(block) for block in part.values()), extra)


def cut(start: int | None, stop: int | None, part: Part) -> Part:
    """Rows `start` to `stop` of every block; with neither, the part itself, where it is wanted."""
    if start is None and stop is None:
        return part
    return {
        role: block.iloc[start:stop] if hasattr(block, "iloc") else block[start:stop] for role, block in part.items()
    }


def take(worker: Worker, key: Any, *, aside: bool = False) -> Part:
    """The part of `key` from the worker's own store, read back from disk if it was spilled.

    Parameters
    ----------
    worker : Worker
    key
    aside : bool
        Have the worker keep it on disk and not in memory, as who reads more than that holds does.

    Raises
    ------
    DataError
        If it is not there any more.
    """
    try:
        part: Part = _aside(worker.data, key) if aside else worker.data[key]
    except KeyError:
        raise DataError(
            f"partition {key} is no longer on worker {worker.address}: was the cluster rebalanced "
            "or the worker retired during the training? Train again."
        ) from None
    return part


def _aside(data: Any, key: Any) -> Any:
    """A value of a worker's store, which is on disk afterwards where the store has one."""
    on_disk = getattr(data, "slow", {})
    with contextlib.suppress(KeyError):
        return on_disk[key]  # other than ``data[key]``, which would move it back and others out
    value = data[key]
    if hasattr(data, "slow"):
        with contextlib.suppress(Exception):  # the disk is full: it stays
            data.fast.evict(key)
    return value
