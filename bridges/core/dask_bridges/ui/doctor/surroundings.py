"""What a worker, which has this package, finds around it: devices, memory for spools, free ports, other workers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distributed import Worker

from dask_bridges.devices import Device, devices_here
from dask_bridges.member import host_of
from dask_bridges.ports import free_ports, listener, port_range
from dask_bridges.processes.spool import memory_here

__all__ = ["Surroundings", "answer", "knock", "look", "look_around", "stop_answering"]

#: Seconds in which another worker has to answer.
PATIENCE = 10.0
#: Seconds after which a door that was forgotten is closed.
FORGOTTEN = 120.0
#: There, where NVIDIA's driver is loaded.
DRIVER = "/proc/driver/nvidia/version"

_doors: dict[tuple[str, str], asyncio.Server] = {}


@dataclass(frozen=True)
class Surroundings:
    """Of one process.

    Attributes
    ----------
    devices : list of Device
    driver : bool
        Whether the machine has NVIDIA's driver.
    memory_free, memory_size : int
        Bytes that spools may take in ``/dev/shm``, and its size; 0 where it is not of use.
    free_ports : dict of str to int
        How many are free, for each setting that names some.
    """

    devices: list[Device]
    driver: bool
    memory_free: int
    memory_size: int
    free_ports: dict[str, int]


def look(ports: Mapping[str, range], resources: Mapping[str, float]) -> Surroundings:
    """Look around on this machine."""
    free = {name: free_ports(wanted) for name, wanted in ports.items()}
    return Surroundings(devices_here(None, resources), os.path.exists(DRIVER), *memory_here(), free)


async def look_around(ports: Mapping[str, range], dask_worker: Worker) -> Surroundings:
    """`look` on a worker, in a thread: its event loop stays free."""
    return await asyncio.to_thread(look, ports, dict(dask_worker.state.total_resources))


async def answer(token: str, port: int | str, dask_worker: Worker) -> tuple[str, int]:
    """Listen as members of a gang do, and tell whoever connects who this is; the address."""
    host, me = host_of(dask_worker.address), dask_worker.address

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_greeting(token, me))
        writer.close()

    door = await asyncio.start_server(greet, sock=listener(port_range(port, "collective-port"), host))
    _doors[token, me] = door
    asyncio.get_running_loop().call_later(FORGOTTEN, _close, token, me)
    return host, door.sockets[0].getsockname()[1]


async def stop_answering(token: str, dask_worker: Worker) -> None:
    """Close what `answer` has opened."""
    _close(token, dask_worker.address)


def _close(token: str, worker: str) -> None:
    door = _doors.pop((token, worker), None)
    if door is not None:
        door.close()


async def knock(token: str, calls: Mapping[str, Mapping[str, tuple[str, int]]], dask_worker: Worker) -> dict[str, str]:
    """Connect to other workers, all at once: what went wrong, by worker.

    Parameters
    ----------
    token : str
    calls : mapping
        For each worker, the addresses of those that it is to connect to.
    dask_worker : Worker
    """
    doors = calls.get(dask_worker.address, {})
    said = await asyncio.gather(*(_heard(token, worker, *door) for worker, door in doors.items()))
    return {worker: wrong for worker, wrong in zip(doors, said) if wrong}


async def _heard(token: str, worker: str, host: str, port: int) -> str:
    expected = _greeting(token, worker)
    try:
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                greeting: Any = await reader.read(len(expected))
            finally:
                writer.close()
    except TimeoutError:
        return f"no answer from {host}:{port} within {PATIENCE:g} s"
    except OSError as error:
        return f"{host}:{port}: {error}"
    return "" if greeting == expected else f"another machine or program answers at {host}:{port}"


def _greeting(token: str, worker: str) -> bytes:
    return f"{token} {worker}".encode()
