"""Built matrices that stay on the workers for the next training.

A rank leaves what it has built under a token. The client has a task take it, whose
result is the matrix: Dask counts it as it counts other data, drops it when the
client lets go of the future, and where it would write it to disk because memory is
short, there is nothing to write, and the memory is free.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import xgboost as xgb
from distributed import Client, Future, Worker, get_worker

from dask_bridges.member import Member
from dask_bridges.task import worker_of

__all__ = ["Built", "Resident", "Residents", "disown", "lent", "offered"]

#: Seconds for which a member that has ended leaves what it has built to the client.
LEFT_FOR = 60.0

#: Seconds for which the client waits until it is taken.
TAKEN_WITHIN = 10.0


@dataclass(frozen=True)
class Built:
    """A rank's part of a matrix.

    Attributes
    ----------
    matrix : xgboost.QuantileDMatrix
    prototype
        A block of no rows of the kind it was built from, None where there was no block.
    edges : dict or None
        Of the bins, see `matrices.common_cuts`; None where XGBoost found the cuts, or has them from elsewhere.
    """

    matrix: Any
    prototype: Any
    edges: dict[int, Any] | None = None
    _used: threading.Lock = field(default_factory=threading.Lock)

    @property
    def nbytes(self) -> int:
        """About what it takes of memory: a bin's number for each entry, twice, and a few numbers a row."""
        if isinstance(self.matrix, xgb.ExtMemQuantileDMatrix):
            return 16 * int(self.matrix.num_row())
        bins = self.matrix.get_quantile_cut()[0]
        each = 1 if not len(bins) or max(bins[1:] - bins[:-1]) <= 256 else 2
        return 2 * each * int(self.matrix.num_nonmissing()) + 16 * int(self.matrix.num_row())

    def checksum(self) -> int:
        """Tells its cuts from others; never 0."""
        pointers, values = self.matrix.get_quantile_cut()
        return 1 + zlib.crc32(values.tobytes(), zlib.crc32(pointers.tobytes()))


class Resident:
    """What a worker keeps among its data. Where it is sent or written anywhere, nothing of it comes back."""

    def __init__(self, built: Built | None = None) -> None:
        self.built = built

    def __reduce__(self) -> tuple[type[Resident], tuple[()]]:
        return Resident, ()

    def __sizeof__(self) -> int:
        return object.__sizeof__(self) if self.built is None else self.built.nbytes


# On the workers

_offered: dict[tuple[str, str], Built] = {}  # by worker and token


def offered(member: Member, token: str, built: Built) -> None:
    """Leave what was built to the client, for a while."""
    worker = worker_of(member)
    key = (worker.address, token)
    _offered[key] = built
    loop = worker.loop
    loop.add_callback(loop.call_later, LEFT_FOR, _offered.pop, key, None)


@contextlib.contextmanager
def lent(member: Member, keys: Sequence[str | None]) -> Iterator[list[Built | None]]:
    """What is there under these keys, for one training at a time; None where nothing is left, or another has it."""
    found: list[Built | None] = []
    with contextlib.ExitStack() as stack:
        for key in keys:
            held = None if key is None else worker_of(member).data.get(key)
            built = held.built if isinstance(held, Resident) else None
            if built is not None and built._used.acquire(blocking=False):
                stack.callback(built._used.release)
                found.append(built)
            else:
                found.append(None)
        try:
            yield found
        finally:
            found.clear()  # an error that is kept would keep it


def _take(token: str) -> Resident:
    worker: Worker = get_worker()
    return Resident(_offered.pop((worker.address, token), None))


def _disown(tokens: Sequence[str], dask_worker: Worker) -> None:
    for token in tokens:
        _offered.pop((dask_worker.address, token), None)


# On the client


async def disown(client: Client, workers: Sequence[str], tokens: Sequence[str]) -> None:
    """Have workers forget what was left under these tokens, which nobody takes."""
    if tokens and client.status == "running":
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(TAKEN_WITHIN):
                await client.run(_disown, tokens, workers=list(workers), on_error="ignore")


async def _until_taken(future: Future) -> None:
    with contextlib.suppress(Exception):
        await future.exception()


class Residents:
    """What workers keep of one matrix, by worker, with what it was built from and how."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[str, Future]] = {}

    def key(self, worker: str, how: str) -> str | None:
        """The key of what the worker keeps, if it was built like this."""
        built_how, future = self._kept.get(worker, ("", None))
        if future is None or built_how != how or future.status not in ("pending", "finished"):
            return None
        key: str = future.key
        return key

    def adopt(self, client: Client, worker: str, how: str, token: str) -> None:
        """Have a worker keep what was left under a token, and forget what it kept before."""
        key = f"dask-bridges-matrix-{token}-{zlib.crc32(worker.encode()):08x}"
        # Where the worker is gone the task finds nothing elsewhere, and does not wait for it.
        future = client.submit(_take, token, key=key, workers=[worker], allow_other_workers=True, priority=50)
        client.loop.add_callback(
            _until_taken, future
        )  # let go of before, the task would not run, and what was left stay
        self._kept[worker] = (how, future)

    def forget(self, worker: str) -> None:
        """Let go of what a worker keeps."""
        self._kept.pop(worker, None)

    def keep_only(self, hows: Mapping[str, str]) -> None:
        """Let go of all that is not on these workers, or was not built like this."""
        self._kept = {worker: kept for worker, kept in self._kept.items() if worker in hows and kept[0] == hows[worker]}

    async def taken(self) -> None:
        """Wait until the workers have taken what they are to keep."""
        if pending := [future for _, future in self._kept.values() if future.status == "pending"]:
            await asyncio.gather(*(future.exception() for future in pending), return_exceptions=True)
