"""The connections of a member with the one before and the one after it, and how bytes move over them.

Data goes one way round. Against the stream, on the same connections, goes bad
news: a member that fails tells the one before it, and so on, until all know why.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from dask_bridges.errors import BridgeError

__all__ = ["Peer", "PeerLost", "Ring", "is_collective_error", "lost"]

#: In the message of every `PeerLost`: of some frameworks' errors only the text is left.
MARKER = "[a peer of the collective is lost]"

#: Seconds that news of why a peer has gone may be behind its going.
GRACE = 1.0

#: Views that are sent by one system call.
AT_ONCE = 8

#: Of news: kind, number of operations done, bytes of text that follow.
_NEWS = struct.Struct("<cQI")
_LEFT, _LOST, _FAILED = b"l", b"p", b"f"


class PeerLost(BridgeError):  # noqa: N818 - a state of things, and not a failure of its own
    """The connection to a peer broke. It is an echo: what ended the peer is the cause."""


def lost(peer: Peer, how: str) -> PeerLost:
    """The error for a peer that has gone."""
    return PeerLost(f"{peer} {MARKER}: {how}")


def is_collective_error(error: BaseException | None) -> bool:
    """Whether a member failed only because a peer was lost: for ``GangPlan(collateral=...)``.

    Parameters
    ----------
    error : BaseException
        `PeerLost`, what was raised from it, or what a framework made of its text.

    Examples
    --------
    >>> from dask_bridges.collective import PeerLost, is_collective_error
    >>> is_collective_error(PeerLost("rank 1"))
    True
    >>> is_collective_error(ValueError("loss is NaN"))
    False
    """
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        if isinstance(one, PeerLost) or MARKER in str(one):
            return True
        seen.add(id(one))
        waiting += [one.__cause__, one.__context__]
    return False


@dataclass(frozen=True)
class Peer:
    """A member of the ring, as messages name it."""

    rank: int
    worker: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.worker}"


class Ring:
    """A member's place in the ring.

    Parameters
    ----------
    before, after : socket.socket
        Connected with the peers that data comes from and goes to.
    peer_before, peer_after : Peer
    """

    def __init__(self, before: socket.socket, after: socket.socket, peer_before: Peer, peer_after: Peer) -> None:
        self.done = 0  # operations
        self._before, self._after = before, after
        self._peer_before, self._peer_after = peer_before, peer_after
        self._news = b""
        self._after_left = False
        # The size of their buffers is the kernel's choice: it grows them while data flows, unless one is set.
        for connection in (before, after):
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    # Data

    def pump(self, ready: deque[memoryview], wants: Iterator[memoryview]) -> None:
        """Send all that is ready while receiving all that is wanted; what has come may make more ready.

        Sending and receiving never wait for each other, so the ring cannot lock up, whatever its
        connections hold.
        """
        into = next(wants, None)
        while ready or into is not None:
            moved = self._send(ready) if ready else 0
            if into is not None and (got := self._receive(into)):
                moved += got
                into = into[got:] if got < len(into) else next(wants, None)
            if not moved:
                self._wait(bool(ready), into is not None)

    def _send(self, ready: deque[memoryview]) -> int:
        try:
            sent = left = self._after.sendmsg(list(islice(ready, AT_ONCE)))
        except BlockingIOError:
            return 0
        except OSError as error:
            self._listen(GRACE)
            raise lost(self._peer_after, f"it takes no more data ({error})") from error
        while ready and left >= len(ready[0]):
            left -= len(ready.popleft())
        if left:
            ready[0] = ready[0][left:]
        return sent

    def _receive(self, into: memoryview) -> int:
        try:
            got = self._before.recv_into(into)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._listen(GRACE)
            raise lost(self._peer_before, f"its connection broke ({error})") from error
        if not got:
            self._listen(GRACE)
            raise lost(self._peer_before, "its connection has ended")
        return got

    def _wait(self, sending: bool, receiving: bool) -> None:
        poll = select.poll()
        if receiving:
            poll.register(self._before, select.POLLIN)
        if not self._after_left:
            poll.register(self._after, select.POLLIN | (select.POLLOUT if sending else 0))
        after = self._after.fileno()
        news = any(fd == after and event != select.POLLOUT for fd, event in poll.poll())
        if news and self._listen(0):
            raise lost(self._peer_after, "its connection has ended")

    # News

    def _listen(self, patience: float) -> bool:
        """Raise what the peer after this one tells; whether it is gone without a word."""
        deadline, poll = time.monotonic() + patience, select.poll()
        poll.register(self._after, select.POLLIN)
        while not self._after_left and poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            try:
                said = self._after.recv(1 << 16)
            except BlockingIOError:
                continue
            except OSError:
                said = b""
            if not said:
                return True
            self._news += said
            self._understand()
        return False

    def _understand(self) -> None:
        if len(self._news) < _NEWS.size:
            return
        kind, done, size = _NEWS.unpack_from(self._news)
        text = self._news[_NEWS.size : _NEWS.size + size]
        if len(text) < size:
            return
        if kind == _FAILED:
            raise BridgeError(text.decode())
        if kind == _LOST:
            raise PeerLost(text.decode())
        self._after_left = True
        if done <= self.done:
            raise self._left()

    def _left(self) -> PeerLost:
        return lost(self._peer_after, f"it has left the collective, before operation {self.done + 1}")

    def check(self) -> None:
        """Raise `PeerLost` if the peer after this one has said that it leaves."""
        if self._after_left:
            raise self._left()

    def tell(self, error: BaseException) -> None:
        """Let the others know why this member takes no more part."""
        if isinstance(error, PeerLost):
            self._say(_LOST, str(error))
        elif isinstance(error, BridgeError):
            self._say(_FAILED, str(error))

    def leave(self) -> None:
        """Let the others know that this member has done its part."""
        self._say(_LEFT, "")

    def _say(self, kind: bytes, text: str) -> None:
        said = text.encode()
        with contextlib.suppress(OSError):
            self._before.send(_NEWS.pack(kind, self.done, len(said)) + said)

    # Ending

    def shut(self) -> None:
        """End the connections, and with them whatever waits for them in another thread."""
        for connection in (self._before, self._after):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the sockets back; nobody may wait for them any more."""
        self._before.close()
        self._after.close()
