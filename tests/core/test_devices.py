"""Devices: found where they are named, leased to one at a time by all processes of this machine."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.config
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_bridges import BridgeError
from dask_bridges.devices import Device, Holder, Lease, Leases, Usage, devices_here, nvml
from dask_bridges.devices.found import visible

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="leases need flock")

TWO = [Device("0", "0"), Device("1", "1")]
ME = Holder("me")


class Stopped(Exception):  # noqa: N818
    pass


def not_now(tries: int = 2) -> Callable[[], None]:
    """A check that gives up at its second look: nothing was there at the first."""
    looks = iter(range(tries))

    def check() -> None:
        if next(looks) == tries - 1:
            raise Stopped

    return check


def refused(leases: Leases, devices: list[Device], amount: float) -> bool:
    try:
        leases.lease(devices, amount, ME, not_now()).close()
    except Stopped:
        return True
    return False


@pytest.fixture
def leases(tmp_path: Path) -> Leases:
    return Leases(tmp_path / "leases")


# Found


def names(**variables: Any) -> list[str]:
    return [device.name for device in devices_here(**{"named": None, "resources": {}, **variables})]


GPUS = [nvml.GPU(0, "GPU-aaaa-1", "H100", 80), nvml.GPU(1, "GPU-bbbb-2", "H100", 80)]


def test_named_devices_win_over_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(nvml, "gpus", lambda: GPUS)
    assert names(named=["x", "y"]) == ["x", "y"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [("", []), ("-1", []), ("0,2", ["0", "2"]), ("GPU-aaaa, MIG-5", ["GPU-aaaa", "MIG-5"]), ("1,-1,0", ["1"])],
)
def test_the_workers_variable_names_its_devices(
    value: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert names(resources={"GPU": 4}) == expected


def test_all_that_nvml_knows_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(nvml, "gpus", lambda: GPUS)
    assert names() == ["GPU-aaaa-1", "GPU-bbbb-2"]


def test_one_gpu_is_one_device_whatever_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "gpus", lambda: GPUS)
    keys = {device.key for device in devices_here(["1", "GPU-bbbb-2", "GPU-bbbb"], {})}
    assert keys == {"GPU-bbbb-2"}


def test_a_declared_resource_counts_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(nvml, "gpus", list)
    assert names(resources={"GPU": 2}) == ["0", "1"]
    assert names() == []


@given(st.lists(st.sampled_from(["0", "1", "GPU-a", "MIG-b"]), unique=True))
def test_what_is_visible_is_read_as_it_was_written(devices: list[str]) -> None:
    assert visible(",".join(devices)) == devices


# Leased


def test_a_device_is_leased_to_one_at_a_time(leases: Leases) -> None:
    with leases.lease(TWO, 1, ME) as first, leases.lease(TWO, 1, ME) as second:
        assert {lease.devices[0].name for lease in (first, second)} == {"0", "1"}
        assert refused(leases, TWO, 1)
    assert not refused(leases, TWO, 2)


def test_two_devices_are_leased_together_or_not_at_all(leases: Leases) -> None:
    with leases.lease(TWO, 1, ME):
        assert refused(leases, TWO, 2)
        assert not refused(leases, TWO, 1)
    with leases.lease(TWO, 2, ME) as both:
        assert both.variables["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert refused(leases, TWO, 1)


def test_shares_fill_one_device_before_the_next(leases: Leases) -> None:
    halves = [leases.lease(TWO, 0.5, ME) for _ in range(2)]
    assert halves[0].devices == halves[1].devices
    with leases.lease(TWO, 1, ME) as whole:
        assert whole.devices != halves[0].devices
        assert refused(leases, TWO, 0.25)
    for half in halves:
        half.close()


def test_devices_are_granted_in_the_order_asked(leases: Leases) -> None:
    order: list[str] = []
    first = leases.lease(TWO, 1, ME)

    def take(name: str, amount: float) -> None:
        with leases.lease(TWO, amount, Holder(name)):
            order.append(name)

    threads = []
    for name, amount in [("both", 2), ("one", 1)]:
        threads.append(threading.Thread(target=take, args=(name, amount)))
        threads[-1].start()
        while len(leases._requests) < len(threads):  # it waits
            pass
    assert order == []  # one is free, and "one" does not overtake
    first.close()
    for thread in threads:
        thread.join()
    assert order == ["both", "one"]


def _hold(folder: Path, pipe: Any) -> None:
    lease = Leases(folder).lease(TWO[:1], 1, Holder("another session"))
    pipe.send(os.getpid())
    pipe.recv()
    lease.close()
    pipe.send("given back")
    pipe.recv()


@pytest.fixture
def other(leases: Leases) -> Any:
    """Another process, which holds device 0."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_hold, args=(leases.folder, theirs), daemon=True)
    process.start()
    ours.recv()
    yield process, ours
    process.kill()
    process.join()


def test_other_processes_respect_a_lease(leases: Leases, other: Any) -> None:
    _, pipe = other
    assert refused(leases, TWO[:1], 1)
    (row,) = leases.status(TWO[:1])
    assert (row["state"], row["holder"]) == ("held elsewhere", "another session")
    pipe.send("go on")
    pipe.recv()
    assert not refused(leases, TWO[:1], 1)
    assert [row["state"] for row in leases.status(TWO[:1])] == ["free"]


def test_a_crash_frees_its_leases(leases: Leases, other: Any) -> None:
    process, _ = other
    process.kill()
    process.join()
    assert not refused(leases, TWO[:1], 1)


def test_a_device_is_held_as_long_as_somebody_has_inherited_it(leases: Leases) -> None:
    lease = leases.lease(TWO[:1], 1, ME)
    inherited = os.dup(next(iter(lease.descriptors.values())))
    lease.close()
    assert refused(leases, TWO[:1], 1)
    os.close(inherited)
    assert not refused(leases, TWO[:1], 1)


def test_lease_files_are_the_users_alone(leases: Leases) -> None:
    with leases.lease(TWO[:1], 1, ME):
        assert leases.folder.stat().st_mode & 0o777 == 0o700
        (file,) = leases.folder.iterdir()
        assert file.stat().st_mode & 0o777 == 0o600
        assert json.loads(file.read_text())["name"] == "me"


def test_a_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "leases").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BridgeError, match="a symbolic link"):
        Leases(tmp_path / "leases").lease(TWO, 1, ME)


# Not free, though nobody holds it


class Machine:
    """What is in use of device 0."""

    def __init__(self) -> None:
        self.usage = Usage()

    def __call__(self, device: Device) -> Usage:
        return self.usage if device.name == "0" else Usage()


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def probed(machine: Machine, tmp_path: Path) -> Any:
    with dask.config.set({"dask-bridges.device-settle-timeout": "0s"}):
        leases = Leases(tmp_path / "leases", machine)
        leases.lease(TWO, 2, ME).close()  # what is always in use is what is found first
        yield leases


def only(leases: Leases, amount: float = 1) -> Lease:
    return leases.lease(TWO, amount, ME, not_now())


def test_a_device_whose_memory_is_in_use_is_set_aside_until_it_is_free(probed: Leases, machine: Machine) -> None:
    machine.usage = Usage(2**30, ((os.getpid(), 2**30),))
    with only(probed) as lease:
        assert lease.devices == (TWO[1],)
    row = probed.status(TWO)[0]
    assert row["state"] == "set aside"
    assert row["holder"].startswith(f"1.00 GiB of its memory are in use by process {os.getpid()} (")
    assert refused(probed, TWO, 2)
    machine.usage = Usage()
    assert not refused(probed, TWO, 2)
    assert probed.status(TWO)[0]["state"] == "free"


def test_memory_that_nobody_is_seen_to_use_counts(probed: Leases, machine: Machine) -> None:
    machine.usage = Usage(2**30)
    assert refused(probed, TWO[:1], 1)
    assert "nobody that can be seen here" in probed.status(TWO)[0]["holder"]


def test_a_little_memory_is_tolerated(probed: Leases, machine: Machine) -> None:
    machine.usage = Usage(50 * 2**20)
    assert not refused(probed, TWO[:1], 1)


def test_what_is_always_in_use_is_not_waited_for(machine: Machine, tmp_path: Path) -> None:
    machine.usage = Usage(2**30)
    assert not refused(Leases(tmp_path / "leases", machine), TWO[:1], 1)


def test_what_dasks_own_workers_use_is_not_waited_for(probed: Leases, machine: Machine) -> None:
    machine.usage = Usage(2**30, ((4321, 2**30),))
    probed.ignored = {4321}
    assert not refused(probed, TWO[:1], 1)


def test_what_this_process_leaves_in_use_is_not_waited_for(probed: Leases, machine: Machine) -> None:
    with only(probed) as lease:
        machine.usage = Usage(2**30)
        probed.leave_in_use(lease)
    assert not refused(probed, TWO[:1], 1)
    machine.usage = Usage(2 * 2**30)
    assert refused(probed, TWO[:1], 1)


def test_a_device_has_time_to_settle_before_people_are_told(
    probed: Leases, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.usage = Usage(2**30)
    with dask.config.set({"dask-bridges.device-settle-timeout": "1h"}):
        assert refused(probed, TWO[:1], 1)
        assert probed.status(TWO)[0]["state"] == "free"
        assert caplog.text == ""
    assert refused(probed, TWO[:1], 1)
    assert "device 0 is set aside until it is free: 1.00 GiB" in caplog.text
