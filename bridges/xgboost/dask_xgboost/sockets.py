"""The sockets XGBoost's collective opens in a worker's process, and how they are closed.

Three faults of XGBoost (3.2 and before, `src/collective`) are worked around here.

- A peer that closes its end while others wait for its data may leave them waiting for
  ever: `Loop::ProcessQueue` answers the waiting thread before it has noted the error,
  and the next `Loop::Block` then stops the thread that would have answered it. The
  error of a connection that is *reset* takes another road there, so the connections of
  members that fail, die or are asked to stop are reset.
- A member that cannot say goodbye to the tracker leaves the thread and the port behind
  on which it listens for errors.
- A rank and the tracker send a message in two pieces, of which TCP holds back the second
  until the first is acknowledged: 40 ms for each training, unless told not to.

XGBoost's sockets are told from Dask's and the user's own by when they came up, and by
the peers, which hold the other ends. What could as well belong to another training
that started in the same process at the same moment is left alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, NamedTuple

import psutil
from distributed.comm import get_address_host_port

__all__ = ["CollectiveSockets", "send_at_once", "shut_down_port"]

Address = tuple[str, int]
WILDCARDS = ("0.0.0.0", "::")

#: Seconds between looks at what is connecting.
_LOOK_AGAIN = 0.1

#: Seconds between looks for the connection to a tracker.
_LOOKS = tuple(0.001 * 2**number for number in range(13))


class _Socket(NamedTuple):
    """What tells a TCP socket from all others, while it is open; one that listens has no remote end."""

    fd: int
    local: Address
    remote: Address | None


def _address(name: tuple[str, int] | tuple[str, int, int, int]) -> Address:
    return name[0].removeprefix("::ffff:"), name[1]


@contextlib.contextmanager
def _opened(fd: int) -> Iterator[tuple[socket.socket, _Socket]]:
    """The TCP socket behind a file descriptor of this process; OSError if there is none."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        raise OSError("no socket")
    copy = os.dup(fd)  # where another thread closes the first meanwhile
    try:
        one = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise
    with one:
        if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
            raise OSError("no TCP socket")
        listens = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        remote = None if listens else _address(one.getpeername())
        yield one, _Socket(fd, _address(one.getsockname()), remote)


def _all() -> set[_Socket]:
    found = set()
    for fd in os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else ():  # there is none on Windows
        with contextlib.suppress(OSError), _opened(int(fd)) as (_, known):
            found.add(known)
    return found


@contextlib.contextmanager
def _again(known: _Socket) -> Iterator[socket.socket]:
    """A socket seen before; OSError if its descriptor has become another's."""
    with _opened(known.fd) as (one, now):
        if now != known:
            raise OSError("another socket")
        yield one


def _shut_down(known: _Socket) -> None:
    with contextlib.suppress(OSError), _again(known) as one:
        one.shutdown(socket.SHUT_RDWR)


def shut_down_port(port: int) -> None:
    """Shut down what listens on a port of this process, and what is connected to it."""
    for known in _all():
        if known.local[1] == port:
            _shut_down(known)


def _send_at_once(known: _Socket) -> None:
    with contextlib.suppress(OSError), _again(known) as one:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def send_at_once(port: int) -> None:
    """Have what is accepted on a port of this process hold nothing back; it has this from what listens."""
    for known in _all():
        if known.local[1] == port:
            _send_at_once(known)


def _reset(known: _Socket) -> None:
    """Reset a connection, for both its ends; a thread that waits on it wakes up to an error."""
    unspecified = (ctypes.c_char * 16)()  # struct sockaddr of the family AF_UNSPEC
    with contextlib.suppress(OSError), _again(known) as one:
        ctypes.CDLL(None).connect(one.fileno(), unspecified, len(unspecified))


def _reset_when_closed(known: _Socket, reset: bool) -> None:
    """Whether a connection is reset, and not closed in good order, where its process closes it or dies."""
    with contextlib.suppress(OSError), _again(known) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", reset, 0))


@contextlib.contextmanager
def _beside(watch: Callable[[], None], over: threading.Event) -> Iterator[None]:
    """Have a thread of its own watch what is done inside; it ends when `over` is set."""
    watching = threading.Thread(target=watch, name="dask-bridges-watching", daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()


class CollectiveSockets:
    """Those of one member.

    Parameters
    ----------
    workers : sequence of str
        Addresses of the gang's Dask workers: connections to them are Dask's own.
    """

    _claims: ClassVar[dict[_Socket, set[CollectiveSockets]]] = {}  # who may have opened what, in this process
    _lock = threading.Lock()

    def __init__(self, workers: Sequence[str]) -> None:
        self._workers = {get_address_host_port(worker) for worker in workers if not worker.startswith("inproc")}
        self._mine: set[_Socket] = set()
        self._ring: set[_Socket] = set()

    @contextlib.contextmanager
    def opening(self) -> Iterator[None]:
        """What comes up inside may be XGBoost's."""
        before = _all()
        try:
            yield
        finally:
            new = _all() - before
            served = {known.local[1] for known in before if known.remote is None}
            with self._lock:
                self._mine = {
                    known for known in new if known.local[1] not in served and known.remote not in self._workers
                }
                for known in self._mine:
                    self._claims.setdefault(known, set()).add(self)

    @staticmethod
    @contextlib.contextmanager
    def sending_at_once(address: Address) -> Iterator[None]:
        """Have the connection to a tracker that comes up inside hold nothing back, once it is there."""
        over = threading.Event()

        def watch() -> None:
            for seconds in _LOOKS:
                if over.wait(seconds):
                    return
                if found := [known for known in _all() if known.remote == address]:
                    for known in found:
                        _send_at_once(known)
                    return

        with _beside(watch, over):
            yield

    def pairs(self) -> list[list[Address]]:
        """Local and remote ends of the connections that came up, for the peers."""
        return [[known.local, known.remote] for known in self._mine if known.remote is not None]

    def keep_ring(self, pairs: Sequence[Sequence[Sequence[Sequence[str | int]]]]) -> None:
        """Learn from all ranks' `pairs` which connections have a peer at their other end; reset them at any end."""
        far = {(tuple(remote), tuple(local)) for rank in pairs for local, remote in rank}
        with self._lock:
            own = {known for known in self._mine if self._claims[known] == {self}}
        self._ring = {known for known in own if (known.local, known.remote) in far}
        for known in self._ring:
            _reset_when_closed(known, True)

    def part_in_good_order(self) -> None:
        """All is done: the connections are to be closed, not reset."""
        ring, self._ring = self._ring, set()
        for known in ring:
            _reset_when_closed(known, False)

    @staticmethod
    def break_connections_to(address: Address) -> None:
        """Shut down what is connected to a tracker, or about to be: a member that waits there fails at once."""
        for known in psutil.Process().net_connections("tcp"):
            # One that is not connected yet has no peer that the socket itself would tell of.
            if known.raddr and known.fd >= 0 and _address(known.raddr) == address:
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(known.fd)) as one:
                    if _address(one.getsockname()) == _address(known.laddr):
                        one.shutdown(socket.SHUT_RDWR)

    @classmethod
    @contextlib.contextmanager
    def goodbye(cls, address: Address, hurried: Callable[[], object]) -> Iterator[None]:
        """While a member takes leave of a tracker, whose host may be silent: once it is hurried it waits no longer."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(_LOOK_AGAIN):
                if hurried():
                    cls.break_connections_to(address)

        with _beside(watch, over):
            yield

    def break_ring(self) -> None:
        """Reset the connections to the peers: a collective call that waits for them fails at once."""
        for known in self._ring:
            _reset(known)

    def close(self) -> None:
        """Let go of all; end the thread that still listens for errors, once nobody else may need it."""
        with self._lock:
            for known in self._mine:
                claims = self._claims.get(known, set())
                claims.discard(self)
                if not claims:
                    self._claims.pop(known, None)
                    if known.remote is None and known.local[0] in WILDCARDS:
                        _shut_down(known)
            self._mine, self._ring = set(), set()
