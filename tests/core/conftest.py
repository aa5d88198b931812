"""Clusters that need no worker processes, and gangs on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from distributed import Client, LocalCluster

from dask_bridges import clients
from dask_bridges.gang import Gang, GangPlan
from dask_bridges.testing import leftovers


@pytest.fixture(scope="module")
def threads_cluster() -> Iterator[LocalCluster]:
    """Three workers of one thread each, all in this process."""
    with LocalCluster(n_workers=3, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster:
        yield cluster


@pytest.fixture
def client(threads_cluster: LocalCluster) -> Iterator[Client]:
    """A client of the cluster of threads; afterwards nothing of a gang is left."""
    with Client(threads_cluster) as client:
        yield client
        assert leftovers(client) == {}


@pytest.fixture
def addresses(client: Client) -> list[str]:
    return sorted(client.scheduler_info(n_workers=-1)["workers"])


@pytest.fixture
def gang(client: Client, addresses: list[str]) -> Callable[..., Any]:
    """``gang(function, payloads, **plan)`` runs a gang; `listeners` hear it."""

    def run(
        function: Callable[..., Any],
        payloads: Sequence[Any] = (0, 1),
        *,
        client: Client = client,
        workers: Sequence[str] | None = None,
        listeners: Sequence[Callable[[Any], None]] = (),
        **plan: Any,
    ) -> Any:
        async def go() -> list[Any]:
            candidates = addresses[: len(payloads)] if workers is None else workers
            gang = Gang(client, GangPlan("test gang", function, payloads, candidates, **plan))
            for listener in listeners:
                gang.events.listen(listener)
            return await gang.run()

        return clients.call(client, go)

    return run
