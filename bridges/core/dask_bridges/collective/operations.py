"""What the members of a gang do together, in a ring.

Large buffers: reduce-scatter, then all-gather, in pieces that are passed on as
they come (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for
clusters of workstations"). Small ones: every member's buffer goes once round, and
each member adds them up by rank.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dask_bridges import config
from dask_bridges.collective.meeting import meet, peers_of
from dask_bridges.collective.ring import Ring
from dask_bridges.collective.steps import Array, Steps, broadcasting, bytes_of, circulating, reducing
from dask_bridges.errors import BridgeError, MemberStopped
from dask_bridges.member import Member

__all__ = ["Collective"]

#: Bytes up to which a buffer goes round whole.
SMALL = 1 << 16

DTYPES = tuple(np.dtype(name) for name in ("float32", "float64", "int32", "int64", "uint8"))
NAMES = ("all_reduce", "broadcast", "all_gather", "barrier")


@dataclass(frozen=True)
class _Operation:
    """What a member does; all members must do the same."""

    name: str
    number: int
    count: int = 0
    dtype: np.dtype[Any] = DTYPES[-1]
    root: int = 0

    layout = struct.Struct("<BBIQQ")

    def packed(self) -> bytes:
        return self.layout.pack(NAMES.index(self.name), DTYPES.index(self.dtype), self.root, self.number, self.count)

    @classmethod
    def unpacked(cls, data: bytes | bytearray) -> _Operation:
        name, dtype, root, number, count = cls.layout.unpack(data)
        return cls(NAMES[name], number, count, DTYPES[dtype], root)

    def __str__(self) -> str:
        of = f" of {self.count} {self.dtype}" if self.name in ("all_reduce", "broadcast") else ""
        return (
            f"{self.name}{of}{f' from rank {self.root}' if self.name == 'broadcast' else ''} (operation {self.number})"
        )


class Collective:
    """A member's part in what all members of its gang do together.

    All members call the same operations in the same order; who does not is told so, by a
    `BridgeError` at every member. Calls from several threads of a member wait for each other. An
    operation waits for its peers as long as it takes: the gang's watchdog ends a gang with a frozen
    member, and whatever ends the gang ends the operation, with `MemberStopped`.

    The data is plain TCP between the workers. Peers prove who they are when they connect; what they
    send is not encrypted, so a bridge calls `dask_bridges.placement.refuse_plaintext` before it
    starts such a gang.

    Attributes
    ----------
    rank, world_size : int

    Examples
    --------
    >>> def member(member, gradient):                     # doctest: +SKIP
    ...     with Collective.join(member) as collective:
    ...         collective.all_reduce(gradient)
    ...     return gradient
    """

    def __init__(self, member: Member, ring: Ring | None) -> None:
        self.rank = member.rank
        self.world_size = member.world_size
        self._member = member
        self._peers = peers_of(member)
        self._ring = ring
        self._lock = threading.Lock()
        self._broken: BaseException | None = None
        self._closed = False
        member.on_stop(self.close)

    @classmethod
    def join(cls, member: Member, *, timeout: float | None = None, port: int | str | None = None) -> Collective:
        """Connect with the other members, all of which call this.

        Parameters
        ----------
        member : Member
            In a worker's process or in a child of it.
        timeout : float, optional
            Seconds for all to be connected; the start timeout by default.
        port : int or str, optional
            To listen on until the peers are connected: a port, a range "9000:9010", or 0 for any
            free one; by default from the configuration, ``dask-bridges.collective-port``, of the
            process this is called in.

        Raises
        ------
        PlacementError
            If no port of the range is free.
        GangTimeout
            If a peer does not come in time.
        PeerLost
            If a peer has gone meanwhile.
        MemberStopped
            If the gang ends meanwhile.
        """
        if member.world_size == 1:
            return cls(member, None)
        patience = member.spec.deadlines.start_timeout if timeout is None else timeout
        before, after = meet(member, config.get("collective-port", port), patience)
        peers = peers_of(member)
        peer_after = peers[(member.rank + 1) % member.world_size]
        return cls(member, Ring(before, after, peers[member.rank - 1], peer_after))

    def __enter__(self) -> Collective:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # Operations

    def all_reduce(self, buffer: Array) -> None:
        """Sum `buffer` over all members, in place; the results are the same to the bit at all of them.

        Parameters
        ----------
        buffer : ndarray
            Of float32, float64, int32 or int64, C-contiguous, of the same size and type at every member.

        Raises
        ------
        BridgeError
            If the members do not do the same.
        PeerLost
            If a peer has gone.
        MemberStopped
            If the gang ends.
        """
        flat = _flat(buffer)
        with self._turn() as ring:
            if ring is None:
                return
            operation = _Operation("all_reduce", ring.done + 1, flat.size, flat.dtype)
            if flat.nbytes > SMALL:
                self._pump(ring, operation, reducing(self.rank, self.world_size, flat))
            else:
                self._sum_small(ring, operation, flat)

    def broadcast(self, buffer: Array, root: int = 0) -> None:
        """Give every member the buffer of the member `root`, in place.

        Parameters
        ----------
        buffer : ndarray
            As for `all_reduce`.
        root : int
            Its rank.

        Raises
        ------
        BridgeError, PeerLost, MemberStopped
            As `all_reduce` does.
        """
        if not 0 <= root < self.world_size:
            raise ValueError(f"root={root}: the ranks are 0 to {self.world_size - 1}")
        flat = _flat(buffer)
        with self._turn() as ring:
            if ring is None:
                return
            operation = _Operation("broadcast", ring.done + 1, flat.size, flat.dtype, root)
            self._pump(ring, operation, broadcasting(self.rank, self.world_size, flat, root))
            # Or some would be through while others find that they do not agree.
            ring.pump(*self._call_all())

    def all_gather(self, data: bytes) -> list[bytes]:
        """The `data` of all members, by rank, of whatever lengths.

        Raises
        ------
        BridgeError, PeerLost, MemberStopped
            As `all_reduce` does.
        """
        with self._turn() as ring:
            if ring is None:
                return [bytes(data)]
            sizes = np.zeros(self.world_size, "int64")
            sizes[self.rank] = len(data)
            each = [bytes_of(sizes[rank : rank + 1]) for rank in range(self.world_size)]
            self._pump(ring, _Operation("all_gather", ring.done + 1), circulating(self.rank, self.world_size, each))
            blocks = [memoryview(bytearray(int(size))) for size in sizes]
            blocks[self.rank] = memoryview(data)
            ring.pump(*circulating(self.rank, self.world_size, blocks))
            return [bytes(block) for block in blocks]

    def barrier(self) -> None:
        """Wait until all members have called this.

        Raises
        ------
        BridgeError, PeerLost, MemberStopped
            As `all_reduce` does.
        """
        with self._turn() as ring:
            if ring is not None:
                self._pump(ring, _Operation("barrier", ring.done + 1), self._call_all())

    def _sum_small(self, ring: Ring, operation: _Operation, flat: Array) -> None:
        """In one time round; all add up in the same order."""
        if not flat.size:
            self._pump(ring, operation, self._call_all())
            return
        gathered = np.empty((self.world_size, flat.size), flat.dtype)
        gathered[self.rank] = flat
        blocks = [bytes_of(row) for row in gathered]
        self._pump(ring, operation, circulating(self.rank, self.world_size, blocks))
        flat[:] = gathered[0]
        for row in gathered[1:]:
            flat += row

    def _call_all(self) -> Steps:
        """Hear from everybody."""
        return circulating(self.rank, self.world_size, [memoryview(bytearray(1)) for _ in self._peers])

    def _pump(self, ring: Ring, operation: _Operation, steps: Steps) -> None:
        """Do the steps of an operation, once the member before this one has said that it does the same."""
        ready, wants = steps
        ready.appendleft(memoryview(operation.packed()))

        def checked() -> Iterator[memoryview]:
            theirs = bytearray(operation.layout.size)
            yield memoryview(theirs)
            self._compare(operation, _Operation.unpacked(theirs))
            yield from wants

        ring.pump(ready, checked())

    def _compare(self, mine: _Operation, theirs: _Operation) -> None:
        if mine != theirs:
            raise BridgeError(
                f"{self._member.label}: the members do not do the same: {self._peers[self.rank]} is in {mine}, and "
                f"{self._peers[self.rank - 1]} in {theirs}. All must call the same operations, in the same order, "
                "with buffers of the same size and type."
            )

    # One at a time, to the end

    @contextlib.contextmanager
    def _turn(self) -> Iterator[Ring | None]:
        # Gradients overflow; that is no matter of this sum's, and must not end it halfway.
        with self._member.tally.timed("communicate"), self._lock, np.errstate(all="ignore"):
            self._may_go_on()
            try:
                yield self._ring
            except BaseException as error:
                self._break(error)
                raise
            if self._ring is not None:
                self._ring.done += 1

    def _may_go_on(self) -> None:
        if reason := self._member.stopping:
            raise MemberStopped(reason)
        if self._closed:
            raise BridgeError(f"{self._member.label}: the collective of {self._member.name} is closed")
        if self._broken is not None:
            kind = type(self._broken) if isinstance(self._broken, BridgeError) else BridgeError
            raise kind(str(self._broken)) from self._broken
        if self._ring is not None:
            self._ring.check()

    def _break(self, error: BaseException) -> None:
        """After a failure nobody knows what is on its way, so that nothing more can be done together."""
        self._broken = error
        if self._ring is not None:
            if not self._closed:
                self._ring.tell(error)
            self._ring.shut()
        if isinstance(error, BridgeError) and (reason := self._member.stopping):
            raise MemberStopped(reason) from error
        if isinstance(error, BridgeError) and self._closed:
            raise BridgeError(
                f"{self._member.label}: the collective of {self._member.name} was closed meanwhile"
            ) from error

    def close(self) -> None:
        """Leave; an operation that another thread is in ends with an error."""
        self._closed = True
        if self._ring is None:
            return
        if not self._lock.acquire(blocking=False):
            self._ring.shut()
            self._lock.acquire()
        try:
            if self._broken is None:
                self._ring.leave()
            self._ring.close()
        finally:
            self._lock.release()


def _flat(buffer: Array) -> Array:
    """The buffer as one dimension, in place."""
    if not isinstance(buffer, np.ndarray) or buffer.dtype not in DTYPES[:-1]:
        kind = f"array of {buffer.dtype}" if isinstance(buffer, np.ndarray) else type(buffer).__name__
        raise TypeError(f"buffer is a {kind}: pass a NumPy array of float32, float64, int32 or int64")
    if not (buffer.flags.c_contiguous and buffer.flags.writeable):
        raise ValueError(
            f"buffer of shape {buffer.shape} is written in place: pass one that is C-contiguous and writable"
        )
    return buffer.reshape(-1)
