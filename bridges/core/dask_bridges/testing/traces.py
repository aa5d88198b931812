"""What gangs leave behind on a cluster: nothing, tests say."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from distributed import Client, Worker

from dask_bridges import task, turns
from dask_bridges.processes import forkserver

__all__ = ["footprint", "leftovers", "wait_until_free", "wait_until_same"]


def _members_here() -> list[str]:
    return [f"gang {gang} rank {rank}" for (_, gang, rank) in task._members]


def leftovers(client: Client) -> dict[str, Any]:
    """What gangs have left: places at the arbiter, members on workers. Empty when all is well."""
    left: dict[str, Any] = {}
    client.sync(turns.register, client)
    if gangs := client.sync(turns.ask, client, method="status")["gangs"]:
        left["gangs"] = gangs
    if members := {worker: found for worker, found in client.run(_members_here).items() if found}:
        left["members"] = members
    return left


def wait_until_free(client: Client, timeout: float) -> None:
    """Wait until nothing of any gang is left.

    Raises
    ------
    AssertionError
        If something is after `timeout` seconds; it says what.
    """
    deadline = time.monotonic() + timeout
    while left := leftovers(client):
        assert time.monotonic() < deadline, left


def wait_until_same(client: Client, before: dict[str, dict[str, Any]], timeout: float) -> None:
    """Wait until the workers that are still there hold no more than the `footprint` they had before.

    Raises
    ------
    AssertionError
        If they do after `timeout` seconds; it says who holds what.
    """
    deadline = time.monotonic() + timeout
    while True:
        now = footprint(client)
        grown = {worker: _more(before[worker], found) for worker, found in now.items() if worker in before}
        if not any(grown.values()):
            return
        assert time.monotonic() < deadline, grown


def _more(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What has grown: numbers, or the members of lists."""
    found = {}
    for name, value in now.items():
        more = max(0, value - before[name]) if isinstance(value, int) else sorted(set(value) - set(before[name]))
        if more:
            found[name] = more
    return found


def _footprint_here(dask_worker: Worker) -> dict[str, Any]:
    import psutil

    process = psutil.Process()
    names = [thread.name for thread in threading.enumerate()]
    kept = ("sem.", "dask-bridges-devices-")  # files of leases stay; a lease is a lock on one
    return {
        # Threads that Python does not know: a framework's own.
        "native threads": max(0, process.num_threads() - threading.active_count()),
        "files": sorted(file.path for file in process.open_files()),
        "shared memory": sorted(p.name for p in Path("/dev/shm").glob("*") if not p.name.startswith(kept)),
        "task threads": max(0, sum(n.startswith("Dask-Default-Threads") for n in names) - dask_worker.state.nthreads),
        "stopping threads": [n for n in names if n.startswith("stop-")],
        "ports": sorted(c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN),
        "children": sorted({child.pid for child in process.children(recursive=True)} - forkserver.servers(dask_worker)),
    }


def footprint(client: Client) -> dict[str, dict[str, Any]]:
    """What each worker process holds that a gang might leave: threads, ports, processes, files, shared memory."""
    found: dict[str, dict[str, Any]] = client.run(_footprint_here)
    return found
