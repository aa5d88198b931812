"""Gangs side by side on the same devices: each gets all of its own or waits for all."""

from __future__ import annotations

import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster
from tests.core.jobs_at_work import Flags, claimed

from dask_bridges import clients
from dask_bridges.devices import Device, Holder, Leases
from dask_bridges.devices.members import Wanted, leased_together
from dask_bridges.gang import Gang, GangPlan

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(sys.platform == "win32", reason="leases need flock")]


@dataclass(frozen=True)
class Part:
    """What a member is told: whom to wait for before it asks for its device, and which it may have."""

    flags: Flags
    tells: str
    waits_for: tuple[str, ...]
    devices: tuple[Device, ...]


def train(member: Any, part: Part) -> list[str]:
    part.flags.set(part.tells)
    for other in part.waits_for:
        part.flags.wait(other)
    with leased_together(member, Wanted(1, part.devices, 30.0)) as lease:
        assert lease is not None
        with claimed(part.flags, lease.variables["CUDA_VISIBLE_DEVICES"]):
            return [str(name) for name in member.exchange(lease.devices[0].name)]


def run(cluster: LocalCluster, parts: list[Part], workers: list[str]) -> list[Any]:
    with Client(cluster, set_as_default=False) as client:

        async def go() -> list[Any]:
            return await Gang(client, GangPlan("test gang", train, parts, workers, exclusive=False)).run()

        return list(clients.call(client, go))


@pytest.mark.parametrize("turned", [False, True])
def test_two_gangs_that_want_the_same_devices_both_finish(
    bridges_cluster: LocalCluster, bridges_client: Client, flags: Flags, turned: bool
) -> None:
    workers = sorted(bridges_client.scheduler_info(n_workers=-1)["workers"])[:2]
    names = sorted(uuid.uuid4().hex for _ in range(2))
    devices = tuple(Device(name, name) for name in names)
    places = [workers, workers[::-1] if turned else workers]
    # The last member of each asks when the first of both have asked: each of these could have a device by then.
    gangs = [
        [Part(flags, f"{gang}-0", (), devices), Part(flags, f"{gang}-1", ("a-0", "b-0"), devices)] for gang in "ab"
    ]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(run, [bridges_cluster] * 2, gangs, places))
    assert [sorted(told) for gang in found for told in gang] == [names] * 4


def test_gangs_take_turns_at_each_device(tmp_path: Path) -> None:
    one, other = Leases(tmp_path / "leases"), Leases(tmp_path / "leases")  # as of two processes

    class Stopped(Exception):  # noqa: N818
        pass

    def stop() -> None:
        raise Stopped

    with one.turn(["0", "1"]), other.turn(["2"]):
        with pytest.raises(Stopped), other.turn(["1", "3"], stop):
            pass
        with one.turn(["3"], stop):  # the wait has left nothing behind
            pass
        with other.lease([Device("1", "1")], 1, Holder("me")):  # a turn is no lease
            pass
    with other.turn(["1", "3"], stop):
        pass
