"""What a gang costs by itself: members that do nothing, beside plain Dask tasks on the same workers.

A gang waits for its turn, places its members, starts them together, follows them and ends them, from the call to its
return. The tasks are pinned, one a worker, and their results are gathered: what any call to all workers takes.

Both are bound by messages to the scheduler and the workers, and by their event loops. The many workers share one
process and one event loop, which in life each has for itself.

Run: python benchmarks/gang_cost.py
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import dask
from distributed import Client, LocalCluster, wait

from dask_bridges.gang import Gang, GangPlan
from dask_bridges.task import WorkerMember
from results import show

REPEATS = 30


def nothing(member: WorkerMember, payload: Any) -> None:
    """A member that does nothing."""


def echo(value: Any) -> Any:
    """A task that does nothing."""
    return value


def run_gang(client: Client, workers: Sequence[str]) -> None:
    plan = GangPlan("benchmark", nothing, [None] * len(workers), workers)
    client.sync(Gang(client, plan).run)


def run_tasks(client: Client, workers: Sequence[str]) -> None:
    """The floor: one pinned task a worker, results gathered; no turn, no start together."""
    futures = [client.submit(echo, w, workers=[w], pure=False) for w in workers]
    wait(futures)
    client.gather(futures)


def compare(case: str, client: Client, repeats: int, *, head: bool) -> None:
    """Milliseconds of each, in turns, after one that is not counted."""
    workers = list(client.scheduler_info(n_workers=-1)["workers"])
    ways = {"a gang": run_gang, "plain tasks": run_tasks}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way(client, workers)
            if turn:
                found[name].append(1e3 * (time.perf_counter() - start))
    notes = {name: {"max": f"{max(times):.1f}"} for name, times in found.items()}
    show(case, "ms", found, ours="a gang", limits=["plain tasks"], notes=notes, head=head)


def main() -> None:
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster) as client:
        compare("2 worker processes", client, REPEATS, head=True)
    # In life each worker has its own process for what it does beside its work. Here two hundred share
    # one event loop, which their monitors, ticks and profilers alone would keep busy.
    quiet = {
        "distributed.comm.timeouts.connect": "120s",
        "distributed.admin.system-monitor.interval": "60s",
        "distributed.admin.tick.interval": "60s",
        "distributed.worker.profile.enabled": False,
    }
    with dask.config.set(quiet):
        for size in (2, 4, 16, 64, 200):
            with (
                LocalCluster(
                    n_workers=size, threads_per_worker=1, processes=False, dashboard_address=":0", memory_limit=0
                ) as cluster,
                Client(cluster, timeout=120) as client,
            ):
                client.wait_for_workers(size, timeout=120)
                repeats = max(5, REPEATS // max(1, size // 8))
                compare(f"{size} workers in one process", client, repeats, head=size == 200)


if __name__ == "__main__":
    main()
