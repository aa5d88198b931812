"""pytest plugin: one cluster of worker processes for all tests that can share it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from distributed import Client, LocalCluster

WORKERS = 3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests that need no cluster first: they tell more in less time."""
    items.sort(key=lambda item: item.get_closest_marker("cluster") is not None)


@pytest.fixture(scope="session")
def bridges_cluster() -> Iterator[LocalCluster]:
    """A LocalCluster of three worker processes with one thread each; nothing is killed in it."""
    with _cluster() as cluster:
        yield cluster


@pytest.fixture
def bridges_client(bridges_cluster: LocalCluster) -> Iterator[Client]:
    """A client of the shared cluster, with all its workers there; afterwards nothing of a gang is left."""
    with _client(bridges_cluster) as client:
        yield client
        client.wait_for_workers(WORKERS, timeout=60)


@pytest.fixture
def bridges_doomed_client() -> Iterator[Client]:
    """A client of a cluster of its own, for tests that kill workers: not every nanny brings one back."""
    with _cluster() as cluster, _client(cluster) as client:
        yield client


def _cluster() -> LocalCluster:
    from distributed import LocalCluster

    return LocalCluster(n_workers=WORKERS, threads_per_worker=1, dashboard_address=":0")


@contextlib.contextmanager
def _client(cluster: LocalCluster) -> Iterator[Client]:
    """A client, with deadlines that suit a test; afterwards nothing of a gang is left."""
    import dask
    from distributed import Client

    from dask_bridges.testing.traces import leftovers

    deadlines = {"stop-timeout": "5s", "start-timeout": "60s", "timeout": "60s"}
    with (
        dask.config.set({f"dask-bridges.{name}": value for name, value in deadlines.items()}),
        Client(cluster) as client,
    ):
        client.wait_for_workers(WORKERS, timeout=60)
        yield client
        if left := leftovers(client):
            client.restart()  # or one test would fail all that come after it
        assert left == {}
