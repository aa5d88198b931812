"""A gang from its start to its end: results, events, failures, cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cloudpickle
import dask.config
import numpy as np
import pytest
from distributed import Client, Event, Future, LocalCluster
from distributed.utils import sync

from dask_bridges import GangTimeout, MemberFailed, MemberLost, PlacementError, turns
from dask_bridges.events import Failed, Finished, Log, Metrics, Progress, Span, Started, topic_of
from dask_bridges.gang import Gang, GangPlan
from dask_bridges.task import WorkerMember
from dask_bridges.testing import leftovers

GangRunner = Callable[..., Any]


# What members do


def hello(member: WorkerMember, payload: Any) -> tuple[int, Any]:
    return member.rank, payload


def speak(member: WorkerMember, payload: Any) -> None:
    with member.span("compute"):
        member.progress(np.int64(1), np.int64(2))
        member.metrics(np.int64(0), {np.str_("loss"): np.float64(0.5)})
    with member.span("communicate"):
        member.exchange()


def until_stopped(member: WorkerMember, up: str) -> None:
    """Run until asked to stop; `up` is set once it runs."""
    stopped = threading.Event()
    member.on_stop(stopped.set)
    Event(up).set()
    assert stopped.wait(60)
    member.check()


def hold(name: str) -> None:
    Event(f"{name}-up").set()
    Event(f"{name}-done").wait(60)


class CollectiveError(RuntimeError):
    """What a framework raises in a rank whose peer has failed."""


def is_collective(error: BaseException) -> bool:
    return isinstance(error, CollectiveError)


def fail_among_echoes(member: WorkerMember, culprit: int) -> None:
    """The culprit raises after its peers have raised what its failure did to them."""
    member.exchange()
    if member.rank == culprit:
        stopped = threading.Event()
        member.on_stop(stopped.set)
        assert stopped.wait(60)
        raise ValueError("the cause")
    raise CollectiveError("ring broken")


def live_ranks(member: WorkerMember) -> list[int]:
    status: dict[str, Any] = sync(member.worker.loop, turns.ask, member.worker, "status")
    return next(gang["live"] for gang in status["gangs"] if gang["gang"] == member.gang)


def fail_then_clean_up(member: WorkerMember, culprit: int) -> None:
    """The culprit tells of its failure; its peers fail while it cleans up."""
    member.exchange()
    if member.rank != culprit:
        stopped = threading.Event()
        member.on_stop(stopped.set)
        assert stopped.wait(60)
        raise RuntimeError("the peers' own")
    try:
        raise ValueError("the cause")
    except ValueError as error:
        member.fail(error)
        while live_ranks(member) != [culprit]:
            pass
        raise


def echo_only(member: WorkerMember, payload: Any) -> None:
    raise CollectiveError("ring broken")


def exit_python(member: WorkerMember, payload: Any) -> None:
    if member.rank == 1:
        sys.exit(3)
    member.exchange()


class HasLock(Exception):  # noqa: N818
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


def raise_unpicklable(member: WorkerMember, payload: Any) -> None:
    if member.rank == 1:
        raise HasLock("with a lock in it")
    member.exchange()


def return_unpicklable(member: WorkerMember, payload: Any) -> Any:
    return threading.Lock()


def explode(rank: int) -> int:
    if rank == 1:
        raise ModuleNotFoundError("No module named 'secret'")
    return rank


class Unreadable:
    """Cannot be unpickled where rank 1 runs."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __reduce__(self) -> tuple[Any, ...]:
        return explode, (self.rank,)


def die_after_failing(member: WorkerMember, payload: Any) -> None:
    """The worker is killed right after its member has told of its failure, before the task has ended."""
    if member.rank == 0:
        tell = member.tell

        def tell_and_die(outcome: str, left: bool = False) -> None:
            tell(outcome, left)
            member.worker.loop.add_callback(member.worker.loop.call_later, 0.02, os.kill, os.getpid(), signal.SIGKILL)
            threading.Event().wait(10)

        member.tell = tell_and_die  # type: ignore[method-assign]
        raise ValueError("root")
    member.exchange()


# Results and events


def test_results_come_by_rank(gang: GangRunner) -> None:
    assert gang(hello, ["a", "b", "c"]) == [(0, "a"), (1, "b"), (2, "c")]


def test_members_run_where_they_were_asked_to(gang: GangRunner, addresses: list[str]) -> None:
    def where(member: WorkerMember, payload: Any) -> str:
        return str(member.worker.address)

    assert gang(where, [0, 1], workers=addresses[:0:-1]) == addresses[:0:-1]


def test_listeners_see_the_whole_run_in_order(gang: GangRunner) -> None:
    seen: list[Any] = []
    also: list[Any] = []
    gang(speak, [0, 1], listeners=[seen.append, also.append])
    assert seen == also
    assert isinstance(seen[0], Span)
    assert (seen[0].rank, seen[0].kind) == (-1, "wait")
    for rank in (0, 1):
        mine = [event for event in seen if event.rank == rank]
        kinds = [Started, Progress, Metrics, Span, Span, Finished]
        assert [type(event) for event in mine] == kinds
        assert [event.kind for event in mine if isinstance(event, Span)] == ["compute", "communicate"]
        assert (mine[1].done, mine[1].total, mine[2].step, mine[2].values) == (1, 2, 0, {"loss": 0.5})


def test_a_listener_that_comes_late_sees_the_whole_run(client: Client, addresses: list[str]) -> None:
    early: list[Any] = []
    late: list[Any] = []

    async def run() -> None:
        gang = Gang(client, GangPlan("test gang", speak, [0, 1], addresses))
        gang.events.listen(early.append)
        await gang.run()
        gang.events.listen(late.append)

    client.sync(run)
    assert late == early != []


def test_another_client_can_read_the_events_afterwards(client: Client, gang: GangRunner) -> None:
    seen: list[Any] = []
    gang(speak, [0, 1], listeners=[seen.append])
    with Client(client.cluster, set_as_default=False) as other:
        stored = [message["event"] for _, message in other.get_events(topic_of(seen[0].gang))]
    assert sorted(stored) == sorted(type(event).__name__ for event in seen if event.rank >= 0)


def test_events_of_an_earlier_attempt_are_not_heard(client: Client, addresses: list[str]) -> None:
    seen: list[Any] = []

    async def run() -> None:
        gang = Gang(client, GangPlan("test gang", as_another_attempt, [0], addresses), attempt=2)
        gang.events.listen(seen.append)
        await gang.run()

    client.sync(run)
    assert {event.attempt for event in seen} == {2}
    assert not any(isinstance(event, Log) for event in seen)


def as_another_attempt(member: WorkerMember, payload: Any) -> None:
    """Say something as a member of the first attempt that was not quick enough to die."""
    member.attempt = 1
    member.log("out of date")
    member.attempt = 2


def test_a_line_of_a_member_is_in_the_log_of_its_worker(client: Client, gang: GangRunner) -> None:
    def say(member: WorkerMember, payload: Any) -> str:
        member.log("here I am", logging.WARNING)
        return member.gang

    name = gang(say, [0, 1])[0]
    lines = [line for log in client.get_worker_logs().values() for _, line in log]
    assert any(f"[gang {name} member 1] here I am" in line for line in lines)


def test_nothing_is_left_behind_on_the_client(
    client: Client, gang: GangRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.sync(asyncio.sleep, 0)
    monkeypatch.setattr("dask_bridges.gang.LINGER", 0)
    handlers = set(client._event_handlers)
    gang(hello, [0, 1])
    client.sync(asyncio.sleep, 0.01)
    assert set(client._event_handlers) == handlers
    assert client.futures == {}


# Turns


def test_who_waits_is_told_for_whom(client: Client, gang: GangRunner, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dask_bridges")
    told = threading.Event()
    seen: list[Any] = []

    def listen(event: Any) -> None:
        seen.append(event)
        if isinstance(event, Log):
            told.set()

    up = Event("told-up", client=client)
    with ThreadPoolExecutor(2) as pool, dask.config.set({"dask-bridges.wait-notice": "10 ms"}):
        first = pool.submit(gang, hold_gang, ["told", "told"])
        assert up.wait(30)
        second = pool.submit(gang, hello, [0, 1], listeners=[listen])
        assert told.wait(30)
        Event("told-done", client=client).set()
        assert second.result() == [(0, 0), (1, 1)]
        first.result()
    notices = [event.text for event in seen if isinstance(event, Log)]
    assert len(notices) == 1
    assert notices[0].startswith("waits for running test gang (gang ")
    assert f"[gang {seen[0].gang}] test gang waits for running test gang" in caplog.text


def hold_gang(member: WorkerMember, name: str) -> None:
    hold(name)


def test_too_few_workers_to_choose_from_are_told_at_once(gang: GangRunner, addresses: list[str]) -> None:
    with pytest.raises(PlacementError, match=f"needs 3 workers, and has 2 to choose from: {addresses[0]}"):
        gang(hello, [0, 1, 2], workers=addresses[:2])


def test_a_turn_that_does_not_come_is_a_timeout_that_says_who_has_it(client: Client, gang: GangRunner) -> None:
    with ThreadPoolExecutor(1) as pool, released(client, "busy"):
        first = pool.submit(gang, hold_gang, ["busy"])
        assert Event("busy-up", client=client).wait(30)
        with pytest.raises(GangTimeout, match=r"no turn within 0\.05 s: waits for running test gang \(gang "):
            gang(hello, [0, 1], timeout=0.05)
        assert not first.done()


@contextlib.contextmanager
def released(client: Client, name: str) -> Iterator[None]:
    """Let what `hold` holds go on at last."""
    try:
        yield
    finally:
        Event(f"{name}-done", client=client).set()


@pytest.mark.parametrize("busy", [1, 2], ids=["one worker busy", "all workers busy"])
def test_members_that_cannot_start_are_a_timeout_that_names_them(
    client: Client, gang: GangRunner, addresses: list[str], busy: int
) -> None:
    names = [f"start-{busy}-{number}" for number in range(busy)]
    with contextlib.ExitStack() as stack:
        for name, worker in zip(names, addresses):
            future = client.submit(hold, name, workers=[worker], pure=False)
            stack.callback(future.result)
            stack.enter_context(released(client, name))
            assert Event(f"{name}-up", client=client).wait(30)
        message = rf"{busy} of 2 members had not started after 0\.2 s: member 0 on {addresses[0]}"
        with pytest.raises(GangTimeout, match=message):
            gang(hello, [0, 1], start_timeout=0.2)
    assert gang(hello, [0, 1]) == [(0, 0), (1, 1)]


# Failures


@pytest.mark.parametrize("function", [fail_among_echoes, fail_then_clean_up])
@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_the_root_cause_is_found_among_its_echoes(
    gang: GangRunner, addresses: list[str], function: Callable[..., Any], culprit: int
) -> None:
    with pytest.raises(MemberFailed, match=f"member {culprit} on .* raised ValueError: the cause") as caught:
        gang(function, [culprit] * 3, collateral=is_collective)
    assert isinstance(caught.value.__cause__, ValueError)
    assert (caught.value.rank, caught.value.worker, caught.value.host) == (culprit, addresses[culprit], "127.0.0.1")


def test_events_tell_the_cause_from_its_echoes(gang: GangRunner) -> None:
    events: list[Any] = []
    with pytest.raises(MemberFailed):
        gang(fail_then_clean_up, [1] * 3, listeners=[events.append])
    causes = {event.rank: event.cause for event in events if isinstance(event, Failed)}
    assert causes == {0: False, 1: True, 2: False}


def test_with_echoes_only_the_first_one_is_told(gang: GangRunner) -> None:
    with pytest.raises(MemberFailed, match="CollectiveError: ring broken"):
        gang(echo_only, [0, 1], collateral=is_collective)


def test_the_traceback_leads_into_the_members_function(gang: GangRunner) -> None:
    def deep_inside(member: WorkerMember, payload: Any) -> None:
        raise ValueError("deep")

    with pytest.raises(MemberFailed) as caught:
        gang(deep_inside)
    trace, names = caught.value.__cause__.__traceback__, []  # type: ignore[union-attr]
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert "deep_inside" in names


def test_sys_exit_is_a_failure_of_its_member(gang: GangRunner, client: Client, addresses: list[str]) -> None:
    with pytest.raises(MemberFailed, match=r"member 1 raised SystemExit\(3\)"):
        gang(exit_python)
    assert sorted(client.scheduler_info(n_workers=-1)["workers"]) == addresses


def test_cancelled_tasks_are_told_apart_from_finished_ones(client: Client, addresses: list[str]) -> None:
    async def run() -> None:
        gang = Gang(client, GangPlan("test gang", until_stopped, ["cancelled-up"], addresses))
        running = asyncio.ensure_future(gang.run())
        await Event("cancelled-up", client=client).wait()
        await client.cancel([Future(key, client) for key in client.futures if gang.id in key])
        await running

    with pytest.raises(MemberLost, match="was cancelled from outside"):
        client.sync(run)


def test_a_closed_client_is_a_clean_error(threads_cluster: LocalCluster, client: Client, addresses: list[str]) -> None:
    doomed = Client(threads_cluster, set_as_default=False)

    def run() -> Any:
        plan = GangPlan("test gang", until_stopped, ["closed-up"], addresses)
        return doomed.sync(Gang(doomed, plan).run)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        assert Event("closed-up", client=client).wait(30)
        doomed.close()
        with pytest.raises(MemberLost, match="the client has lost the scheduler, or was closed"):
            running.result(30)


# Cancellation


def test_a_cancelled_asyncio_task_frees_the_workers(client: Client, gang: GangRunner, addresses: list[str]) -> None:
    async def run() -> None:
        plan = GangPlan("test gang", until_stopped, ["task-up", "task-up"], addresses)
        running = asyncio.ensure_future(Gang(client, plan).run())
        await Event("task-up", client=client).wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    client.sync(run)
    assert gang(hello, [0, 1, 2], timeout=30) == [(0, 0), (1, 1), (2, 2)]


def test_a_cancelled_wait_leaves_the_queue(client: Client, gang: GangRunner, addresses: list[str]) -> None:
    async def waiting() -> None:
        task = asyncio.ensure_future(Gang(client, GangPlan("waits", hello, [0], addresses[:1])).run())
        while len((await turns.ask(client, "status"))["gangs"]) < 2:
            pass
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [entry["label"] for entry in (await turns.ask(client, "status"))["gangs"]] == ["test gang"]

    with ThreadPoolExecutor(1) as pool, released(client, "queue"):
        first = pool.submit(gang, hold_gang, ["queue"])
        assert Event("queue-up", client=client).wait(30)
        client.sync(waiting)
        assert not first.done()


def test_cancelled_at_any_moment_it_leaves_nothing_behind(
    client: Client, gang: GangRunner, addresses: list[str]
) -> None:
    async def run(steps: int) -> None:
        task = asyncio.ensure_future(Gang(client, GangPlan("test gang", hello, [0, 1], addresses)).run())
        for _ in range(steps):  # so many turns of the event loop into its life
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    for steps in range(0, 60, 2):
        client.sync(run, steps)
    assert gang(hello, [0, 1, 2], timeout=30) == [(0, 0), (1, 1), (2, 2)]


_INTERRUPTED = """
import os, signal, sys, threading
from distributed import Client, Event, LocalCluster
from dask_bridges.gang import Gang, GangPlan
from dask_bridges.testing import leftovers

def until_stopped(member, payload):
    stopped = threading.Event()
    member.on_stop(stopped.set)
    Event("up").set()
    stopped.wait(60)
    member.check()

def hello(member, payload):
    return member.rank

with LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster:
    with Client(cluster) as client:
        workers = list(client.scheduler_info(n_workers=-1)["workers"])
        interrupt = lambda: Event("up", client=client).wait(30) and os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=interrupt).start()
        try:
            client.sync(Gang(client, GangPlan("first", until_stopped, [0, 1], workers)).run)
        except KeyboardInterrupt:
            print("interrupted")
        print(client.sync(Gang(client, GangPlan("second", hello, [0, 1], workers, timeout=30)).run))
        print(leftovers(client))
"""


def test_an_interrupted_call_frees_the_workers() -> None:
    run = subprocess.run([sys.executable, "-c", _INTERRUPTED], capture_output=True, text=True)
    assert run.stdout.splitlines() == ["interrupted", "[0, 1]", "{}"], run.stderr


# On worker processes


@pytest.fixture
def processes(bridges_client: Client) -> Iterator[GangRunner]:
    """Runs gangs on worker processes, which have this module by value."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def run(function: Callable[..., Any], payloads: Any = (0, 1), **plan: Any) -> Any:
        workers = sorted(bridges_client.scheduler_info(n_workers=-1)["workers"])[: len(payloads)]
        return bridges_client.sync(Gang(bridges_client, GangPlan("test gang", function, payloads, workers, **plan)).run)

    yield run
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.cluster
def test_functions_of_a_module_registered_by_value_reach_the_workers(processes: GangRunner) -> None:
    assert processes(call_payload, [hello, hello]) == [(0, None), (1, None)]


def call_payload(member: WorkerMember, payload: Callable[..., Any]) -> Any:
    return payload(member, None)


@pytest.mark.cluster
def test_an_exception_that_cannot_be_pickled_still_names_its_member(processes: GangRunner) -> None:
    with pytest.raises(MemberFailed, match=r"member 1 on tcp://.* raised .*with a lock in it"):
        processes(raise_unpicklable)


@pytest.mark.cluster
def test_a_result_that_cannot_be_pickled_is_a_failure(processes: GangRunner) -> None:
    with pytest.raises(MemberFailed, match="a result could not be sent to the client: Could not serialize"):
        processes(return_unpicklable)


@pytest.mark.cluster
def test_a_payload_that_cannot_be_read_on_one_worker_is_the_cause(processes: GangRunner) -> None:
    with pytest.raises(MemberFailed, match=r"member 1 could not start on tcp://.*: ModuleNotFoundError") as caught:
        processes(hello, [Unreadable(0), Unreadable(1)])
    assert caught.value.rank == 1
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.cluster
def test_a_function_that_the_workers_cannot_import_is_named(
    processes: GangRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("only_on_the_client")
    exec("def work(member, payload): return 1", module.__dict__)
    monkeypatch.setitem(sys.modules, "only_on_the_client", module)
    with pytest.raises(MemberFailed, match=r"could not start .*No module named 'only_on_the_client'"):
        processes(module.work)


@pytest.mark.cluster
def test_the_cause_is_told_though_its_worker_dies_right_after(processes: GangRunner, bridges_client: Client) -> None:
    with pytest.raises(MemberFailed, match=r"member 0 on tcp://.* raised ValueError: root"):
        processes(die_after_failing)
    bridges_client.wait_for_workers(3, timeout=60)


@pytest.mark.cluster
def test_a_retired_worker_is_a_lost_member(processes: GangRunner) -> None:
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster) as client:
        workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
        plan = GangPlan("test gang", until_stopped, ["retired-up"] * 2, workers)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(client.sync, Gang(client, plan).run)
            assert Event("retired-up", client=client).wait(30)
            client.retire_workers(workers[:1])
            with pytest.raises(
                MemberLost, match=f"member 0 was lost while it ran, with its worker {workers[0]}: it died or left"
            ):
                running.result(30)
        assert leftovers(client) == {}
