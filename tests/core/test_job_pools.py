"""Pools of devices: opened, shared, closed; whose turn it is; jobs that are cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import psutil
import pytest
from distributed import Client, Future, LocalCluster, get_client, get_worker, wait
from tests.core.jobs_at_work import FOUR, Flags, add, find_in, find_not_in, gone, hold, wait_until, where

from dask_bridges import PlacementError
from dask_bridges.jobs import DevicePool, hosting, setup
from dask_bridges.plugins import Children, Plugin
from dask_bridges.testing import footprint
from dask_bridges.testing.traces import wait_until_same

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(sys.platform != "linux", reason="child processes need Linux")]


def waiting(client: Client) -> int:
    """How many jobs wait on the scheduler."""

    def unrunnable(dask_scheduler: Any) -> int:
        return len(dask_scheduler.unrunnable)

    return int(client.run_on_scheduler(unrunnable))


def sent_ahead(client: Client, future: Future) -> str:
    """The worker that a job was sent to, which waits for its device there; returns when it was."""

    def place(dask_scheduler: Any) -> str:
        task = dask_scheduler.tasks.get(future.key)
        return task.processing_on.address if task is not None and task.processing_on else ""

    wait_until(lambda: client.run_on_scheduler(place), 10, "it was not sent ahead")
    return str(client.run_on_scheduler(place))


def make_brief(pool: DevicePool) -> None:
    """Have the pool know that its jobs are brief, so that the next ones are sent ahead."""
    pool.client.gather(pool.map(where, range(8)))


def test_environment_variables_are_set_before_modules_are_imported(bridges_client: Client, tmp_path: Path) -> None:
    (tmp_path / "looks_on_import.py").write_text("import os\nSEEN = os.environ.get('LOOKED_FOR')\n")

    def seen() -> Any:
        return sys.modules["looks_on_import"].SEEN

    with contextlib.ExitStack() as stack:
        for run in (bridges_client.run, lambda function, path: function(path)):
            run(find_in, str(tmp_path))
            stack.callback(run, find_not_in, str(tmp_path))
        pool = stack.enter_context(DevicePool(bridges_client, devices=FOUR, preload=["looks_on_import"]))
        found = [pool.submit(seen, env={"LOOKED_FOR": value}).result() for value in ("a", "b", "a")]
        assert found == ["a", "b", "a"]
        assert pool.submit(seen).result() is None


def test_a_framework_is_told_the_memory_of_its_job_once_it_is_imported(
    bridges_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = Children(("colorsys",), memory="tests.core.jobs_at_work:note_limit")
    monkeypatch.setattr(setup, "installed", lambda: ([Plugin("framework", children=children)], []))

    def told() -> list[list[int]]:
        from tests.core.jobs_at_work import limits

        before = list(limits)
        import colorsys  # noqa: F401

        return [before, limits]

    for preload, before in (((), []), (["colorsys"], [2**30])):  # at once, where it was there before the job
        with DevicePool(bridges_client, devices={"0": ["a"]}, preload=preload) as pool:
            assert pool.submit(told, memory="1 GiB").result(timeout=60) == [before, [2**30]]
            assert pool.submit(told).result(timeout=60) == [[], []]


@pytest.mark.slow
def test_few_of_many_environments_are_kept_ready(bridges_client: Client) -> None:
    def servers() -> int:
        return len(psutil.Process().children())

    before = max(bridges_client.run(servers).values())
    with DevicePool(bridges_client, devices={"0": ["0"]}, preload=()) as pool:
        found = [pool.submit(os.getenv, "WHO", env={"WHO": str(who)}).result() for who in range(7)]
        assert found == list(map(str, range(7)))
        wait_until(lambda: max(bridges_client.run(servers).values()) <= before + 4, 10, "they all live on")


def test_partitions_come_whole_and_can_be_written_to(bridges_client: Client) -> None:
    frame = pd.DataFrame({"x": np.arange(50_000.0), "text": ["a", "b"] * 25_000, "n": pd.array([1, None] * 25_000)})
    futures = bridges_client.compute(dd.from_pandas(frame, npartitions=2).to_delayed())

    def half(part: pd.DataFrame) -> pd.DataFrame:
        part["x"] /= 2
        return part

    with DevicePool(bridges_client, devices=FOUR, preload=()) as pool:
        found = pd.concat(bridges_client.gather(pool.map(half, futures)))
    expected = pd.concat(bridges_client.gather(futures))
    pd.testing.assert_frame_equal(found, expected.assign(x=expected["x"] / 2))


def test_a_large_job_gets_its_turn_under_a_stream_of_small_ones(bridges_client: Client, flags: Flags) -> None:
    def note(name: str) -> None:
        with (flags.folder / "order").open("a") as file:
            file.write(f"{name}\n")

    with DevicePool(bridges_client, devices={"0": ["0", "1", "2", "3"]}, preload=()) as pool:
        first = pool.submit(hold, flags, "up")
        flags.wait("up")
        before = [pool.submit(note, f"before-{number}") for number in range(6)]
        large = pool.submit(note, "large", gpus=4)
        after = [pool.submit(note, f"after-{number}") for number in range(6)]
        wait_until(lambda: waiting(bridges_client) == 7, 10, "they are not queued")
        flags.set("go")
        bridges_client.gather([first, *before, large, *after])
    order = (flags.folder / "order").read_text().split()
    assert order.index("large") == 6


def test_jobs_run_in_the_order_asked(bridges_client: Client, flags: Flags) -> None:
    def note(number: int) -> None:
        with (flags.folder / "order").open("a") as file:
            file.write(f"{number}\n")

    with DevicePool(bridges_client, devices={"0": ["0"]}, preload=()) as pool:
        bridges_client.gather([*pool.map(note, range(11)), pool.submit(note, 11)])
    assert (flags.folder / "order").read_text().split() == list(map(str, range(12)))


def test_the_highest_priority_runs_first(bridges_client: Client, flags: Flags) -> None:
    def note(name: str) -> None:
        with (flags.folder / "order").open("a") as file:
            file.write(f"{name}\n")

    with DevicePool(bridges_client, devices={"0": ["0"]}, preload=()) as pool:
        held = pool.submit(hold, flags, "up")
        flags.wait("up")
        futures = [pool.submit(note, str(priority), priority=priority) for priority in (0, 2, 1)]
        wait_until(lambda: waiting(bridges_client) == 3, 10, "they are not queued")
        flags.set("go")
        bridges_client.gather([held, *futures])
    assert (flags.folder / "order").read_text().split() == ["2", "1", "0"]


def test_a_job_whose_thread_is_held_up_is_not_overtaken(bridges_client: Client, flags: Flags) -> None:
    def first() -> None:
        flags.set("order", "first")

    def second() -> str:
        return (flags.folder / "order").read_text() if (flags.folder / "order").exists() else "nobody"

    def hold_up() -> Any:
        original = hosting.secede

        def slow() -> None:
            original()
            if get_worker().get_current_task().startswith("first-"):
                with contextlib.suppress(AssertionError):
                    wait_until(over.exists, 0.5, "the second job has not overtaken it")

        hosting.secede = slow
        return original

    def let_go(original: Any) -> None:
        hosting.secede = original

    over = flags.folder / "over"
    with contextlib.ExitStack() as stack, DevicePool(bridges_client, devices={"0": ["0"]}, preload=()) as pool:
        original, *_ = bridges_client.run(hold_up).values()
        stack.callback(bridges_client.run, let_go, original)
        held = pool.submit(hold, flags, "up")
        flags.wait("up")
        futures = [pool.submit(first), pool.submit(second)]
        futures[1].add_done_callback(lambda _: over.touch())
        wait_until(lambda: waiting(bridges_client) == 2, 10, "they are not queued")
        flags.set("go")
        bridges_client.gather([held, *futures])
        assert futures[1].result() == "first"


def test_a_cancelled_job_is_gone_with_what_it_has_started(bridges_client: Client, flags: Flags) -> None:
    def starts() -> None:
        same = subprocess.Popen(["sleep", "1000"])
        own = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        flags.set("up", f"{os.getpid()} {same.pid} {own.pid}")
        own.wait()

    with DevicePool(bridges_client, devices={"0": ["0"]}, preload=()) as pool:
        future = pool.submit(starts)
        pids = list(map(int, flags.wait("up").split()))
        waiting = pool.submit(where)
        pool.cancel(future)
        wait_until(lambda: all(map(gone, pids)), 2, f"of {pids} some live on")
        assert waiting.result(timeout=6)[0] == "0"
        assert future.cancelled()


def test_a_cancelled_job_may_clean_up_and_no_longer(bridges_client: Client, flags: Flags) -> None:
    def cleans_up(name: str) -> None:
        signal.signal(signal.SIGTERM, lambda *_: flags.set(f"{name}-cleaned"))
        flags.set(name, str(os.getpid()))
        while True:
            time.sleep(0.01)

    with DevicePool(bridges_client, devices={"0": ["0"]}, preload=()) as pool:
        future = pool.submit(cleans_up, "up")
        pid = int(flags.wait("up"))
        pool.cancel(future)
        flags.wait("up-cleaned")
        wait_until(lambda: gone(pid), 10, "it was not killed")


@pytest.mark.parametrize("brief", [False, True])
def test_jobs_that_wait_never_run_once_cancelled(bridges_client: Client, flags: Flags, brief: bool) -> None:
    def known(future: Future) -> bool:
        """To the scheduler or a worker."""

        def at_scheduler(dask_scheduler: Any) -> bool:
            return future.key in dask_scheduler.tasks

        def at_worker(dask_worker: Any) -> bool:
            return future.key in dask_worker.state.tasks

        return bool(bridges_client.run_on_scheduler(at_scheduler)) or any(bridges_client.run(at_worker).values())

    with DevicePool(bridges_client, devices={"0": ["0"]}, preload=()) as pool:
        if brief:
            make_brief(pool)
        held = pool.submit(hold, flags, "up")
        flags.wait("up")
        waiting = pool.map(flags.set, ["ran-1", "ran-2"])
        last = pool.submit(where)
        if brief:
            sent_ahead(bridges_client, waiting[0])
        pool.cancel(waiting)
        wait_until(lambda: not any(map(known, waiting)), 10, "they are not cancelled")
        flags.set("go")
        bridges_client.gather([held, last])
        assert not list(flags.folder.glob("ran-*"))


# Sent ahead


def test_a_job_sent_ahead_takes_a_device_that_is_free_elsewhere(bridges_client: Client, flags: Flags) -> None:
    with DevicePool(bridges_client, devices={"0": ["0"], "1": ["1"]}, preload=()) as pool:
        make_brief(pool)
        held = [pool.submit(hold, flags, f"up-{number}", f"go-{number}") for number in range(2)]
        for number in range(2):
            flags.wait(f"up-{number}")
        following = pool.submit(where)
        there = sent_ahead(bridges_client, following)
        (other,) = (row for row in pool.status() if row["worker"] != there)
        flags.set(f"go-{[future.key for future in held].index(other['holder'].removeprefix('job '))}")
        assert following.result(timeout=30)[0] == other["device"]
        for number in range(2):
            flags.set(f"go-{number}")
        bridges_client.gather(held)


def test_a_job_sent_ahead_is_passed_by_few_of_those_that_follow(bridges_client: Client, flags: Flags) -> None:
    def note(number: int) -> None:
        with (flags.folder / "order").open("a") as file:
            file.write(f"{number}\n")
        time.sleep(0.1)  # long enough for the next one to be sent

    with DevicePool(bridges_client, devices={"0": ["0"], "1": ["1"]}, preload=()) as pool:
        make_brief(pool)
        held = [pool.submit(hold, flags, f"up-{number}", f"go-{number}") for number in range(2)]
        for number in range(2):
            flags.wait(f"up-{number}")
        first, *others = pool.map(note, range(16))
        there = sent_ahead(bridges_client, first)
        (other,) = (row for row in pool.status() if row["worker"] != there)
        flags.set(f"go-{[future.key for future in held].index(other['holder'].removeprefix('job '))}")
        bridges_client.gather([first, *others])
        assert (flags.folder / "order").read_text().split().index("0") < 10
        for number in range(2):
            flags.set(f"go-{number}")
        bridges_client.gather(held)


def test_a_job_sent_ahead_lets_one_of_higher_priority_pass(bridges_client: Client, flags: Flags) -> None:
    def note(name: str) -> None:
        with (flags.folder / "order").open("a") as file:
            file.write(f"{name}\n")

    with DevicePool(bridges_client, devices={"0": ["0"]}, preload=()) as pool:
        make_brief(pool)
        held = pool.submit(hold, flags, "up")
        flags.wait("up")
        low = pool.submit(note, "low")
        sent_ahead(bridges_client, low)
        high = pool.submit(note, "high", priority=1)
        sent_ahead(bridges_client, high)
        wait_until(lambda: waiting(bridges_client) == 1, 10, "the first was not called back")
        flags.set("go")
        bridges_client.gather([held, low, high])
    assert (flags.folder / "order").read_text().split() == ["high", "low"]


def test_closing_ends_all_jobs(bridges_client: Client, flags: Flags) -> None:
    before = footprint(bridges_client)
    with DevicePool(bridges_client, devices=FOUR, preload=()) as pool:
        done = pool.submit(add, 1, 1)
        wait(done)
        running = pool.map(hold, [flags] * 6, [f"up-{number}" for number in range(6)])
        up = [flags.folder / f"up-{number}" for number in range(6)]  # which of them have a device is not said
        wait_until(lambda: sum(path.exists() for path in up) == 4, 60, "not all devices were taken")
        pids = [int(path.read_text()) for path in up if path.exists()]
    assert all(map(gone, pids))
    assert all(future.cancelled() for future in running)
    assert done.result() == 2
    wait_until_same(bridges_client, before, 10)
    with pytest.raises(PlacementError, match="the pool was closed"):
        pool.submit(add, 1)


def test_a_pool_in_a_task(bridges_client: Client) -> None:
    def uses_a_pool() -> list[int]:
        client = get_client()
        with DevicePool(client, devices={"0": ["0"]}, preload=()) as pool:
            return list(client.gather(pool.map(add, [1, 2])))

    assert bridges_client.submit(uses_a_pool, pure=False, workers=[0]).result() == [1, 2]


def test_a_pool_with_an_asynchronous_client(bridges_cluster: LocalCluster) -> None:
    async def uses_a_pool() -> tuple[Any, int]:
        async with (
            Client(bridges_cluster.scheduler_address, asynchronous=True) as client,
            DevicePool(client, devices=FOUR, preload=()) as pool,
        ):
            result = await pool.submit(add, 1, 2)
            return result, len(await pool.status())

    assert asyncio.run(uses_a_pool()) == (3, 4)


def test_two_pools_share_the_devices(bridges_cluster: LocalCluster, flags: Flags) -> None:
    with (
        Client(bridges_cluster, set_as_default=False) as one,
        Client(bridges_cluster, set_as_default=False) as two,
        DevicePool(one, devices={"0": ["0"]}, preload=()) as first,
        DevicePool(two, devices={"1": ["0"]}, preload=()) as second,
    ):
        held = first.submit(hold, flags, "up")
        flags.wait("up")
        waiting = second.submit(where)
        wait_until(lambda: second.status()[0]["state"] == "held elsewhere", 10, "the lease was not seen")
        assert second.status()[0]["holder"] == f"job {held.key}"
        assert not waiting.done()
        flags.set("go")
        assert waiting.result()[0] == "0"


def test_no_device_anywhere_is_refused_with_what_was_looked_at(bridges_client: Client) -> None:
    with pytest.raises(PlacementError, match=r"no worker has a device:\n  tcp://"):
        DevicePool(bridges_client)


def test_devices_of_nobody_are_refused(bridges_client: Client) -> None:
    with pytest.raises(PlacementError, match=r"devices= names \['nobody'\]"):
        DevicePool(bridges_client, devices={"nobody": ["0"]})


def test_a_module_that_workers_lack_is_refused(bridges_client: Client) -> None:
    with pytest.raises(PlacementError, match="no_such_module"):
        DevicePool(bridges_client, devices=FOUR, preload=["no_such_module"])
