"""Which workers a gang may use, and what is said when they are of no use."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.array as da
import dask.config
import pytest
from distributed import Client, LocalCluster
from distributed.core import Status

from dask_bridges import PlacementError, placement
from dask_bridges.testing import loopback


def usable(client: Client, **options: Any) -> list[placement.WorkerInfo]:
    return list(client.sync(placement.usable_workers, client, **options))


@contextlib.contextmanager
def paused(cluster: LocalCluster, *addresses: str) -> Iterator[None]:
    """Pause workers, as too much memory in use does."""
    workers = [worker for worker in cluster.workers.values() if worker.address in addresses]
    threshold = workers[0].memory_manager.memory_pause_fraction

    async def turn(old: Status, new: Status) -> None:
        for worker in workers:  # which would itself go on as soon as it sees that there is memory
            worker.memory_manager.memory_pause_fraction = False if new == Status.paused else threshold
            worker.status = new
        while any(cluster.scheduler.workers[worker.address].status != new for worker in workers):
            await asyncio.sleep(0)

    cluster.sync(turn, Status.running, Status.paused)
    try:
        yield
    finally:
        cluster.sync(turn, Status.paused, Status.running)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package, version 1, that only this process can import."""
    module = types.ModuleType("only_here")
    module.__version__ = "1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "only_here", module)
    return "only_here"


def install(client: Client, folder: Path, name: str, text: str, workers: list[str] | None = None) -> None:
    """Put a module on the path of worker processes."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(text)
    client.run(lambda path: sys.path.insert(0, path), str(folder), workers=workers)


# Which workers


def test_all_running_workers_may_be_used(client: Client, addresses: list[str]) -> None:
    found = usable(client)
    assert sorted(worker.address for worker in found) == addresses
    assert {(worker.nthreads, worker.status) for worker in found} == {(1, "running")}


def test_workers_are_chosen_by_address_or_name(client: Client, addresses: list[str]) -> None:
    names = {worker.address: worker.name for worker in usable(client)}
    for wanted in (addresses[1], names[addresses[1]], [addresses[1]], [int(names[addresses[1]]), addresses[1]]):
        assert [worker.address for worker in usable(client, workers=wanted)] == [addresses[1]]


def test_a_name_that_is_not_there_is_told_with_those_that_are(client: Client, addresses: list[str]) -> None:
    with pytest.raises(PlacementError, match=rf"workers=\['nowhere'\] are not in the cluster; .*{addresses[0]}"):
        usable(client, workers=["nowhere", addresses[0]])


@pytest.mark.parametrize("by", ["address", "text of the name", "name"])
def test_a_training_takes_workers_as_they_are_named(client: Client, addresses: list[str], by: str) -> None:
    name = usable(client, workers=addresses[0])[0].name
    chosen: Any = {"address": addresses[0], "text of the name": name, "name": [int(name)]}[by]
    result = loopback.train(client, da.ones((20, 2), chunks=(5, 2)), da.ones(20, chunks=5), workers=chosen)
    assert (result.total, result.rows) == (40, [20])


def test_paused_workers_are_passed_over(client: Client, threads_cluster: LocalCluster, addresses: list[str]) -> None:
    with paused(threads_cluster, addresses[0]):
        assert sorted(worker.address for worker in usable(client)) == addresses[1:]


def test_when_all_are_paused_their_memory_is_shown(
    client: Client, threads_cluster: LocalCluster, addresses: list[str]
) -> None:
    with paused(threads_cluster, *addresses):
        message = rf"none of the 3 workers is running(.|\n)*{addresses[0]} \(paused\): [\d.]+ [kMG]iB of [\d.]+ [kMG]iB"
        with pytest.raises(PlacementError, match=message):
            usable(client)


def test_a_cluster_without_workers_is_told_after_the_timeout() -> None:
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
        pytest.raises(PlacementError, match=r"has no workers, and none came within 0\.05 s"),
    ):
        usable(client, timeout=0.05)


def test_the_first_worker_is_waited_for() -> None:
    with (
        LocalCluster(n_workers=0, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        cluster.adapt(minimum=0, maximum=1, interval="50ms")
        assert len(usable(client, timeout=30)) == 1


# Packages


def check(client: Client, package: str, **options: Any) -> None:
    workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
    client.sync(placement.check_packages, client, workers, [package], **options)


@pytest.mark.cluster
def test_a_package_that_is_missing_is_named_and_may_be_installed_later(
    bridges_client: Client, package: str, tmp_path: Path
) -> None:
    with pytest.raises(
        PlacementError, match=r"worker tcp://.* cannot import only_here \(ModuleNotFoundError.*"
    ) as error:
        check(bridges_client, package, remedy=' ("dask-bridges[here]")')
    assert str(error.value).endswith(f'Install it there, for {sys.executable} ("dask-bridges[here]").')
    install(bridges_client, tmp_path / "second", package, "__version__ = '1'")
    check(bridges_client, package)


@pytest.mark.cluster
def test_a_package_that_fails_to_import_says_how(bridges_client: Client, package: str, tmp_path: Path) -> None:
    install(bridges_client, tmp_path / "broken", "broken_there", "raise OSError('libgomp.so.1 is missing')")
    sys.modules["broken_there"] = sys.modules[package]
    try:
        with pytest.raises(PlacementError, match=r"cannot import broken_there \(OSError: libgomp\.so\.1 is missing\)"):
            check(bridges_client, "broken_there")
    finally:
        del sys.modules["broken_there"]


@pytest.mark.cluster
def test_another_version_is_named_with_both(
    bridges_client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("newer_there")
    module.__version__ = "1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "newer_there", module)
    install(bridges_client, tmp_path / "newer", "newer_there", "__version__ = '2'")
    with pytest.raises(PlacementError, match=r"newer_there is 2 on worker tcp://.* and 1 on the client"):
        check(bridges_client, "newer_there")


# Traffic


def client_of(address: str) -> Any:
    return types.SimpleNamespace(scheduler=types.SimpleNamespace(address=address))


def test_plain_traffic_is_refused_on_a_cluster_with_tls() -> None:
    with pytest.raises(
        PlacementError, match=r"protected by TLS, and the tracker's traffic is plain TCP .*allow_plaintext=True"
    ):
        placement.refuse_plaintext(client_of("tls://10.0.0.1:8786"), None, "the tracker's traffic")


def test_plain_traffic_is_allowed_by_argument_or_configuration_or_where_all_is_plain() -> None:
    placement.refuse_plaintext(client_of("tcp://10.0.0.1:8786"), None, "it")
    placement.refuse_plaintext(client_of("tls://10.0.0.1:8786"), True, "it")
    with dask.config.set({"dask-bridges.allow-plaintext": True}):
        placement.refuse_plaintext(client_of("tls://10.0.0.1:8786"), None, "it")
        with pytest.raises(PlacementError):
            placement.refuse_plaintext(client_of("tls://10.0.0.1:8786"), False, "it")


def test_workers_of_before_are_waited_for_and_come_in_their_order(bridges_client: Client) -> None:
    there = usable(bridges_client)
    names = [worker.name for worker in reversed(there)]

    def back(names: list[str], *, others: bool) -> list[str]:
        found = bridges_client.sync(placement.workers_back, bridges_client, names, others=others)
        return [worker.name for worker in found]

    with dask.config.set({"dask-bridges.worker-return-timeout": "60s"}):
        assert back(names, others=False) == names
        assert back([names[2], "away"], others=True) == [names[2], names[1]]  # another in its place, at once
    with dask.config.set({"dask-bridges.worker-return-timeout": "10ms"}):
        assert back([names[2], "away"], others=False) == [names[2]]
        assert sorted(back([*names, "away"], others=True)) == sorted(names)
        with pytest.raises(PlacementError, match=r"none of the workers \['away'\] is left, and none came back"):
            back(["away"], others=False)
