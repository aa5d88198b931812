"""Jobs that own their devices: what they see, what comes back, how they end, and that nothing stays."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import psutil
import pytest
from distributed import Client, LocalCluster, as_completed, get_client, wait
from tests.core.jobs_at_work import Flags, add, find_in, find_not_in, hold, where

from dask_bridges import MemberFailed, MemberLost, PlacementError
from dask_bridges.events import Event
from dask_bridges.jobs import DevicePool, Job, JobLog, Reported
from dask_bridges.testing import footprint
from dask_bridges.testing.traces import wait_until_same

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(sys.platform != "linux", reason="child processes need Linux")]

FOUR = {"0": ["0", "1"], "1": ["2", "3"]}


@pytest.fixture
def pool(bridges_client: Client) -> Iterator[DevicePool]:
    """Four devices on two workers; nothing is left of it afterwards."""
    before = footprint(bridges_client)
    with DevicePool(bridges_client, devices=FOUR, preload=()) as pool:
        yield pool
    wait_until_same(bridges_client, before, 10)


@pytest.fixture
def flags(tmp_path: Path) -> Flags:
    return Flags(tmp_path)


def gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def wait_until(true: Callable[[], Any], timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


# What a job has


def test_each_job_has_its_own_device_and_its_own_process(pool: DevicePool, flags: Flags) -> None:
    held = [pool.submit(hold, flags, f"up-{number}") for number in range(4)]
    for number in range(4):
        flags.wait(f"up-{number}")
    assert all(row["state"] == "held" for row in pool.status())
    flags.set("go")
    assert sorted(pool.client.gather(held)) == ["0", "1", "2", "3"]
    found = pool.client.gather(pool.map(where, range(12)))
    assert len({pid for _, pid in found}) == 12
    assert {device for device, _ in found} <= {"0", "1", "2", "3"}


def test_several_devices_are_of_one_host(pool: DevicePool) -> None:
    found = {device for device, _ in pool.client.gather(pool.map(where, range(6), gpus=2))}
    assert found <= {"0,1", "2,3"}


def test_halves_share_a_device(pool: DevicePool, flags: Flags) -> None:
    held = [pool.submit(hold, flags, f"up-{number}", gpus=0.5) for number in range(8)]
    for number in range(8):
        flags.wait(f"up-{number}")
    flags.set("go")
    assert sorted(pool.client.gather(held)) == sorted(["0", "1", "2", "3"] * 2)


def test_a_job_knows_what_it_has(pool: DevicePool) -> None:
    def look() -> tuple[Any, ...]:
        job = Job.current()
        return job.key, job.devices, job.share, job.memory

    future = pool.submit(look, gpus=0.5, memory="1 GiB")
    key, devices, share, memory = future.result()
    assert (key, share, memory) == (future.key, 0.5, 2**30)
    assert len(devices) == 1


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


# What goes in and comes out


def test_arguments_and_results_are_ordinary_dask_data(pool: DevicePool) -> None:
    client = pool.client
    (large,) = client.scatter([np.arange(100_000.0)])
    small = client.submit(int, 5)
    result = pool.submit(add, large, small, plus=pool.submit(add, 1, 2))
    np.testing.assert_array_equal(client.submit(np.negative, result).result(), -(np.arange(100_000.0) + 8))


def test_futures_are_found_in_what_is_nested(pool: DevicePool) -> None:
    def sums(nested: dict[str, list[Any]]) -> int:
        return int(sum(nested["numbers"]))

    assert pool.submit(sums, {"numbers": [pool.client.submit(int, 3), 4]}).result() == 7


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


def test_results_of_modules_that_the_worker_lacks_come_to_the_client(pool: DevicePool, tmp_path: Path) -> None:
    (tmp_path / "only_in_jobs.py").write_text("class Thing:\n    value = 5\n")

    def make() -> Any:
        sys.path.insert(0, str(tmp_path))
        import only_in_jobs

        return only_in_jobs.Thing()

    def kind(thing: Any) -> str:
        return type(thing).__name__

    def imported() -> bool:
        return "only_in_jobs" in sys.modules

    future = pool.submit(make)
    wait(future)
    assert not any(pool.client.run(imported).values())

    # Another job gets it as it is, from a worker that has not opened it.
    def value(thing: Any) -> int:
        return int(thing.value)

    with pytest.raises(ModuleNotFoundError):
        pool.submit(value, future).result()
    sys.path.insert(0, str(tmp_path))
    try:
        assert kind(future.result()) == "Thing"
    finally:
        sys.path.remove(str(tmp_path))


def test_jobs_report_while_they_run(pool: DevicePool, flags: Flags) -> None:
    seen: list[Event] = []
    told = threading.Event()

    def notice(event: Event) -> None:
        seen.append(event)
        if isinstance(event, Reported):
            told.set()

    def trains() -> None:
        print("a line")
        Job.current().report(3, loss=0.25)
        flags.wait("go")

    pool.listen(notice)
    future = pool.submit(trains)
    assert told.wait(30)
    assert not future.done()
    flags.set("go")
    future.result()
    (reported,) = [event for event in seen if isinstance(event, Reported)]
    assert (reported.key, reported.step, reported.values) == (future.key, 3, {"loss": 0.25})
    wait_until(lambda: any(isinstance(e, JobLog) and e.text == "a line" for e in seen), 10, "the line never came")


# Order


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


def test_no_device_is_idle_while_a_job_waits(pool: DevicePool, flags: Flags) -> None:
    held = [pool.submit(hold, flags, f"up-{number}") for number in range(3)]
    for number in range(3):
        flags.wait(f"up-{number}")
    for _ in range(10):  # on the fourth, wherever that is
        assert pool.submit(add, 1).result(timeout=30) == 1
    flags.set("go")
    pool.client.gather(held)


def test_the_highest_priority_runs_first(bridges_client: Client, flags: Flags) -> None:
    def note(name: str) -> None:
        with (flags.folder / "order").open("a") as file:
            file.write(f"{name}\n")

    with DevicePool(bridges_client, devices={"0": ["0"]}, preload=()) as pool:
        held = pool.submit(hold, flags, "up")
        flags.wait("up")
        futures = [pool.submit(note, str(priority), priority=priority) for priority in (0, 2, 1)]
        flags.set("go")
        bridges_client.gather([held, *futures])
    assert (flags.folder / "order").read_text().split() == ["2", "1", "0"]


# Ends


def test_what_a_job_raises_is_its_own(pool: DevicePool) -> None:
    def fails() -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        pool.submit(fails).result()
    assert pool.submit(add, 1).result() == 1


@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), MemberLost, r"crashed \(SIGSEGV\)(.|\n)* in dies"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), MemberLost, r"outside \(SIGKILL\)(.|\n)*said last:\nalmost"),
        (lambda: os._exit(0), MemberLost, r"exit code 0, as after os\._exit\(0\)(.|\n)*said last:\nalmost"),
        (lambda: sys.exit(0), MemberFailed, r"raised SystemExit\(0\)"),
    ],
    ids=["segfault", "SIGKILL", "os._exit", "sys.exit"],
)
def test_deaths_are_told_apart_with_the_last_lines(pool: DevicePool, how: Any, kind: Any, says: str) -> None:
    def dies() -> None:
        print("almost")
        how()

    with pytest.raises(kind, match=says):
        pool.submit(dies).result()


def test_a_death_is_charged_to_nobody_else(pool: DevicePool, flags: Flags) -> None:
    workers = pool.client.run(os.getpid)
    neighbours = [pool.submit(hold, flags, f"up-{number}") for number in range(3)]
    for number in range(3):
        flags.wait(f"up-{number}")
    for _ in range(4):  # more often than Dask allows a task's workers to die
        with pytest.raises(MemberLost):
            pool.submit(os._exit, 1).result()
    flags.set("go")
    assert len(pool.client.gather(neighbours)) == 3
    assert pool.client.run(os.getpid) == workers


def test_a_job_is_retried_as_often_as_asked(pool: DevicePool, flags: Flags) -> None:
    def third_time() -> int:
        tries = len(list(flags.folder.glob("try-*"))) + 1
        flags.set(f"try-{tries}")
        if tries < 3:
            os._exit(1)
        return tries

    assert pool.submit(third_time, retries=2).result() == 3


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
        wait_until(lambda: all(map(gone, pids)), 5, f"of {pids} some live on")
        assert waiting.result(timeout=10)[0] == "0"
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


def test_jobs_that_wait_never_run_once_cancelled(bridges_client: Client, flags: Flags) -> None:
    with DevicePool(bridges_client, devices={"0": ["0"]}, preload=()) as pool:
        held = pool.submit(hold, flags, "up")
        flags.wait("up")
        waiting = pool.map(flags.set, ["ran-1", "ran-2"])
        last = pool.submit(where)
        pool.cancel(waiting)
        flags.set("go")
        bridges_client.gather([held, last])
        assert not list(flags.folder.glob("ran-*"))


def test_closing_ends_all_jobs(bridges_client: Client, flags: Flags) -> None:
    before = footprint(bridges_client)
    with DevicePool(bridges_client, devices=FOUR, preload=()) as pool:
        done = pool.submit(add, 1, 1)
        wait(done)
        running = pool.map(hold, [flags] * 6, [f"up-{number}" for number in range(6)])
        pids = [int(flags.wait(f"up-{number}")) for number in range(4)]
    assert all(map(gone, pids))
    assert all(future.cancelled() for future in running)
    assert done.result() == 2
    wait_until_same(bridges_client, before, 10)
    with pytest.raises(PlacementError, match="the pool was closed"):
        pool.submit(add, 1)


def test_as_completed_gives_results_as_they_come(pool: DevicePool) -> None:
    futures = pool.map(add, range(5), plus=10)
    assert sorted(result for _, result in as_completed(futures, with_results=True)) == list(range(10, 15))


# Ways to call


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


def test_status_is_a_table(pool: DevicePool, flags: Flags) -> None:
    future = pool.submit(hold, flags, "up")
    flags.wait("up")
    status = pool.status()
    (held,) = [row for row in status if row["state"] == "held"]
    assert held["holder"] == f"job {future.key}"
    assert held["device"] in repr(status)
    assert f"<td>job {future.key}</td>" in status._repr_html_()
    assert status.unfinished == 1
    flags.set("go")
    future.result()
    assert sum(row["jobs"] for row in pool.status()) == 1


# Bad input


@pytest.mark.parametrize("gpus", [0, -1, -0.5, 0.3, 1.5, float("nan"), float("inf"), "1", None, True])
def test_odd_numbers_of_devices_are_refused(pool: DevicePool, gpus: Any) -> None:
    with pytest.raises(ValueError, match="gpus="):
        pool.submit(add, gpus=gpus)


def test_more_devices_than_any_host_has_are_refused_with_what_there_is(pool: DevicePool) -> None:
    with pytest.raises(PlacementError, match=r"gpus=3.*tcp://.* has 2, tcp://.* has 2"):
        pool.submit(add, gpus=3)


def test_what_cannot_be_pickled_is_refused_by_name(pool: DevicePool) -> None:
    lock = threading.Lock()

    def needs_lock() -> bool:
        return lock.locked()

    with pytest.raises(TypeError, match=r"needs_lock.*cannot be pickled"):
        pool.submit(needs_lock)
    with pytest.raises(TypeError, match="the function to call, not int"):
        pool.submit(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memory=-1"):
        pool.submit(add, memory=-1)


def test_no_device_anywhere_is_refused_with_what_was_looked_at(bridges_client: Client) -> None:
    with pytest.raises(PlacementError, match=r"no worker has a device:\n  tcp://"):
        DevicePool(bridges_client)


def test_devices_of_nobody_are_refused(bridges_client: Client) -> None:
    with pytest.raises(PlacementError, match=r"devices= names \['nobody'\]"):
        DevicePool(bridges_client, devices={"nobody": ["0"]})


def test_a_module_that_workers_lack_is_refused(bridges_client: Client) -> None:
    with pytest.raises(PlacementError, match="no_such_module"):
        DevicePool(bridges_client, devices=FOUR, preload=["no_such_module"])
