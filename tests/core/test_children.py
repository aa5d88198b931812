"""Members whose work is done in child processes: what comes back, how they end, and that nothing stays."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask.config
import numpy as np
import psutil
import pytest
from distributed import Client
from tests.core.control_groups import control_group, use_too_much

from dask_bridges import MemberFailed, MemberLost
from dask_bridges.events import Event, Finished, Log, Metrics, Progress, Started
from dask_bridges.gang import Gang, GangPlan
from dask_bridges.processes import ChildMember, run_in_child
from dask_bridges.task import WorkerMember
from dask_bridges.testing import footprint, leftovers

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(sys.platform != "linux", reason="child processes need Linux")]

Function = Callable[[ChildMember, Any], Any]


def in_child(member: WorkerMember, work: tuple[Function, Any]) -> Any:
    return run_in_child(member, *work)


def stopped_first(member: WorkerMember, payload: Any) -> Any:
    member.stop("told before")
    return run_in_child(member, waits_for_stop, None)


# What children do


def waits_for_stop(member: ChildMember, payload: Any) -> None:
    stopped = threading.Event()
    member.on_stop(stopped.set)
    stopped.wait()
    member.check()


def who(member: ChildMember, payload: Any) -> tuple[int, int, Any]:
    return member.rank, os.getpid(), payload


def talk(member: ChildMember, payload: Any) -> list[Any]:
    member.log("hello")
    member.metrics(0, {"loss": 0.5})
    member.progress(1, 2)
    return member.exchange(member.rank * 10)


def finds(member: ChildMember, module: str) -> Any:
    return __import__(module).VALUE


def fails_deep(member: ChildMember, payload: Any) -> None:
    def deep_inside() -> None:
        raise LookupError("deep")

    if member.rank == 1:
        deep_inside()
    member.exchange()


class HasLock(Exception):  # noqa: N818
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


def fails_unpicklably(member: ChildMember, payload: Any) -> None:
    raise HasLock("with a lock in it")


def returns_a_lock(member: ChildMember, payload: Any) -> Any:
    return threading.Lock()


def holds_the_gil(member: ChildMember, seconds: float) -> int:
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    return member.rank


def lingers(member: ChildMember, payload: Any) -> str:
    """Leaves a thread that would keep the process alive."""
    threading.Thread(target=threading.Event().wait).start()
    return "done"


def up(member: ChildMember, file: str) -> None:
    """Say by a file that this child runs; at rank 0 with a child of its own."""
    pids = [os.getpid()]
    if member.rank == 0:
        pids.append(subprocess.Popen(["sleep", "1000"]).pid)
    part = Path(f"{file}-{member.rank}.part")
    part.write_text(" ".join(map(str, pids)))
    part.rename(f"{file}-{member.rank}")


def until_stopped(member: ChildMember, file: str) -> None:
    stopped = threading.Event()
    member.on_stop(stopped.set)
    up(member, file)
    stopped.wait()
    member.check()


def never_ending(member: ChildMember, file: str) -> None:
    up(member, file)
    threading.Event().wait()


def eats_memory(member: ChildMember, group: str) -> None:
    """Rank 1 moves into a control group with little memory, and uses more."""
    if member.rank == 1:
        use_too_much(group)
    member.exchange()


# Running them


@pytest.fixture
def children(bridges_client: Client) -> Callable[..., Any]:
    """``children(function, payload)`` runs a gang of two, each in a child; `listener` hears it."""

    def run(function: Function, payload: Any = None, listener: Any = None) -> Any:
        workers = sorted(bridges_client.scheduler_info(n_workers=-1)["workers"])[:2]
        gang = Gang(bridges_client, GangPlan("gang", in_child, [(function, payload)] * 2, workers))
        if listener:
            gang.events.listen(listener)
        try:
            return bridges_client.sync(gang.run)
        finally:
            assert leftovers(bridges_client) == {}
            assert [found["children"] for found in footprint(bridges_client).values()] == [[], [], []]

    return run


@contextlib.contextmanager
def running(client: Client, function: Function, file: Path) -> Iterator[tuple[Any, Sequence[psutil.Process]]]:
    """A gang of two in another thread whose children run: its future, and their processes, rank 0's first."""
    workers = sorted(client.scheduler_info(n_workers=-1)["workers"])[:2]
    gang = Gang(client, GangPlan("gang", in_child, [(function, str(file))] * 2, workers))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.sync, gang.run)
        files = [Path(f"{file}-{rank}") for rank in range(2)]
        while not all(f.exists() for f in files):
            assert not future.done(), future.exception()
        yield future, [psutil.Process(int(pid)) for f in files for pid in f.read_text().split()]


def assert_gone(processes: Sequence[psutil.Process]) -> None:
    """Within the 5 seconds of the contract; who reaps an orphan is the system's business."""
    deadline = time.monotonic() + 5
    while alive := [process for process in processes if _runs(process)]:
        assert time.monotonic() < deadline, alive


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# What comes back


def test_results_come_by_rank_from_processes_of_their_own(children: Callable[..., Any]) -> None:
    data = np.arange(5)
    results = children(who, data)
    assert [rank for rank, _, _ in results] == [0, 1]
    assert len({pid for _, pid, _ in results} | {os.getpid()}) == 3
    assert all((found == data).all() for _, _, found in results)


def test_children_talk_and_find_their_peers(children: Callable[..., Any]) -> None:
    events: list[Event] = []
    assert children(talk, listener=events.append) == [[0, 10], [0, 10]]
    kinds = [type(event) for event in events if event.rank == 1]
    assert kinds == [Started, Log, Metrics, Progress, Finished]


def test_a_child_imports_what_its_worker_can(
    children: Callable[..., Any], bridges_client: Client, tmp_path: Path
) -> None:
    (tmp_path / "only_on_workers.py").write_text("VALUE = 5")
    bridges_client.run(lambda folder: sys.path.append(folder), str(tmp_path))
    try:
        assert children(finds, "only_on_workers") == [5, 5]
    finally:
        bridges_client.run(lambda folder: sys.path.remove(folder), str(tmp_path))


def test_an_exception_comes_back_whole(children: Callable[..., Any]) -> None:
    with pytest.raises(MemberFailed, match=r"member 1 on .* raised LookupError: deep") as caught:
        children(fails_deep)
    cause = caught.value.__cause__
    assert isinstance(cause, LookupError)
    assert "deep_inside" in [frame.name for frame in traceback.extract_tb(cause.__traceback__)]


@pytest.mark.parametrize(
    ("function", "said"), [(fails_unpicklably, "HasLock.*with a lock in it"), (returns_a_lock, "cannot pickle")]
)
def test_what_cannot_be_pickled_is_a_failure_that_says_so(
    children: Callable[..., Any], function: Function, said: str
) -> None:
    with pytest.raises(MemberFailed, match=said):
        children(function)


def test_a_function_the_child_cannot_read_is_named(children: Callable[..., Any]) -> None:
    with pytest.raises(MemberFailed, match="No module named 'nowhere'"):
        children(who, _Unreadable())


class _Unreadable:
    """Can be unpickled on a worker, and pickled again, but not unpickled in a child."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _read, (os.getpid(),)


def _read(pid: int) -> Any:
    if os.getppid() == pid:
        raise ModuleNotFoundError("No module named 'nowhere'")
    return _Unreadable()


def test_a_child_that_does_not_exit_after_its_result_is_ended(children: Callable[..., Any]) -> None:
    with dask.config.set({"dask-bridges.child-stop-timeout": "200ms"}):
        assert children(lingers) == ["done", "done"]


# How they end


def test_a_child_killed_for_memory_says_so(children: Callable[..., Any]) -> None:
    with control_group(100_000_000) as group, pytest.raises(MemberLost, match="killed for memory") as caught:
        children(eats_memory, str(group))
    assert caught.value.rank == 1


def test_a_child_that_starts_when_its_member_is_to_stop_is_told_so(bridges_client: Client) -> None:
    workers = sorted(bridges_client.scheduler_info(n_workers=-1)["workers"])[:1]
    with pytest.raises(MemberFailed, match="MemberStopped: told before"):
        bridges_client.sync(Gang(bridges_client, GangPlan("gang", stopped_first, [None], workers)).run)
    assert leftovers(bridges_client) == {}


def test_a_frozen_child_is_found_and_ended(bridges_client: Client, tmp_path: Path) -> None:
    with (
        dask.config.set({"dask-bridges.hang-timeout": "2s"}),
        running(bridges_client, until_stopped, tmp_path / "up") as (gang, processes),
    ):
        processes[-1].suspend()
        with pytest.raises(MemberLost, match=r"member 1 .* frozen: no heartbeat .* no processor time used"):
            gang.result(30)
        assert_gone(processes)
    assert leftovers(bridges_client) == {}


def test_a_child_that_holds_the_gil_is_not_taken_for_frozen(children: Callable[..., Any]) -> None:
    with dask.config.set({"dask-bridges.hang-timeout": "1s"}):
        assert children(holds_the_gil, 4) == [0, 1]


@pytest.mark.slow
def test_with_the_default_deadlines_40_seconds_with_the_gil_are_no_alarm(children: Callable[..., Any]) -> None:
    assert children(holds_the_gil, 40) == [0, 1]


@pytest.mark.parametrize("function", [until_stopped, never_ending])
def test_children_and_theirs_are_gone_when_a_peer_is_killed(
    bridges_client: Client, tmp_path: Path, function: Function
) -> None:
    with (
        dask.config.set({"dask-bridges.child-stop-timeout": "1s"}),
        running(bridges_client, function, tmp_path / "up") as (gang, processes),
    ):
        processes[-1].kill()
        with pytest.raises(MemberLost, match=r"member 1 .* killed from outside"):
            gang.result(5)
        assert_gone(processes)
    assert leftovers(bridges_client) == {}


@pytest.mark.parametrize("function", [until_stopped, never_ending])
def test_children_are_gone_with_their_killed_worker(
    bridges_doomed_client: Client, tmp_path: Path, function: Function
) -> None:
    with running(bridges_doomed_client, function, tmp_path / "up") as (gang, processes):
        processes[-1].parent().parent().kill()
        with pytest.raises(MemberLost, match="member 1 was lost"):
            gang.result(10)
        assert_gone(processes)
    assert leftovers(bridges_doomed_client) == {}


@pytest.mark.slow
def test_even_frozen_children_are_gone_with_their_killed_worker(bridges_doomed_client: Client, tmp_path: Path) -> None:
    with running(bridges_doomed_client, until_stopped, tmp_path / "up") as (gang, processes):
        worker = processes[-1].parent().parent()
        processes[-1].suspend()
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(MemberLost, match="member 1 was lost"):
            gang.result(10)
        assert_gone(processes)
