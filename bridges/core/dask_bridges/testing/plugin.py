"""pytest plugin: one cluster of worker processes for all tests that can share it."""

from __future__ import annotations

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
    """A LocalCluster of three worker processes with one thread each."""
    from distributed import LocalCluster

    with LocalCluster(n_workers=WORKERS, threads_per_worker=1, dashboard_address=":0") as cluster:
        yield cluster


@pytest.fixture
def bridges_client(bridges_cluster: LocalCluster) -> Iterator[Client]:
    """A client of the shared cluster, with all its workers there; afterwards nothing of a gang is left."""
    from distributed import Client

    from dask_bridges.testing.clusters import leftovers

    with Client(bridges_cluster) as client:
        client.wait_for_workers(WORKERS, timeout=60)
        yield client
        client.wait_for_workers(WORKERS, timeout=60)
        assert leftovers(client) == {}
