"""Jobs that crash, are killed and cancelled at random, on workers, servers and devices that fail, too."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.config
import numpy as np
import pytest
from distributed import Client, Future, LocalCluster, Worker, wait
from distributed.scheduler import KilledWorker
from tests.core.jobs_at_work import Flags, add, gone, hold, wait_until, where
from tests.core.jobs_under_fire import Ending, held_twice, records, works

from dask_bridges import BridgeError, MemberLost
from dask_bridges.jobs import DevicePool
from dask_bridges.processes.forkserver import servers
from dask_bridges.testing import footprint, leftovers
from dask_bridges.testing.devices import pretended
from dask_bridges.testing.traces import wait_until_free, wait_until_same

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(sys.platform != "linux", reason="child processes need Linux")]

EIGHT = {"0": ["a", "b", "c", "d"], "1": ["e", "f", "g", "h"]}
TWO = {"0": ["a"], "1": ["b"]}


@contextlib.contextmanager
def clustered(**arguments: Any) -> Iterator[tuple[LocalCluster, Client]]:
    with (
        LocalCluster(**{"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0", **arguments}) as cluster,
        Client(cluster) as client,
    ):
        yield cluster, client


@pytest.fixture(scope="module")
def shared() -> Iterator[Client]:
    """Two workers that nobody kills."""
    with clustered() as (_, client):
        yield client


@pytest.fixture
def doomed() -> Iterator[Client]:
    """Two workers for one test; nobody tries for long to reach one that is gone."""
    with dask.config.set({"distributed.comm.timeouts.connect": "3s"}), clustered() as (_, client):
        yield client


def all_free(pool: DevicePool, count: int) -> bool:
    return [row["state"] for row in pool.status()] == ["free"] * count


# Isolation

ENDS = ["return"] * 4 + ["raise", "exit", "crash", "killed", "cancelled running", "cancelled waiting"]


def _see_to(flags: Flags, ends: list[str], futures: list[Future]) -> None:
    """Kill and cancel those that wait for it, as they come up, until all are done."""
    deadline = time.monotonic() + 0.25 * len(ends) + 30
    waiting = {number for number, how in enumerate(ends) if how in ("killed", "cancelled running")}
    while not all(future.done() for future in futures):
        assert time.monotonic() < deadline, [(n, ends[n], f.status) for n, f in enumerate(futures) if not f.done()]
        for number in [number for number in waiting if (flags.folder / f"up-{number}").exists()]:
            waiting.remove(number)
            if ends[number] == "killed":
                os.kill(int(flags.wait(f"up-{number}")), signal.SIGKILL)
            else:
                futures[number].cancel()
        time.sleep(0.005)


def _ended_as_it_should(number: int, how: str, future: Future) -> bool:
    if how.startswith("cancelled"):
        return bool(future.cancelled())
    if how == "return":
        return bool(future.result() == number)
    error, told = future.exception(), {"exit": "exit code 3", "crash": "SIGSEGV", "killed": "outside (SIGKILL)"}
    if how == "raise":
        return isinstance(error, LookupError) and error.args == (number,)
    return isinstance(error, MemberLost) and told[how] in str(error)


@pytest.mark.parametrize("jobs", [200, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_no_two_jobs_meet_on_a_device_however_they_end(shared: Client, flags: Flags, jobs: int) -> None:
    dice = random.Random(jobs)
    ends = [dice.choice(ENDS) for _ in range(jobs)]
    before = footprint(shared)
    with DevicePool(shared, devices=EIGHT, preload=()) as pool:
        futures = []
        for number, how in enumerate(ends):
            ending = Ending(number, "wait" if how in ("killed", "cancelled running") else how, dice.choice([0, 0.02]))
            futures.append(pool.submit(works, flags, ending, gpus=dice.choice([0.5, 1, 1, 2])))
        pool.cancel([future for future, how in zip(futures, ends) if how == "cancelled waiting"])
        _see_to(flags, ends, futures)
        assert held_twice(flags) == []
        odd = [n for n, how in enumerate(ends) if not _ended_as_it_should(n, how, futures[n])]
        assert [(n, ends[n], futures[n].status) for n in odd] == []
        begun = [number for _, number, what, _, _ in records(flags) if what == "begins"]
        assert len(begun) == len(set(begun))
        wait_until(lambda: all_free(pool, 8), 10, "a device is still held")
    wait_until_same(shared, before, 10)
    assert leftovers(shared) == {}


# Faults, phase by phase


def _kill_worker(client: Client, address: str) -> None:
    (pid,) = client.run(os.getpid, workers=[address]).values()
    os.kill(pid, signal.SIGKILL)


def _holding(pool: DevicePool) -> str:
    return str(next(row["worker"] for row in pool.status() if row["state"] == "held"))


def _up_again(flags: Flags, name: str, before: str) -> str:
    wait_until(lambda: flags.wait(name) != before, 30, f"{name} did not run again")
    return flags.wait(name)


def test_a_worker_is_lost_while_jobs_run_and_wait(doomed: Client, flags: Flags) -> None:
    with DevicePool(doomed, devices=TWO, preload=()) as pool:
        futures = pool.map(hold, [flags] * 4, [f"up-{number}" for number in range(4)])
        pids = [flags.wait(f"up-{number}") for number in range(2)]
        lost = next(row["worker"] for row in pool.status() if row["holder"] == f"job {futures[0].key}")
        _kill_worker(doomed, lost)
        wait_until(lambda: gone(int(pids[0])), 5, "the job outlives its worker")
        _up_again(flags, "up-0", pids[0])
        flags.set("go")
        assert set(doomed.gather(futures)) <= {"a", "b"}
        assert flags.wait("up-1") == pids[1]  # nobody else's job was touched
        wait_until(lambda: all_free(pool, 2), 30, f"not all is free:\n{pool.status()!r}")
        assert repr(pool).startswith(f"<DevicePool {pool.id}: 2 devices on 2 hosts")


def test_the_only_worker_of_a_pool_is_lost_and_comes_back(doomed: Client, flags: Flags) -> None:
    with DevicePool(doomed, devices={"0": ["a"]}, preload=()) as pool:
        running, waiting = pool.map(hold, [flags] * 2, ["up-0", "up-1"])
        before = flags.wait("up-0")
        _kill_worker(doomed, _holding(pool))
        _up_again(flags, "up-0", before)
        flags.set("go")
        assert doomed.gather([running, waiting]) == ["a", "a"]
        start = time.monotonic()
    assert time.monotonic() - start < 2.5  # no host is waited for that was lost long ago


@pytest.mark.slow
def test_what_was_sent_ahead_is_not_charged_for_its_workers_death(flags: Flags) -> None:
    def place(dask_scheduler: Any, key: str) -> bool:
        task = dask_scheduler.tasks.get(key)
        return task is not None and task.processing_on is not None

    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0, "distributed.comm.timeouts.connect": "3s"}),
        clustered() as (_, client),
        DevicePool(client, devices={"0": ["a"]}, preload=()) as pool,
    ):
        client.gather(pool.map(where, range(8)))  # they are brief
        running = pool.submit(hold, flags, "up")
        flags.wait("up")
        ahead = pool.submit(where)
        wait_until(lambda: client.run_on_scheduler(place, key=ahead.key), 10, "it was not sent ahead")
        _kill_worker(client, _holding(pool))
        with pytest.raises(KilledWorker):
            running.result(timeout=30)
        assert ahead.result(timeout=60)[0] == "a"


@pytest.mark.slow
def test_a_worker_is_lost_while_a_pool_opens(doomed: Client) -> None:
    for pause in (0.0, 0.05, 0.2):
        pid = next(iter(doomed.run(os.getpid).values()))
        killer = threading.Timer(pause, os.kill, (pid, signal.SIGKILL))
        killer.start()
        with contextlib.suppress(BridgeError), DevicePool(doomed, devices=TWO, preload=()) as pool:
            killer.join()
            assert doomed.gather(pool.map(add, range(4))) == [0, 1, 2, 3]
        killer.join()
        doomed.wait_for_workers(2, timeout=30)
    wait_until_free(doomed, 10)


@pytest.mark.slow
def test_a_worker_is_lost_while_a_pool_closes(doomed: Client, flags: Flags) -> None:
    def clings() -> None:
        signal.signal(signal.SIGTERM, lambda *_: flags.set("closing"))
        flags.set("up", str(os.getpid()))
        while True:
            time.sleep(0.01)

    pool = DevicePool(doomed, devices=TWO, preload=())
    clinging = pool.submit(clings)
    pid = int(flags.wait("up"))
    (worker,) = doomed.run(os.getpid, workers=[_holding(pool)]).values()
    closing = threading.Thread(target=pool.close)
    closing.start()
    flags.wait("closing")
    os.kill(worker, signal.SIGKILL)
    closing.join(15)
    assert not closing.is_alive()
    assert clinging.cancelled()
    wait_until(lambda: gone(pid), 5, "the job outlives its worker")
    doomed.wait_for_workers(2, timeout=30)
    with DevicePool(doomed, devices=TWO, preload=()) as pool:
        assert {device for device, _ in doomed.gather(pool.map(where, range(4)))} <= {"a", "b"}
        wait_until(lambda: all_free(pool, 2), 10, "a device is still held")
    wait_until_free(doomed, 10)


def test_a_fork_server_is_killed_with_its_jobs_and_no_others(shared: Client, flags: Flags) -> None:
    before = footprint(shared)
    with DevicePool(shared, devices=TWO, preload=()) as pool:
        futures = pool.map(hold, [flags] * 2, ["up-0", "up-1"])
        for number in range(2):
            flags.wait(f"up-{number}")
        of = {row["holder"]: row["worker"] for row in pool.status()}
        lost = of[f"job {futures[0].key}"]
        (pids,) = shared.run(lambda dask_worker: servers(dask_worker), workers=[lost]).values()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(MemberLost, match="the fork server of its worker was killed"):
            futures[0].result(timeout=30)
        flags.set("go")
        assert futures[1].result() in ("a", "b")
        assert {device for device, _ in shared.gather(pool.map(where, range(8)))} == {"a", "b"}
    wait_until_same(shared, before, 10)


CLIENT = """
import sys, time
from pathlib import Path
from distributed import Client
from tests.core.jobs_at_work import Flags, hold
from dask_bridges.jobs import DevicePool

if __name__ == "__main__":
    flags = Flags(Path(sys.argv[2]))
    with Client(sys.argv[1]) as client, DevicePool(client, devices={"0": ["a"], "1": ["b"]}, preload=()) as pool:
        futures = pool.map(hold, [flags] * 50, [f"up-{number}" for number in range(50)])
        flags.wait("never", 600)
"""


def test_a_client_is_killed_and_nothing_of_its_pool_is_left(shared: Client, flags: Flags, tmp_path: Path) -> None:
    script = tmp_path / "client.py"
    script.write_text(CLIENT)

    def tasks(dask_scheduler: Any) -> set[str]:
        return set(map(str, dask_scheduler.tasks))

    before, others = footprint(shared), shared.run_on_scheduler(tasks)
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    process = subprocess.Popen(
        [sys.executable, str(script), shared.scheduler.address, str(tmp_path)], env={**os.environ, "PYTHONPATH": paths}
    )
    try:
        pids = [int(flags.wait(f"up-{number}")) for number in range(2)]
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: all(map(gone, pids)), 10, "a job outlives its client")
    wait_until(lambda: shared.run_on_scheduler(tasks) <= others, 10, "tasks are left")
    assert not (flags.folder / "up-2").exists()
    with DevicePool(shared, devices=TWO, preload=()) as pool:
        assert all_free(pool, 2)
        assert len(shared.gather(pool.map(where, range(2)))) == 2
    wait_until_same(shared, before, 10)
    wait_until_free(shared, 10)


@pytest.mark.slow
def test_workers_that_come_later_are_used(flags: Flags) -> None:
    with (
        clustered(n_workers=1, resources={"GPU": 1}) as (cluster, client),
        DevicePool(client, preload=()) as pool,
    ):
        futures = pool.map(hold, [flags] * 2, ["up-0", "up-1"])
        flags.wait("up-0")
        cluster.scale(2)
        flags.wait("up-1", 30)
        flags.set("go")
        assert sorted(client.gather(futures)) == ["0", "1"]


@pytest.mark.slow
def test_an_adaptive_cluster_grows_with_the_jobs_that_wait(flags: Flags) -> None:
    with clustered(n_workers=1, resources={"GPU": 1}) as (cluster, client):
        cluster.adapt(minimum=1, maximum=2, interval="200ms", target_duration="1s")
        with DevicePool(client, preload=()) as pool:
            futures = pool.map(hold, [flags] * 6, [f"up-{number}" for number in range(6)])
            flags.wait("up-0")
            flags.wait("up-1", 60)
            flags.set("go")
            assert set(client.gather(futures)) == {"0", "1"}


@pytest.mark.slow
def test_jobs_that_hold_the_gil_leave_the_worker_alone(shared: Client) -> None:
    def holds_the_gil() -> int:
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            pow(7, 3_000_000)
        return 1

    def beats(dask_scheduler: Any) -> list[float]:
        return [worker.last_seen for worker in dask_scheduler.workers.values()]

    with DevicePool(shared, devices={"0": ["a"], "1": ["b"]}, preload=()) as pool:
        futures = pool.map(lambda _: holds_the_gil(), range(2))
        longest = 0.0
        while not all(future.done() for future in futures):
            longest = max(longest, time.time() - min(shared.run_on_scheduler(beats)))
            start = time.monotonic()
            assert set(shared.run(int).values()) == {0}
            longest = max(longest, time.monotonic() - start)
        assert shared.gather(futures) == [1, 1]
    assert longest < 3.0


@pytest.mark.slow
def test_a_worker_with_many_descriptors_has_jobs_too(shared: Client) -> None:
    def open_many(dask_worker: Worker) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
        dask_worker.many = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]

    def close_many(dask_worker: Worker) -> None:
        for fd in dask_worker.many:
            os.close(fd)

    shared.run(open_many)
    try:
        with DevicePool(shared, devices=TWO, preload=()) as pool:
            assert shared.gather(pool.map(add, range(4))) == [0, 1, 2, 3]
    finally:
        shared.run(close_many)


# Devices that are not free


def test_a_device_with_memory_left_is_set_aside_until_it_is_free(tmp_path: Path) -> None:
    with (
        dask.config.set({"dask-bridges.device-settle-timeout": "100ms"}),
        pretended(tmp_path) as machine,
        clustered(n_workers=1) as (_, client),
        DevicePool(client, devices={"0": ["a", "b"]}, preload=()) as pool,
    ):
        client.gather(pool.map(where, range(4)))
        machine.set({"a": (2**31, [(os.getpid(), 2**31)])})
        assert {device for device, _ in client.gather(pool.map(where, range(6)))} == {"b"}
        both = pool.submit(where, gpus=2)
        wait_until(lambda: pool.status()[0]["state"] == "set aside", 10, "it was not set aside")
        aside, other = pool.status()
        assert f"2.00 GiB of its memory are in use by process {os.getpid()} (" in aside["holder"]
        assert other["state"] == "free"
        assert not both.done()
        machine.set({})
        assert both.result(timeout=10)[0] == "a,b"
        assert all_free(pool, 2)


# Models


@pytest.mark.slow
def test_models_come_and_go_and_the_worker_imports_no_framework(shared: Client) -> None:
    keras, xgboost = pytest.importorskip("keras"), pytest.importorskip("xgboost")

    def trains_keras(model: Any, x: Any) -> Any:
        model.compile("sgd", "mse")
        model.fit(x, x, verbose=0)
        return model

    def trains_xgboost(booster: Any, x: Any) -> Any:
        import xgboost

        return xgboost.train({}, xgboost.DMatrix(x, x[:, 0]), 2, xgb_model=booster)

    def imported() -> list[str]:
        return [name for name in ("keras", "tensorflow", "xgboost") if name in sys.modules]

    x = np.random.default_rng(0).random((32, 2), dtype="float32")
    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(2)])
    booster = xgboost.train({}, xgboost.DMatrix(x, x[:, 0]), 3)
    with DevicePool(shared, devices={"0": ["a"]}, preload=["keras"]) as pool:
        once = pool.submit(trains_keras, model, x)
        twice = pool.submit(trains_keras, once, x)  # on the worker it stays as it came
        more = pool.submit(trains_xgboost, booster, x)
        wait([twice, more])
        assert not any(shared.run(imported).values())
        trained = twice.result()
        assert isinstance(trained, keras.Model)
        assert not np.allclose(trained.get_weights()[0], model.get_weights()[0])
        assert more.result().num_boosted_rounds() == 5
