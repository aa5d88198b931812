"""What gangs leave behind on a cluster: nothing, tests say."""

from __future__ import annotations

import threading
import time
from typing import Any

from distributed import Client, Worker

from dask_bridges import task, turns

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
    """Wait until the workers that are still there have the `footprint` they had before.

    Raises
    ------
    AssertionError
        If they have not after `timeout` seconds; it says who holds what.
    """
    deadline = time.monotonic() + timeout
    while True:
        now = footprint(client)
        changed = {
            worker: (before[worker], found) for worker, found in now.items() if before.get(worker, found) != found
        }
        if not changed:
            return
        assert time.monotonic() < deadline, changed


def _footprint_here(dask_worker: Worker) -> dict[str, Any]:
    import psutil

    process = psutil.Process()
    names = [thread.name for thread in threading.enumerate()]
    return {
        "task threads": max(0, sum(n.startswith("Dask-Default-Threads") for n in names) - dask_worker.state.nthreads),
        "stopping threads": [n for n in names if n.startswith("stop-")],
        "ports": sorted(c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN),
        "children": sorted(child.pid for child in process.children(recursive=True)),
    }


def footprint(client: Client) -> dict[str, dict[str, Any]]:
    """What each worker process holds that a gang might leave: threads, listening ports, child processes."""
    found: dict[str, dict[str, Any]] = client.run(_footprint_here)
    return found
