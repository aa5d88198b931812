"""Ports as people write them, and ports that are held before anybody listens on them."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_bridges import PlacementError
from dask_bridges.ports import held_port, port_range

ANY = range(1)


@contextlib.contextmanager
def listening(port: int, *, share: bool) -> Iterator[socket.socket]:
    """A server on a port."""
    with socket.socket() as server:
        if share:  # as gRPC does
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(("127.0.0.1", port))
        server.listen()
        yield server


def free_range(length: int) -> range:
    """So many ports in a row that are free now."""
    for first in range(21000, 29000, length):
        with contextlib.ExitStack() as stack, contextlib.suppress(PlacementError):
            for port in range(first, first + length):
                stack.enter_context(held_port(range(port, port + 1), "here", "nobody"))
            return range(first, first + length)
    raise AssertionError("no free ports")


@given(st.integers(0, 65535), st.integers(0, 20))
def test_ranges_are_read_as_they_are_written(first: int, more: int) -> None:
    last = min(first + more, 65535)
    assert list(port_range(f"{first}:{last}")) == list(port_range((first, last))) == list(range(first, last + 1))
    assert list(port_range(first)) == list(port_range(str(first))) == [first]


@pytest.mark.parametrize("wrong", ["9010:9000", -1, "65535:65536", "some", "1:2:3", "", (2, 1), None])
def test_what_is_no_range_is_named_with_its_argument(wrong: object) -> None:
    with pytest.raises(ValueError, match=r'ports=.*: pass a port, or a range such as "9000:9010"'):
        port_range(wrong, "ports")  # type: ignore[arg-type]


def test_two_holders_never_share_a_port() -> None:
    ports = free_range(4)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(held_port(ports, "here", f"worker:{i}")) for i in range(4)]
        assert held == list(ports)
        with pytest.raises(PlacementError, match=f"none of the ports {ports[0]} to {ports[-1]} is free on here for us"):
            stack.enter_context(held_port(ports, "here", "us"))
        with pytest.raises(PlacementError, match=rf"port {ports[0]} is not free on here for us.*ports=0"):
            stack.enter_context(held_port(ports[:1], "here", "us"))
    with held_port(ports, "here", "the next") as again:
        assert again == ports[0]


def test_any_port_is_a_different_one_for_each() -> None:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(held_port(ANY, "here", "us")) for _ in range(50)]
        assert len(set(held)) == 50
        assert 0 not in held


def test_ports_that_others_listen_on_are_passed_over() -> None:
    ports = free_range(2)
    with listening(ports[0], share=False), held_port(ports, "here", "us") as held:
        assert held == ports[1]


def test_nobody_is_served_on_a_held_port_until_a_server_comes_and_servers_may_come_again() -> None:
    with held_port(ANY, "here", "us") as port:
        for _ in range(2):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
            with listening(port, share=True) as server, socket.create_connection(("127.0.0.1", port)) as client:
                accepted, _ = server.accept()
                with accepted:
                    client.sendall(b"x")
                    assert accepted.recv(1) == b"x"


def test_a_server_that_does_not_share_cannot_take_a_held_port() -> None:
    with held_port(ANY, "here", "us") as port, pytest.raises(OSError, match="in use"), listening(port, share=False):
        pass


def test_a_port_that_was_ours_is_taken_again_though_connections_to_it_linger() -> None:
    with held_port(ANY, "here", "us") as port, listening(port, share=True) as server:
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()  # the side that closes first lingers
        client.close()
    with held_port(range(port, port + 1), "here", "us", again=True) as again:
        assert again == port
        with listening(port, share=True):
            pass
