"""What is lost, what comes back and what people are told when parts of a TensorFlow cluster die or freeze."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dask.array as da
import dask.config
import numpy as np
import psutil
import pytest
from distributed import Client, LocalCluster

from dask_bridges import MemberLost
from dask_bridges.events import Lost
from dask_bridges.testing import command_line_cluster, leftovers, wait_until_free
from dask_tf import start_tensorflow
from dask_tf.events import RoleDown

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(sys.platform != "linux", reason="tasks need Linux"),
    pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs TensorFlow"),
]

WORKERS = 3


@pytest.fixture(scope="module")
def doomed() -> Iterator[LocalCluster]:
    """Dask workers of which some are killed; their nannies bring them back."""
    with LocalCluster(n_workers=WORKERS, threads_per_worker=1, dashboard_address=":0") as cluster:
        yield cluster


@pytest.fixture
def client(doomed: LocalCluster) -> Iterator[Client]:
    with Client(doomed, set_as_default=False) as client:
        _until_all_are_there(client)
        yield client
        wait_until_free(client, timeout=10)


def _until_all_are_there(client: Client) -> None:
    client.wait_for_workers(WORKERS, timeout=60)


def folders(cluster: Any) -> list[str]:
    """Where partitions of a cluster lie in memory."""
    home = f"/dev/shm/dask-bridges-{os.geteuid()}"
    return [name for name in os.listdir(home) if cluster.id in name]


@contextlib.contextmanager
def fed(client: Client, watch: Any, **options: Any) -> Iterator[tuple[Any, Any]]:
    """A cluster of one parameter server and two workers with 100 rows, and who watches it."""
    with start_tensorflow(client, **{"ps": 1, "worker": 2, **options}) as cluster:
        cluster.feed(da.from_array(np.arange(100.0), chunks=9))
        yield cluster, watch(cluster)


# What tasks do


def total(cluster: Any) -> float:
    return sum(float(batch.sum()) for batch in cluster.dataset("train", 16).as_numpy_iterator())


def pid_of() -> int:
    return os.getpid()


def waits(cluster: Any) -> None:
    cluster.log("it waits")
    threading.Event().wait()


def totals(cluster: Any) -> float:
    return float(sum(cluster.client.gather(cluster.run("worker", total, cluster))))


ALL = float(np.arange(100.0).sum())


# A replaceable task


@pytest.mark.slow
def test_a_killed_worker_comes_back_at_its_address_with_its_rows_and_the_others_go_on(
    client: Client, watch: Any
) -> None:
    with fed(client, watch) as (cluster, watcher):
        before = {row["task"]: row for row in cluster.status()}
        [doomed] = cluster.run("worker:0", waits, cluster)
        [spared] = cluster.run("worker:1", waits, cluster)
        watcher.until(lambda: all("it waits" in cluster.logs()[f"worker:{i}"] for i in range(2)))
        os.kill(before["worker:0"]["pid"], signal.SIGKILL)
        with pytest.raises(MemberLost, match=r"worker:0 was lost.* killed from outside \(SIGKILL\)"):
            doomed.result(30)
        after = watcher.until_back("worker:0")
        assert after["address"] == before["worker:0"]["address"]
        assert after["pid"] != before["worker:0"]["pid"]
        assert not spared.done()
        assert {watcher.row(task)["pid"] for task in ("ps:0", "worker:1")} == {
            before[task]["pid"] for task in ("ps:0", "worker:1")
        }
        [down] = [event for event in cluster.events.events if isinstance(event, RoleDown)]
        assert (down.role, down.index) == ("worker", 0)
        assert "SIGKILL" in down.reason
        assert totals(cluster) == ALL


@pytest.mark.slow  # it waits for silence
def test_a_frozen_worker_is_noticed_and_comes_back(client: Client, watch: Any) -> None:
    with (
        dask.config.set({"dask-bridges.hang-timeout": "2s"}),
        fed(client, watch) as (cluster, watcher),
    ):
        os.kill(watcher.row("worker:1")["pid"], signal.SIGSTOP)
        watcher.until_back("worker:1")
        [down] = [event for event in cluster.events.events if isinstance(event, RoleDown)]
        assert "frozen: no heartbeat" in down.reason
        assert totals(cluster) == ALL


@pytest.mark.slow
def test_a_worker_comes_back_on_its_host_when_its_dask_worker_is_killed(client: Client, watch: Any) -> None:
    with fed(client, watch) as (cluster, watcher):
        before = watcher.row("worker:1")
        kill_dask_worker(client, before["worker"])
        after = watcher.until_back("worker:1")
        assert after["address"] == before["address"]
        assert after["worker"] != before["worker"]
        assert any(isinstance(event, Lost) and event.replaceable for event in cluster.events.events)
        assert totals(cluster) == ALL
        with pytest.raises(ValueError, match="no task"):
            cluster.run("worker:2", pid_of)
    _until_all_are_there(client)


def kill_dask_worker(client: Client, address: str) -> psutil.Process:
    process = psutil.Process(client.run(os.getpid, workers=[address])[address])
    process.kill()
    return process


@pytest.mark.slow  # five restarts
def test_a_worker_that_crashes_again_and_again_is_given_up(client: Client, watch: Any) -> None:
    with start_tensorflow(client, ps=1, worker=1) as cluster:
        watcher = watch(cluster)
        for restarts in range(1, 6):
            os.kill(watcher.row("worker:0")["pid"], signal.SIGKILL)
            watcher.until_back("worker:0", restarts)
        os.kill(watcher.row("worker:0")["pid"], signal.SIGKILL)
        watcher.until_ended()
        with pytest.raises(MemberLost, match="worker:0 was lost"):
            cluster.run("worker", pid_of)


# An essential one


@pytest.mark.slow
def test_a_killed_parameter_server_ends_all_and_is_named(client: Client, watch: Any, gone: Any) -> None:
    with fed(client, watch) as (cluster, watcher):
        processes = watcher.processes()
        [running] = cluster.run("worker:0", waits, cluster)
        watcher.until(lambda: "it waits" in cluster.logs()["worker:0"])
        os.kill(watcher.row("ps:0")["pid"], signal.SIGKILL)
        watcher.until_ended()
        with pytest.raises(MemberLost, match=r"ps:0 was lost.*SIGKILL"):
            cluster.run("worker", pid_of)
        with pytest.raises(MemberLost, match="worker:0"):
            running.result(30)
        gone(processes)
        assert leftovers(client) == {}
        assert folders(cluster) == []


@pytest.mark.slow
def test_a_killed_dask_worker_of_a_parameter_server_ends_all(client: Client, watch: Any, gone: Any) -> None:
    with fed(client, watch) as (cluster, watcher):
        processes, lost = watcher.processes(), watcher.row("ps:0")["worker"]
        kill_dask_worker(client, lost)
        watcher.until_ended()
        with pytest.raises(MemberLost, match=rf"ps:0 was lost.*with its worker {lost}"):
            cluster.feed(da.ones(10, chunks=5), name="more")
        gone(processes)
    _until_all_are_there(client)


# At other moments


@pytest.mark.slow  # a server starts anew
def test_a_dask_worker_killed_while_tasks_start_leaves_nothing(client: Client) -> None:
    workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
    process = psutil.Process(client.run(os.getpid, workers=workers[:1])[workers[0]])
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(start_tensorflow, client, ps=3)
        _until_a_member_is_there(client)
        process.kill()
        with pytest.raises(MemberLost, match=rf"ps:\d was lost.*{workers[0]}"):
            starting.result(60)
    wait_until_free(client, timeout=10)
    _until_all_are_there(client)


def _until_a_member_is_there(client: Client) -> None:
    deadline = time.monotonic() + 30
    while "members" not in leftovers(client):
        assert time.monotonic() < deadline


@pytest.mark.slow
def test_a_worker_killed_while_it_is_fed_fails_the_feed_or_comes_back_with_it(client: Client, watch: Any) -> None:
    with start_tensorflow(client, ps=1, worker=2) as cluster, ThreadPoolExecutor(1) as pool:
        watcher = watch(cluster)
        slow = da.from_array(np.arange(100.0), chunks=10).map_blocks(_slowly, dtype=float)
        feeding = pool.submit(cluster.feed, slow)
        os.kill(watcher.row("worker:0")["pid"], signal.SIGKILL)
        with contextlib.suppress(MemberLost):
            feeding.result(60)
        watcher.until_back("worker:0")
        if "train" not in cluster.feeds:
            cluster.feed(slow)
        assert totals(cluster) == ALL


@pytest.mark.slow  # a server starts anew
def test_a_dask_worker_killed_while_its_task_is_fed_fails_the_feed_or_the_rows_are_there(
    client: Client, watch: Any
) -> None:
    with start_tensorflow(client, ps=1, worker=2) as cluster, ThreadPoolExecutor(1) as pool:
        watcher = watch(cluster)
        slow = da.from_array(np.arange(100.0), chunks=10).map_blocks(_slowly, dtype=float)
        feeding = pool.submit(cluster.feed, slow)
        kill_dask_worker(client, watcher.row("worker:0")["worker"])
        with contextlib.suppress(MemberLost):
            feeding.result(90)
        watcher.until_back("worker:0")
        if "train" not in cluster.feeds:
            cluster.feed(slow)
        assert totals(cluster) == ALL
    _until_all_are_there(client)


def _slowly(block: Any) -> Any:
    time.sleep(0.05)  # takes its time; nobody waits for it to be over
    return block


@pytest.mark.slow
def test_a_process_killed_while_all_is_closed_is_no_trouble(client: Client, watch: Any, gone: Any) -> None:
    cluster = start_tensorflow(client, ps=1, worker=2)
    watcher = watch(cluster)
    processes = watcher.processes()
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(cluster.close)
        for process in processes[:2]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        closing.result(30)
    gone(processes)


@pytest.mark.slow  # Dask itself takes its time
def test_all_ends_when_the_scheduler_is_killed(watch: Any) -> None:
    with command_line_cluster(workers=2) as command_line:
        client = command_line.client
        cluster = start_tensorflow(client, ps=1, worker=1)
        processes = watch(cluster).processes()
        command_line.scheduler.kill()
        assert psutil.wait_procs(processes, timeout=60)[1] == []
        with pytest.raises(Exception, match="scheduler|closed|ended"):  # noqa: RUF043
            cluster.client.gather(cluster.run("worker", pid_of))
        cluster.close()
