"""Jobs on simulated devices: the share of device time they use, what each costs, and what a long queue costs Dask.

Jobs sleep, on devices that are names alone. The overhead is the time from the beginning of a job to that of the next
on the same device, but for what the job itself sleeps. Beside them is the same work as plain Dask tasks with a
resource, in the worker's own process, and in a new Python process each, which is what isolates as ours do.

A job is bound by the fork of a process that has all imported already, and by the messages that end one and begin the
next. The lag is by how much the scheduler's event loop is late, sampled each 10 ms.

Run: python benchmarks/device_jobs.py
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from distributed import Client, LocalCluster, wait

from dask_bridges.jobs import DevicePool
from dask_bridges.testing import command_line_cluster
from results import show

EIGHT = {"0": ["a", "b", "c", "d"], "1": ["e", "f", "g", "h"]}
ONE = {"0": ["a"]}
LONG, SHORT = 0.2, 0.02
#: Jobs that are queued at once, and how many of them are run before the rest is cancelled.
QUEUED, RUN = 10_000, 1_000
NEW, TASKS = "a new process each", "tasks in the worker itself"
OURS, FOLDER = "DevicePool", str(Path(__file__).parent)


def sleeps(folder: str, seconds: float, number: int) -> None:
    """A job: it notes its device, its beginning and its end."""
    start = time.monotonic()
    time.sleep(seconds)
    line = f"{os.environ.get('CUDA_VISIBLE_DEVICES', '')} {start} {time.monotonic()}\n".encode()
    file = os.open(Path(folder, "log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line)
    os.close(file)


def spawns(folder: str, seconds: float, number: int) -> None:
    """The same in a new Python process."""
    command = f"from device_jobs import sleeps; sleeps({folder!r}, {seconds}, {number})"
    subprocess.run([sys.executable, "-c", command], check=True, cwd=FOLDER)


def nothing(number: int) -> None:
    """A job that does nothing."""


def logged(submit: Callable[[str], Any]) -> dict[str, list[tuple[float, float]]]:
    """Beginnings and ends of jobs in order, by device."""
    with tempfile.TemporaryDirectory() as folder:
        wait(submit(folder))
        found: dict[str, list[tuple[float, float]]] = {}
        for line in Path(folder, "log").read_text().splitlines():
            device, start, end = line.rsplit(" ", 2)
            found.setdefault(device, []).append((float(start), float(end)))
    return {device: sorted(spans) for device, spans in found.items()}


def used(found: dict[str, list[tuple[float, float]]], devices: int) -> float:
    """Share of the devices' time from when each has a job to when the first has its last."""
    start = max(spans[0][0] for spans in found.values())
    end = min(spans[-1][0] for spans in found.values())
    busy = sum(max(0.0, min(b, end) - max(a, start)) for spans in found.values() for a, b in spans)
    return busy / (devices * (end - start))


def overheads(found: dict[str, list[tuple[float, float]]]) -> list[float]:
    """Milliseconds from each beginning to the next on the same device, but for the jobs' own."""
    pairs = [pair for spans in found.values() for pair in itertools.pairwise(spans[1:])]
    return [1e3 * (later[0] - earlier[0] - SHORT) for earlier, later in pairs]


def tail(values: Sequence[float]) -> dict[str, str]:
    return {"p99": f"{sorted(values)[int(0.99 * len(values))]:.1f}"}


def cpu_used() -> float:
    """Milliseconds of processor time used by this process and all that it has started and that are still there."""
    used = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has just ended, and its parent has its time
            used += 1e3 * sum(process.cpu_times()[:4])
    return used


def measure_lag(client: Client, busy: Callable[[], None]) -> list[float]:
    """By how many milliseconds the scheduler's event loop is late, each 10 ms while it is `busy`."""

    async def begin(dask_scheduler: Any) -> None:
        async def sample() -> None:
            while True:
                start = time.perf_counter()
                await asyncio.sleep(0.01)
                dask_scheduler.lags.append(1e3 * (time.perf_counter() - start - 0.01))

        dask_scheduler.lags = []
        dask_scheduler.sampling = asyncio.ensure_future(sample())

    def end(dask_scheduler: Any) -> list[float]:
        dask_scheduler.sampling.cancel()
        return list(dask_scheduler.lags)

    client.run_on_scheduler(begin)
    busy()
    return list(client.run_on_scheduler(end))


def in_processes(client: Client, devices: dict[str, list[str]], label: str) -> list[float]:
    """The overheads of short jobs; and what devices are used for by long ones, where there are several."""
    with DevicePool(client, devices=devices, preload=()) as pool:
        count = sum(map(len, devices.values()))
        wait(pool.map(nothing, range(4 * count)))
        if count > 1:
            shares = [
                100 * used(logged(lambda folder: pool.map(sleeps, [folder] * 120, [LONG] * 120, range(120))), count)
                for _ in range(5)
            ]
            show(f"device time used by jobs of 200 ms, {label}", "%", {OURS: shares}, more=True)
        jobs = 400 if count > 1 else 150
        before = cpu_used()
        found = logged(lambda folder: pool.map(sleeps, [folder] * jobs, [SHORT] * jobs, range(jobs)))
        spent = {OURS: [(cpu_used() - before) / jobs]}
        show(f"processor time of a job, {label}", "ms", spent, head=False)
    return overheads(found)


def one_device(client: Client) -> None:
    found = {OURS: in_processes(client, ONE, "one device")}
    for label, function, jobs in [(NEW, spawns, 10), (TASKS, sleeps, 150)]:
        found[label] = overheads(
            logged(
                lambda folder, function=function, jobs=jobs: client.map(
                    function,
                    [folder] * jobs,
                    [SHORT] * jobs,
                    range(jobs),
                    resources={"GPU": 1},
                    workers=[0],
                    pure=False,
                )
            )
        )
    notes = {name: tail(values) for name, values in found.items()}
    show("overhead of jobs of 20 ms, one device", "ms", found, ours=OURS, limits=[TASKS], turns=False, notes=notes)


def lags(client: Client) -> None:
    """While nothing is asked of the scheduler, with jobs, and with plain tasks as many."""
    idle = measure_lag(client, lambda: time.sleep(5))
    tasks = measure_lag(client, lambda: wait(client.map(nothing, range(QUEUED), pure=False)))
    first, second = sorted(client.scheduler_info(n_workers=-1)["workers"])
    with DevicePool(client, devices={first: EIGHT["0"], second: EIGHT["1"]}, preload=()) as pool:
        wait(pool.map(nothing, range(32)))
        start = time.perf_counter()
        jobs = measure_lag(client, lambda: _run_some(pool))
        rate = RUN / (time.perf_counter() - start)
    found = {OURS: jobs, f"{QUEUED:,} plain tasks": tasks, "idle": idle}
    notes = {name: tail(values) for name, values in found.items()}
    show(
        f"lag of the scheduler, {QUEUED:,} jobs queued",
        "ms",
        found,
        ours=OURS,
        limits=["idle"],
        notes=notes,
        head=False,
    )
    show("empty jobs, 8 devices", "jobs/s", {OURS: [rate]}, more=True, head=False)


def _run_some(pool: DevicePool) -> None:
    futures = pool.map(nothing, range(QUEUED))
    wait(futures[:RUN])
    pool.cancel(futures)


def main() -> None:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, resources={"GPU": 1}, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        eight = in_processes(client, EIGHT, "8 devices")
        show("overhead of jobs of 20 ms, 8 devices", "ms", {OURS: eight}, notes={OURS: tail(eight)}, head=False)
        one_device(client)
    with command_line_cluster(workers=2) as processes:  # the scheduler has a process of its own
        lags(processes.client)


if __name__ == "__main__":
    main()
