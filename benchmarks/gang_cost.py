"""What a gang costs by itself: members that do nothing, beside plain Dask tasks on the same workers.

Run: python benchmarks/gang_cost.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import dask
from distributed import Client, LocalCluster, wait

from dask_bridges.gang import Gang, GangPlan
from dask_bridges.task import WorkerMember

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


def measure(function: Callable[..., None], client: Client, workers: Sequence[str], repeats: int) -> list[float]:
    """Milliseconds of each call, after one that is not counted."""
    function(client, workers)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(client, workers)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def report(label: str, times: Sequence[float]) -> None:
    low, _, high = statistics.quantiles(times, n=4)
    print(f"{label:<44}{statistics.median(times):9.1f}{low:9.1f}{high:9.1f}{max(times):9.1f}")


def main() -> None:
    print(f"{'milliseconds':<44}{'median':>9}{'q1':>9}{'q3':>9}{'max':>9}")
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster) as client:
        workers = list(client.scheduler_info(n_workers=-1)["workers"])
        report("2 worker processes, plain tasks", measure(run_tasks, client, workers, REPEATS))
        report("2 worker processes, a gang", measure(run_gang, client, workers, REPEATS))
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
                workers = list(client.scheduler_info(n_workers=-1)["workers"])
                repeats = max(5, REPEATS // max(1, size // 8))
                report(f"{size} workers in one process, plain tasks", measure(run_tasks, client, workers, repeats))
                report(f"{size} workers in one process, a gang", measure(run_gang, client, workers, repeats))


if __name__ == "__main__":
    main()
