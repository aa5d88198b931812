"""What a caller sees, and what is left, when parts of a running gang die, freeze or are taken away."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask.config
import psutil
import pytest
from distributed import Client, Event, LocalCluster

from dask_bridges import MemberLost, clients, turns
from dask_bridges.events import Finished
from dask_bridges.gang import Gang, GangPlan
from dask_bridges.task import WorkerMember
from dask_bridges.testing import command_line_cluster, leftovers

pytestmark = pytest.mark.cluster

#: Deadlines short enough for a test; each still far above what a live worker needs to speak.
SHORT = {
    "dask-bridges.stop-timeout": "2s",
    "dask-bridges.hang-timeout": "2s",
    "dask-bridges.hang-timeout-without-nanny": "3s",
}


# What members do


def rank_of(member: WorkerMember, payload: Any) -> int:
    return member.rank


def until_stopped(member: WorkerMember, up: str) -> None:
    """Run until asked to stop; `up` and the rank name an event that is set once it runs."""
    stopped = threading.Event()
    member.on_stop(stopped.set)
    Event(f"{up}-{member.rank}").set()
    while not stopped.wait(0.1):  # its worker leaves without a word where the scheduler is gone
        member.check()
    member.check()


def never_ending(member: WorkerMember, up: str) -> None:
    """Does not listen, as a thread inside a framework."""
    Event(f"{up}-{member.rank}").set()
    threading.Event().wait()


def holds_the_gil(member: WorkerMember, seconds: float) -> int:
    """Nothing else in the process runs meanwhile, and no processor time is used."""
    if member.rank == 0:
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    return member.rank


def rank_0_waits(member: WorkerMember, up: str) -> None:
    if member.rank == 0:
        until_stopped(member, up)


class KillsWhenSent:
    """Kills the worker that is to send it."""

    def __reduce__(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def returns_what_kills(member: WorkerMember, log: str) -> Any:
    with open(log, "a") as file:
        file.write(f"{member.rank}\n")
    return KillsWhenSent() if member.rank == 1 else None


def eats_memory(member: WorkerMember, size: int) -> None:
    if member.rank == 1:
        food = bytearray(b"x") * size
        threading.Event().wait()
        del food
    until_stopped(member, "eats")


def run_until_stopped(workers: Sequence[str], up: str) -> Any:
    """Runs inside a task."""
    client = clients.current(None)
    gang = Gang(client, GangPlan("inner gang", until_stopped, [up] * len(workers), workers))
    return clients.call(client, gang.run)


# Clusters


@pytest.fixture
def doomed() -> Iterator[Client]:
    """Three nanny workers of one thread, in processes of their own."""
    with dask.config.set(SHORT), command_line_cluster(workers=3, bare_scheduler=True) as cluster:
        yield cluster.client


def addresses(client: Client) -> list[str]:
    return sorted(client.scheduler_info(n_workers=-1)["workers"])


def pids(client: Client) -> dict[str, int]:
    found: dict[str, int] = client.run(os.getpid)
    return found


@contextlib.contextmanager
def running(client: Client, function: Callable[..., Any], workers: Sequence[str], up: str) -> Iterator[Future[Any]]:
    """A gang in another thread, all of whose members run."""
    gang = Gang(client, GangPlan("gang", function, [up] * len(workers), workers))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.sync, gang.run)
        assert all(Event(f"{up}-{rank}", client=client).wait(30) for rank in range(len(workers)))
        yield future


def assert_runs_again(client: Client, workers: Sequence[str]) -> None:
    """The next gang runs at once on these workers, and then nothing of any gang is left."""
    results = client.sync(Gang(client, GangPlan("next gang", rank_of, [None] * len(workers), workers)).run)
    assert results == list(range(len(workers)))
    assert leftovers(client) == {}


def wait_until_gone(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(30)


# Frozen


@pytest.mark.slow
def test_a_frozen_worker_is_found_by_what_its_nanny_sees(doomed: Client) -> None:
    workers, processes = addresses(doomed), pids(doomed)
    with running(doomed, until_stopped, workers, "frozen") as gang:
        os.kill(processes[workers[1]], signal.SIGSTOP)
        with pytest.raises(
            MemberLost, match=r"frozen: no heartbeat .* no processor time used, says its nanny"
        ) as caught:
            gang.result(30)
        assert (caught.value.rank, caught.value.worker) == (1, workers[1])
    wait_until_gone(processes[workers[1]])
    assert_runs_again(doomed, [workers[0], workers[2]])
    doomed.wait_for_workers(3, timeout=30)
    assert_runs_again(doomed, addresses(doomed))


@pytest.mark.slow
def test_without_a_nanny_a_frozen_worker_is_given_more_time() -> None:
    with dask.config.set(SHORT), command_line_cluster(workers=2, nanny=False) as cluster:
        client = cluster.client
        workers, processes = addresses(client), pids(client)
        with running(client, until_stopped, workers, "frozen") as gang:
            os.kill(processes[workers[0]], signal.SIGSTOP)
            try:
                with pytest.raises(MemberLost, match=r"frozen: .* no nanny that knows more") as caught:
                    gang.result(30)
            finally:
                os.kill(processes[workers[0]], signal.SIGCONT)
            assert caught.value.rank == 0
        assert_runs_again(client, workers[1:])


@pytest.mark.slow
def test_a_member_that_holds_the_gil_is_not_taken_for_frozen(doomed: Client) -> None:
    plan = GangPlan("gang", holds_the_gil, [8, 8], addresses(doomed)[:2])
    assert doomed.sync(Gang(doomed, plan).run) == [0, 1]


@pytest.mark.slow
def test_with_the_default_deadlines_40_seconds_with_the_gil_are_no_alarm() -> None:
    with command_line_cluster(workers=2) as cluster:
        plan = GangPlan("gang", holds_the_gil, [40, 40], addresses(cluster.client))
        assert cluster.client.sync(Gang(cluster.client, plan).run) == [0, 1]


# Killed


@pytest.mark.slow
def test_a_vanished_worker_quotes_its_nanny(doomed: Client) -> None:
    workers, processes = addresses(doomed), pids(doomed)
    with running(doomed, until_stopped, workers, "killed") as gang:
        os.kill(processes[workers[2]], signal.SIGKILL)
        line = rf'its nanny says: ".*Worker process {processes[workers[2]]} was killed by signal 9"'
        with pytest.raises(MemberLost, match=line) as caught:
            gang.result(30)
        assert caught.value.rank == 2
    assert_runs_again(doomed, workers[:2])


def test_a_worker_that_its_nanny_killed_for_memory_says_so() -> None:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, memory_limit="400 MB", dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        plan = GangPlan("gang", eats_memory, [600_000_000] * 2, addresses(client))
        with pytest.raises(MemberLost, match=r'its nanny says: ".* exceeded 95% memory budget') as caught:
            client.sync(Gang(client, plan).run)
        assert caught.value.rank == 1


@pytest.mark.slow
def test_a_worker_killed_after_its_member_has_finished_is_a_lost_member(doomed: Client) -> None:
    workers, processes = addresses(doomed), pids(doomed)
    gang = Gang(doomed, GangPlan("gang", rank_0_waits, ["waits"] * 3, workers))
    finished = threading.Event()
    gang.events.listen(lambda event: finished.set() if isinstance(event, Finished) and event.rank == 1 else None)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(doomed.sync, gang.run)
        assert finished.wait(30)
        os.kill(processes[workers[1]], signal.SIGKILL)
        with pytest.raises(MemberLost, match=f"member 1 was lost .* with its worker {workers[1]}"):
            future.result(10)
    assert_runs_again(doomed, [workers[0], workers[2]])


@pytest.mark.slow
def test_a_worker_killed_while_its_result_is_fetched_is_a_lost_member_that_does_not_run_again(
    doomed: Client, tmp_path: Path
) -> None:
    workers, log = addresses(doomed), tmp_path / "ran"
    plan = GangPlan("gang", returns_what_kills, [str(log)] * 3, workers)
    with pytest.raises(MemberLost, match=f"member 1 was lost after it had finished, with its worker {workers[1]}"):
        doomed.sync(Gang(doomed, plan).run)
    doomed.wait_for_workers(3, timeout=30)
    assert_runs_again(doomed, addresses(doomed))
    assert sorted(log.read_text().split()) == ["0", "1", "2"]


@pytest.mark.parametrize("how", ["client.restart", "client.restart_workers", "client.retire_workers"])
@pytest.mark.slow
def test_workers_taken_away_are_lost_members(doomed: Client, how: str) -> None:
    workers = addresses(doomed)
    with running(doomed, until_stopped, workers, "taken") as gang:
        match how:
            case "client.restart":
                doomed.restart(wait_for_workers=False)
            case "client.restart_workers":
                doomed.restart_workers(workers[:1])
            case "client.retire_workers":
                doomed.retire_workers(workers[:1])
        with pytest.raises(MemberLost, match=f"member 0 was lost .* {workers[0]}") as caught:
            gang.result(30)
        assert ("somebody restarted the cluster" in str(caught.value)) == (how == "client.restart")
    doomed.wait_for_workers(2, timeout=60)
    assert_runs_again(doomed, addresses(doomed)[:2])


def test_an_adaptive_cluster_keeps_the_workers_of_a_gang() -> None:
    with (
        LocalCluster(n_workers=3, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        workers = addresses(client)
        with running(client, until_told, workers[:2], "adaptive") as gang:
            cluster.adapt(minimum=0, maximum=3, interval="50ms", wait_count=2)
            gone = Event("gone", client=client)
            client.sync(_until_workers, client, 2)
            assert set(addresses(client)) == set(workers[:2])
            gone.set()
            assert gang.result(30) == [0, 1]


def until_told(member: WorkerMember, up: str) -> int:
    Event(f"{up}-{member.rank}").set()
    assert Event("gone").wait(30)
    return member.rank


async def _until_workers(client: Client, number: int) -> None:
    """Wait until the cluster has so many workers."""
    while len((await client.scheduler.identity(n_workers=-1))["workers"]) != number:
        pass


# The client


_CLIENT = """
import sys
import dask.config
from distributed import Client
from dask_bridges.gang import Gang, GangPlan

def never_ending(member, up):
    import threading
    from distributed import Event
    Event(f"{up}-{member.rank}").set()
    threading.Event().wait()

def until_stopped(member, up):
    import threading
    from distributed import Event
    stopped = threading.Event()
    member.on_stop(stopped.set)
    Event(f"{up}-{member.rank}").set()
    stopped.wait()
    member.check()

if __name__ == "__main__":
    with dask.config.set({"dask-bridges.stop-timeout": "2s"}), Client(sys.argv[1]) as client:
        client.sync(Gang(client, GangPlan("doomed", globals()[sys.argv[2]], ["client"] * 2, sys.argv[3:])).run)
"""


@pytest.mark.parametrize("function", [pytest.param("until_stopped", marks=pytest.mark.slow), "never_ending"])
def test_members_end_with_a_killed_client(doomed: Client, function: str, tmp_path: Any) -> None:
    script = tmp_path / "client.py"
    script.write_text(_CLIENT)
    workers, processes = addresses(doomed)[:2], pids(doomed)
    process = subprocess.Popen([sys.executable, script, doomed.scheduler.address, function, *workers])
    try:
        assert all(Event(f"client-{rank}", client=doomed).wait(30) for rank in range(2))
    finally:
        process.kill()
        process.wait()
    if function == "never_ending":
        for worker in workers:
            wait_until_gone(processes[worker])
        doomed.wait_for_workers(3, timeout=30)
        workers = addresses(doomed)
    else:
        assert pids(doomed) == processes
    assert_runs_again(doomed, workers)


@pytest.mark.slow
def test_a_stuck_member_whose_peers_fail_has_its_worker_restarted(doomed: Client) -> None:
    workers, processes = addresses(doomed)[:2], pids(doomed)
    with running(doomed, never_ending, workers, "stuck") as gang:
        os.kill(processes[workers[0]], signal.SIGKILL)
        with pytest.raises(MemberLost, match="member 0 was lost") as caught:
            gang.result(30)
        _, note = caught.value.__notes__  # after where the class is explained
        assert note == f"member 1 of gang on {workers[1]} had not ended after 2 s, so its worker was restarted"
    wait_until_gone(processes[workers[1]])
    doomed.wait_for_workers(3, timeout=30)
    assert_runs_again(doomed, addresses(doomed))


def test_members_end_when_the_task_around_them_is_cancelled(bridges_client: Client) -> None:
    workers = addresses(bridges_client)
    task = bridges_client.submit(run_until_stopped, workers[:2], "inner", workers=[workers[2]], pure=False)
    assert all(Event(f"inner-{rank}", client=bridges_client).wait(30) for rank in range(2))
    task.cancel()
    bridges_client.sync(_until_free, bridges_client)
    assert_runs_again(bridges_client, workers)


async def _until_free(client: Client) -> None:
    """Wait until no gang holds or wants a place."""
    while (await turns.ask(client, "status"))["gangs"]:
        pass


# The scheduler


@pytest.mark.slow
def test_a_killed_scheduler_is_a_clean_error_and_the_members_end() -> None:
    with command_line_cluster(workers=2) as cluster:
        client = cluster.client
        workers, processes = addresses(client), pids(client)
        with running(client, until_stopped, workers, "bereft") as gang:
            cluster.scheduler.kill()
            start = time.monotonic()
            with pytest.raises(MemberLost, match="the scheduler is gone"):
                gang.result(30)
            for pid in processes.values():
                wait_until_gone(pid)
            assert time.monotonic() - start < 60
