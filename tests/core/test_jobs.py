"""Jobs that own their devices: what they see, what comes back, how they end, and that nothing stays."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from distributed import Client, LocalCluster, as_completed, wait
from tests.core.control_groups import control_group, use_too_much
from tests.core.jobs_at_work import FOUR, Flags, add, hold, wait_until, where

from dask_bridges import MemberFailed, MemberLost, PlacementError
from dask_bridges.events import Event
from dask_bridges.jobs import DevicePool, Job, JobLog, Reported
from dask_bridges.testing import footprint
from dask_bridges.testing.traces import wait_until_same

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(sys.platform != "linux", reason="child processes need Linux")]


@pytest.fixture(scope="module")
def shared(bridges_cluster: LocalCluster) -> Iterator[DevicePool]:
    """Four devices on two workers; nothing is left of it afterwards."""
    with Client(bridges_cluster) as client:
        before = footprint(client)
        with DevicePool(client, devices=FOUR, preload=()) as pool:
            yield pool
        wait_until_same(client, before, 10)


@pytest.fixture
def pool(shared: DevicePool) -> Iterator[DevicePool]:
    """Four devices that are free, and free again afterwards."""
    yield shared
    wait_until(lambda: all(row["state"] == "free" for row in shared.status()), 10, "a device is still held")


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


def test_the_next_process_is_forked_while_a_job_runs(pool: DevicePool) -> None:
    def forked() -> float:
        return psutil.Process().create_time()

    def ahead() -> bool:
        submitted = time.time()
        return bool(pool.submit(forked).result() < submitted - 0.02)  # the kernel counts in hundredths

    wait_until(ahead, 10, "every job waits for its process to be forked")


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


def test_no_device_is_idle_while_a_job_waits(pool: DevicePool, flags: Flags) -> None:
    held = [pool.submit(hold, flags, f"up-{number}") for number in range(3)]
    for number in range(3):
        flags.wait(f"up-{number}")
    for _ in range(10):  # on the fourth, wherever that is
        assert pool.submit(add, 1).result(timeout=30) == 1
    flags.set("go")
    pool.client.gather(held)


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


def test_a_job_killed_for_memory_is_told_from_one_that_is_killed_later(pool: DevicePool, flags: Flags) -> None:
    def eats(group: str) -> None:
        print("hungry", flush=True)
        use_too_much(group)

    neighbour = pool.submit(hold, flags, "up")
    pid = int(flags.wait("up"))
    with control_group(100_000_000) as group:
        told = r"killed for memory, by the kernel \(SIGKILL\)(.|\n)*said last:\nhungry"
        with pytest.raises(MemberLost, match=told):
            pool.submit(eats, str(group)).result()
    deadline = time.monotonic() + 3  # what happens within two seconds of each other cannot be told apart
    wait_until(lambda: time.monotonic() > deadline, 10, "never")
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(MemberLost, match=r"killed from outside \(SIGKILL\)"):
        neighbour.result()


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


def test_as_completed_gives_results_as_they_come(pool: DevicePool) -> None:
    futures = pool.map(add, range(5), plus=10)
    assert sorted(result for _, result in as_completed(futures, with_results=True)) == list(range(10, 15))


# Ways to call


def test_status_is_a_table(pool: DevicePool, flags: Flags) -> None:
    before = sum(row["jobs"] for row in pool.status())
    future = pool.submit(hold, flags, "up")
    flags.wait("up")
    status = pool.status()
    (held,) = [row for row in status if row["state"] == "held"]
    assert held["holder"] == f"job {future.key}"
    assert held["device"] in repr(status)
    assert f"<td>job {future.key}</td>" in status._repr_html_()
    assert 0 < held["utilisation"] <= 1
    assert status.unfinished == 1
    flags.set("go")
    future.result()
    wait_until(lambda: sum(row["jobs"] for row in pool.status()) == before + 1, 10, "the job was not counted")


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
    for memory in (-1, "much", object()):
        with pytest.raises(ValueError, match="memory="):
            pool.submit(add, memory=memory)  # type: ignore[arg-type]
