"""How the members of a gang connect to a ring: each listens for the one before it and calls the one after it.

Both sides prove by HMAC-SHA256 over fresh nonces that they know a secret which
the members have exchanged over the cluster's own comms. Whoever else connects is
dropped, and nobody waits for him.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
import socket
import time
from dataclasses import dataclass
from typing import Any

from dask_bridges.collective.ring import Peer, lost
from dask_bridges.errors import BridgeError, GangTimeout, MemberStopped, PlacementError
from dask_bridges.member import Member
from dask_bridges.ports import listener, port_range

__all__ = ["meet", "peers_of"]

#: Seconds that whoever connects may take to prove that he is a member.
HANDSHAKE = 10.0

#: Seconds after a connection that could not be taken.
PAUSE = 0.02

#: Bytes of a nonce and of a MAC.
SIZE = 32


def peers_of(member: Member) -> list[Peer]:
    """The members of the gang, by rank."""
    return [Peer(rank, worker) for rank, worker in enumerate(member.spec.workers)]


def meet(member: Member, port: int | str, timeout: float) -> tuple[socket.socket, socket.socket]:
    """Connections with the member before and the member after this one."""
    deadline = time.monotonic() + timeout
    with _listener(member, port) as door:
        mine = (member.host, door.getsockname()[1], secrets.token_hex(SIZE))
        told = member.exchange(mine, timeout)
        after = (member.rank + 1) % member.world_size
        host, their_port, _ = told[after]
        meeting = _Meeting(member, door, (str(host), int(their_port)), bytes.fromhex(told[0][2]))
        return asyncio.run(meeting.hold(deadline - time.monotonic()))


def _listener(member: Member, port: int | str) -> socket.socket:
    """A socket that listens on a port of a range."""
    ports = port_range(port, "collective-port")
    try:
        # The address by which a worker is reached need not be one of its own machine's, as in a container.
        listening = listener(ports, member.host)
    except OSError as error:
        why = error
    else:
        listening.setblocking(False)
        return listening
    raise PlacementError(
        f"{member.label}: {member.name} can listen on none of the ports {ports[0]} to {ports[-1]} of {member.host} for "
        f"its collective ({why}): set dask-bridges.collective-port to a larger range, or to 0 for any free one"
    )


@dataclass(frozen=True)
class _Edge:
    """A connection to be, from one rank to the next; what both its ends have to prove."""

    key: bytes
    name: bytes

    def proof(self, role: bytes, nonces: bytes) -> bytes:
        return hmac.digest(self.key, b"\0".join((role, self.name)) + nonces, "sha256")

    async def answer(self, connection: socket.socket) -> bool:
        """Whether the one who connected is the peer."""
        loop = asyncio.get_running_loop()
        mine = secrets.token_bytes(SIZE)
        await loop.sock_sendall(connection, mine)
        said = await _exactly(connection, 2 * SIZE)
        nonces = mine + said[:SIZE]
        if not hmac.compare_digest(said[SIZE:], self.proof(b"caller", nonces)):
            return False
        await loop.sock_sendall(connection, self.proof(b"listener", nonces))
        return True

    async def call(self, connection: socket.socket) -> bool:
        """Whether the one who listens is the peer."""
        loop = asyncio.get_running_loop()
        mine = secrets.token_bytes(SIZE)
        nonces = await _exactly(connection, SIZE) + mine
        await loop.sock_sendall(connection, mine + self.proof(b"caller", nonces))
        return hmac.compare_digest(await _exactly(connection, SIZE), self.proof(b"listener", nonces))


async def _exactly(connection: socket.socket, size: int) -> bytes:
    loop, said = asyncio.get_running_loop(), b""
    while len(said) < size:
        more = await loop.sock_recv(connection, size - len(said))
        if not more:
            raise ConnectionError("the connection was closed")
        said += more
    return said


class _Meeting:
    """One member's way into the ring."""

    def __init__(self, member: Member, listener: socket.socket, address: tuple[str, int], key: bytes) -> None:
        rank, size, peers = member.rank, member.world_size, peers_of(member)
        self._member = member
        self._listener = listener
        self._address = address
        self._before, self._after = peers[rank - 1], peers[(rank + 1) % size]
        gang = f"{member.gang} {member.attempt}"
        self._from_before = _Edge(key, f"{gang} {self._before.rank} {rank}".encode())
        self._to_after = _Edge(key, f"{gang} {rank} {self._after.rank}".encode())

    async def hold(self, timeout: float) -> tuple[socket.socket, socket.socket]:
        """Until both neighbours are there."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Future[socket.socket] = loop.create_future()
        receiving = asyncio.ensure_future(self._receive(arrived))
        calling = asyncio.ensure_future(self._call())
        both = asyncio.gather(arrived, calling)
        self._member.on_stop(lambda: _cancel(loop, both))
        try:
            before, after = await asyncio.wait_for(both, timeout)
            return before, after
        except BaseException as error:
            for one in (arrived, calling):
                if one.done() and not one.cancelled() and not one.exception():
                    one.result().close()
            raise self._told(error, arrived, timeout) from error
        finally:
            receiving.cancel()
            calling.cancel()
            await asyncio.gather(receiving, calling, return_exceptions=True)

    def _told(self, error: BaseException, arrived: asyncio.Future[socket.socket], timeout: float) -> BaseException:
        member = self._member
        if reason := member.stopping:
            return MemberStopped(reason)
        if isinstance(error, TimeoutError):
            missing = self._after if arrived.done() and not arrived.cancelled() else self._before
            return GangTimeout(
                f"{member.label}: {missing} had not joined the collective of {member.name} within {timeout:.0f} s. "
                "Is a firewall between the workers? Open a range of ports, and set dask-bridges.collective-port to it."
            )
        return error

    async def _receive(self, arrived: asyncio.Future[socket.socket]) -> None:
        """Let everybody in who knocks, each on his own, until the peer is among them."""
        loop = asyncio.get_running_loop()
        guests: set[asyncio.Task[None]] = set()
        try:
            while not arrived.done():
                try:
                    connection, _ = await loop.sock_accept(self._listener)
                except OSError:  # he has gone again, or this process has no descriptor left for him
                    await asyncio.sleep(PAUSE)
                    continue
                guest = asyncio.ensure_future(self._check(connection, arrived))
                guests.add(guest)
                guest.add_done_callback(guests.discard)
        finally:
            for guest in guests:
                guest.cancel()
            await asyncio.gather(*guests, return_exceptions=True)

    async def _check(self, connection: socket.socket, arrived: asyncio.Future[socket.socket]) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(connection)
            with contextlib.suppress(OSError, TimeoutError):
                connection.setblocking(False)
                known = await asyncio.wait_for(self._from_before.answer(connection), HANDSHAKE)
                if known and not arrived.done():
                    stack.pop_all()
                    arrived.set_result(connection)

    async def _call(self) -> socket.socket:
        """Connect to the peer after this one."""
        loop, (host, port) = asyncio.get_running_loop(), self._address
        (family, kind, _, _, address), *_ = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(socket.socket(family, kind))
            connection.setblocking(False)
            try:
                await loop.sock_connect(connection, address)
                known = await self._to_after.call(connection)
            except OSError as error:
                raise lost(
                    self._after, f"{self._member.name} could not connect to it at {host}:{port}: {error}"
                ) from error
            if not known:
                raise BridgeError(
                    f"{self._member.label}: who listens at {host}:{port} is not {self._after} of this gang: "
                    "does another machine answer at the address of that worker?"
                )
            stack.pop_all()
            return connection


def _cancel(loop: asyncio.AbstractEventLoop, waiting: asyncio.Future[Any]) -> None:
    with contextlib.suppress(RuntimeError):  # the meeting is over
        loop.call_soon_threadsafe(waiting.cancel)
