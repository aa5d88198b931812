"""TCP ports: ranges as people write them, and ports that are held before anybody listens on them."""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from collections.abc import Iterator

from dask_bridges.errors import PlacementError

__all__ = ["free_ports", "held_port", "listener", "port_range"]

#: Seconds that a process which is being killed may hold its port.
AGAIN = 5.0


def port_range(port: int | str | tuple[int, int], name: str = "port") -> range:
    """Ports to try, in order: of 9000, "9000", "9000:9010" (both included), or 0 for any.

    Parameters
    ----------
    port : int, str or tuple
    name : str
        Of the argument it was given as, for the error message.

    Raises
    ------
    ValueError
        If it is neither.

    Examples
    --------
    >>> list(port_range("9000:9002"))
    [9000, 9001, 9002]
    """
    first, _, last = str(port).partition(":") if not isinstance(port, tuple) else (port[0], "", port[1])
    try:
        ports = range(int(first), int(last or first) + 1)
    except ValueError:
        ports = range(0)
    if not ports or ports[0] < 0 or ports[-1] > 65535:
        raise ValueError(f'{name}={port!r}: pass a port, or a range such as "9000:9010"')
    return ports


@contextlib.contextmanager
def held_port(ports: range, host: str, who: str, *, again: bool = False) -> Iterator[int]:
    """The first port of a range that is free on this host, held until the context ends.

    It is bound and not listened on, so that nobody is served by mistake; a server
    that sets ``SO_REUSEPORT``, as this does, can listen on it, go, and come back.

    Parameters
    ----------
    ports : range
        0 stands for any free port.
    host : str
        Of this machine, for the error message: the port is held on all its addresses.
    who : str
        Who needs it, for the error message.
    again : bool
        Whether it was ours before: what is left of connections to it is no hindrance, and whoever listened
        there may take a moment to end.

    Raises
    ------
    PlacementError
        If none is free; it names the range and the host.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, again)
        deadline = time.monotonic() + (AGAIN if again else 0)
        while not (found := any(_bound(one, port) for port in ports)) and time.monotonic() < deadline:
            time.sleep(0.02)
        if not found:
            where = f"port {ports[0]} is not" if len(ports) == 1 else f"none of the ports {ports[0]} to {ports[-1]} is"
            raise PlacementError(f"{where} free on {host} for {who}: pass a larger range, or ports=0 for any free one")
        # Not before: two holders would then share a port.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        yield int(one.getsockname()[1])


def _bound(one: socket.socket, port: int) -> bool:
    with contextlib.suppress(OSError):
        one.bind(("", port))
        return True
    return False


def listener(ports: range, host: str) -> socket.socket:
    """A socket that listens on the first port of a range that is free.

    Bound and listening at once, so that no other has the port; with what is left of older connections
    to it, which a process that binds without `SO_REUSEADDR`, as `held_port` does, would find it taken by.

    Parameters
    ----------
    ports : range
        0 stands for any free port.
    host : str
        Of this machine. Where it is no address of its own, as in a container, the socket listens on all that it has.

    Raises
    ------
    OSError
        If there is none.
    """
    family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    why = OSError(f"no port of {ports}")
    for address, port in itertools.product((host, ""), ports):
        try:
            return socket.create_server((address, port), family=family)
        except OSError as error:
            why = error
    raise why


def free_ports(ports: range) -> int:
    """How many ports of a range are free on this machine now.

    >>> from dask_bridges.ports import free_ports
    >>> free_ports(range(1))  # 0 stands for any free one
    1
    """
    free = 0
    for port in ports:
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            free += 1
    return free
