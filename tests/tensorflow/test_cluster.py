"""TensorFlow clusters start on Dask workers, end with whoever wants them no more, and leave nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array as da
import dask.config
import psutil
import pytest
from distributed import Client, LocalCluster, get_client

from dask_bridges import GangTimeout, MemberLost, PlacementError
from dask_bridges.ports import held_port
from dask_bridges.testing import footprint, leftovers, wait_until_free
from dask_bridges.testing.packages import another_version, package_missing
from dask_bridges.testing.traces import wait_until_same
from dask_tf import start_tensorflow

pytestmark = pytest.mark.cluster

Start = Callable[..., Any]


# What tasks do


def name_of(cluster: Any) -> str:
    return f"{cluster.role}:{cluster.index}"


def pid_of() -> int:
    return os.getpid()


def threads_of() -> tuple[int, int]:
    import tensorflow as tf

    return (
        tf.config.threading.get_intra_op_parallelism_threads(),
        tf.config.threading.get_inter_op_parallelism_threads(),
    )


def rows_of(cluster: Any) -> int:
    return sum(len(batch) for batch in cluster.dataset("train", 64))


def addresses(client: Client) -> list[str]:
    return sorted(client.scheduler_info(n_workers=-1)["workers"])


def flat(by_role: dict[str, list[str]]) -> list[str]:
    return [address for addresses in by_role.values() for address in addresses]


def listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
        return True
    return False


# Which tasks


@pytest.mark.slow
def test_servers_listen_where_the_specification_says_on_the_hosts_of_their_dask_workers(
    start: Start, bridges_client: Client
) -> None:
    with start(ps=1, worker=2) as cluster:
        tf_spec, dask_spec = cluster
        assert sorted(flat(dask_spec)) == addresses(bridges_client)
        assert {role: len(tasks) for role, tasks in tf_spec.as_dict().items()} == {"ps": 1, "worker": 2}
        for role, tasks in tf_spec.as_dict().items():
            for address, worker in zip(tasks, dask_spec[role]):
                assert listens(address)
                assert address.rpartition(":")[0] == worker.removeprefix("tcp://").rpartition(":")[0]
        found = bridges_client.gather(cluster.run("ps", name_of, cluster) + cluster.run("worker", name_of, cluster))
        assert found == ["ps:0", "worker:0", "worker:1"]
    assert not any(map(listens, flat(tf_spec.as_dict())))
    assert leftovers(bridges_client) == {}


@pytest.mark.slow
def test_without_roles_there_is_a_worker_on_every_dask_worker_and_no_server(
    start: Start, bridges_client: Client
) -> None:
    with start() as cluster:
        assert cluster.tf_spec.jobs == ["worker"]
        assert sorted(cluster.dask_spec["worker"]) == addresses(bridges_client)
        assert not any(listens(address) for address in cluster.tf_spec.job_tasks("worker"))


@pytest.mark.slow
def test_roles_have_any_names_and_those_that_lead_come_first(start: Start) -> None:
    with start(worker=1, gardener=1, chief=1) as cluster:
        assert [row["task"] for row in cluster.status()] == ["chief:0", "worker:0", "gardener:0"]
        [found] = cluster.run("gardener", name_of, cluster)
        assert found.result() == "gardener:0"


def test_named_dask_workers_are_used_and_those_with_the_resources(start: Start, bridges_client: Client) -> None:
    chosen = addresses(bridges_client)[1]
    with start(worker=1, workers=[chosen]) as cluster:
        assert cluster.dask_spec == {"worker": [chosen]}
    with pytest.raises(PlacementError, match=r"no Dask worker has the resources \{'GPU': 1\}; there are"):
        start(worker=1, resources={"GPU": 1})


def test_too_few_dask_workers_are_told_with_the_arithmetic_unless_tasks_may_share(
    start: Start, bridges_client: Client
) -> None:
    with pytest.raises(
        PlacementError, match=r"ps=2 \+ worker=2 is 4 tasks, one a Dask worker, and there are 3 .*share=True"
    ):
        start(ps=2, worker=2)
    with start(ps=1, worker=2, share=True, workers=addresses(bridges_client)[:1]) as cluster:
        assert {worker for workers in cluster.dask_spec.values() for worker in workers} == set(
            addresses(bridges_client)[:1]
        )
        assert len(set(cluster.client.gather(cluster.run("worker", pid_of)))) == 2


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"worker": 1.5}, TypeError, r"worker=1\.5: pass the number of tasks"),
        ({"gardener": True}, TypeError, "gardener=True"),
        ({"ps": -1}, ValueError, "ps=-1: .* cannot be negative"),
        ({"ps": 0, "worker": 0}, ValueError, "no task at all.*ps=0, worker=0"),
        ({"worker": 1, "threads": 0}, ValueError, "threads=0"),
        ({"worker": 1, "ports": "9010:9000"}, ValueError, "ports='9010:9000': pass a port, or a range"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_starts(
    start: Start, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        start(**options)


def test_plain_traffic_on_a_cluster_with_tls_needs_a_word_of_consent(
    start: Start, monkeypatch: pytest.MonkeyPatch, bridges_client: Client
) -> None:
    monkeypatch.setattr(type(bridges_client.scheduler), "address", "tls://10.0.0.1:8786")
    with pytest.raises(PlacementError, match=r"TensorFlow's traffic is plain TCP .*allow_plaintext=True"):
        start(worker=1)


# Settings


def test_threads_are_those_of_the_dask_worker_or_as_asked_by_role(start: Start) -> None:
    with start(ps=1, worker=1, threads={"worker": 3}) as cluster:
        assert cluster.client.gather(cluster.run("ps", threads_of) + cluster.run("worker", threads_of)) == [
            (1, 2),
            (3, 3),
        ]


def test_ports_come_from_the_range_and_are_free_again_afterwards(start: Start, bridges_client: Client) -> None:
    with held_port(range(1), "here", "us") as some:
        pass
    ports = range(some, some + 20) if some < 65000 else range(some - 20, some)
    with start(ps=1, worker=2, ports=(ports[0], ports[-1])) as cluster:
        used = [int(address.rpartition(":")[2]) for address in flat(cluster.tf_spec.as_dict())]
        assert len(set(used)) == 3
        assert set(used) <= set(ports)
    for port in used:
        with held_port(range(port, port + 1), "here", "us", again=True):
            pass


def test_a_range_that_is_too_small_is_named_with_the_host_and_nothing_is_left(
    start: Start, bridges_client: Client
) -> None:
    with held_port(range(1), "here", "us") as port:
        with pytest.raises(PlacementError, match=rf"port {port} is not free on 127\.0\.0\.1 for \w+:\d"):
            start(ps=1, worker=2, ports=port)
        assert leftovers(bridges_client) == {}
        assert [found["children"] for found in footprint(bridges_client).values()] == [[], [], []]


def test_another_host_may_be_advertised_by_role(start: Start) -> None:
    with start(ps=1, worker=1, host={"worker": "localhost"}) as cluster:
        assert cluster.tf_spec.task_address("worker", 0).startswith("localhost:")
        assert cluster.tf_spec.task_address("ps", 0).startswith("127.0.0.1:")
        assert listens(cluster.tf_spec.task_address("worker", 0))


# Callers


def test_an_asynchronous_client_awaits_all(start: Start, bridges_cluster: LocalCluster) -> None:
    async def main() -> tuple[list[int], int]:
        async with Client(bridges_cluster.scheduler_address, asynchronous=True, set_as_default=False) as client:
            async with await start(client, worker=2) as cluster:
                await cluster.feed(da.ones((100, 2), chunks=(7, 2)))
                rows = await client.gather(cluster.run("worker", rows_of, cluster))
                await cluster.restart("worker", 0)
                again = await client.gather(cluster.run("worker", rows_of, cluster))
                await cluster.unfeed("train")
            other = await start(client, worker=1)
            await other.close()
            return rows, sum(again)

    rows, again = asyncio.run(main())
    assert sum(rows) == again == 100


def test_a_cluster_starts_inside_a_task(start: Start, bridges_client: Client) -> None:
    found = bridges_client.submit(start_in_task, pure=False).result(60)
    assert found == [f"worker:{index}" for index in range(3)]


def start_in_task() -> list[str]:
    with start_tensorflow() as cluster:  # one of its tasks is on the worker of this one, which has one thread
        found: list[str] = get_client().gather(cluster.run("worker", name_of, cluster))
        return found


def test_two_clusters_live_on_the_same_workers_at_once(start: Start) -> None:
    with start(ps=1, worker=1) as one, start(worker=2) as other:
        assert one.client.gather(one.run("worker", name_of, one)) == ["worker:0"]
        assert other.client.gather(other.run("worker", name_of, other)) == ["worker:0", "worker:1"]
        pids = {row["pid"] for cluster in (one, other) for row in cluster.status()}
        assert len(pids) == len(one.status()) + len(other.status())
        one.close()
        assert other.client.gather(other.run("worker", name_of, other)) == ["worker:0", "worker:1"]


# Ends


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_rounds_of_starting_feeding_and_closing_leave_nothing(
    start: Start, bridges_client: Client, rounds: int
) -> None:
    def one() -> list[str]:
        with start(ps=1, worker=2) as cluster:
            cluster.feed(da.ones((100, 2), chunks=(30, 2)))
            assert sum(bridges_client.gather(cluster.run("worker", rows_of, cluster))) == 100
            return flat(cluster.tf_spec.as_dict())

    one()
    before = footprint(bridges_client)
    used = [address for _ in range(rounds) for address in one()]
    assert leftovers(bridges_client) == {}
    wait_until_same(bridges_client, before, timeout=10)
    assert not any(map(listens, used))
    for states in bridges_client.run(states_below).values():
        assert psutil.STATUS_ZOMBIE not in states


def states_below() -> list[str]:
    return [process.status() for process in psutil.Process().children(recursive=True)]


def test_closing_ends_the_processes_and_what_runs_in_them(
    start: Start, bridges_client: Client, watch: Any, gone: Any
) -> None:
    cluster = start(ps=1, worker=1)
    processes = watch(cluster).processes()
    [endless] = cluster.run("worker", wait_for_ever, cluster)
    watch(cluster).until(lambda: "it runs" in cluster.logs()["worker:0"])
    begin = time.monotonic()
    cluster.close()
    assert time.monotonic() - begin < 20  # the machine may be busy
    gone(processes)
    with pytest.raises(MemberLost, match="worker:0"):
        endless.result(10)
    assert {row["state"] for row in cluster.status()} == {"ended"}
    assert "worker:0 ended" in repr(cluster)
    with pytest.raises(MemberLost, match="ended"):
        cluster.run("worker", pid_of)
    cluster.close()
    assert leftovers(bridges_client) == {}


def wait_for_ever(cluster: Any) -> None:
    cluster.log("it runs")
    threading.Event().wait()


_CLIENT = """
import sys
from distributed import Client
from dask_tf import start_tensorflow
if __name__ == "__main__":
    with Client(sys.argv[1]) as client:
        cluster = start_tensorflow(client, ps=1, worker=1)
        print(*(row["pid"] for row in cluster.status()), flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["killed", "left"])
def test_all_ends_with_the_client(start: Start, bridges_client: Client, tmp_path: Path, gone: Any, how: str) -> None:
    script = tmp_path / "client.py"
    script.write_text(_CLIENT)
    command = [sys.executable, str(script), bridges_client.scheduler.address]
    caller = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert caller.stdin is not None
    assert caller.stdout is not None
    try:
        processes = [psutil.Process(int(pid)) for pid in caller.stdout.readline().split()]
        assert len(processes) >= 2
        if how == "killed":
            caller.kill()
        else:
            caller.stdin.close()
        gone(processes)
        caller.wait(30)
        wait_until_free(bridges_client, timeout=10)
    finally:
        caller.kill()
        caller.wait()
        caller.stdin.close()
        caller.stdout.close()


# Workers that are not fit


def test_a_dask_worker_without_tensorflow_is_named_with_the_remedy(start: Start, bridges_client: Client) -> None:
    worker = addresses(bridges_client)[1]
    said = rf'worker {worker} cannot import tensorflow .*pip install "dask-bridges\[tensorflow\]"'
    with (
        package_missing(bridges_client, worker, "tensorflow"),
        pytest.raises(PlacementError, match=said),
    ):
        start(ps=1, worker=2)
    assert leftovers(bridges_client) == {}


def test_a_dask_worker_with_another_tensorflow_is_named_with_both_versions(
    start: Start, bridges_client: Client
) -> None:
    worker = addresses(bridges_client)[2]
    with (
        another_version(bridges_client, worker, "tensorflow", "1.0.0"),
        pytest.raises(PlacementError, match=rf"tensorflow is 1\.0\.0 on worker {worker} and \d+\.\d+\S* on the client"),
    ):
        start(ps=1, worker=2)
    with start(worker=1):  # nothing of that is remembered
        pass


#: Python runs it as it starts: a process that comes to import how tasks serve dies.
_DIES = """
import os, sys

class Dies:
    def find_spec(self, name, path=None, target=None):
        if name == "dask_tf.serving":
            os.write(2, b"no such network\\n")
            os._exit(4)

sys.meta_path.insert(0, Dies())
"""


@pytest.mark.slow
def test_a_task_that_dies_while_it_starts_is_named_with_its_last_lines(
    start: Start, bridges_client: Client, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(_DIES)
    before = footprint(bridges_client)
    with pytest.raises(
        MemberLost, match=r"(ps|worker|chief):0 was lost.* exit code 4(.|\n)*said last:\nno such network"
    ):
        start(ps=1, worker=1, environment={"PYTHONPATH": str(tmp_path)})
    assert leftovers(bridges_client) == {}
    wait_until_same(bridges_client, before, timeout=10)


@pytest.mark.slow
def test_a_keras_that_cannot_be_imported_says_why(start: Start, bridges_client: Client) -> None:
    with pytest.raises(PlacementError, match=r"keras cannot be imported in a child process(.|\n)*nonsense"):
        start(worker=1, environment={"KERAS_BACKEND": "nonsense"})
    assert leftovers(bridges_client) == {}


def test_a_task_that_does_not_come_up_in_time_is_named(start: Start, bridges_client: Client) -> None:
    with (
        dask.config.set({"dask-bridges.start-timeout": "10ms"}),
        pytest.raises(GangTimeout, match="start-timeout"),
    ):
        start(ps=1, worker=1)
    wait_until_free(bridges_client, timeout=20)
