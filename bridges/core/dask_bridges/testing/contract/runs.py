"""The contract on clusters, callers and data of every kind."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from distributed import Client, LocalCluster

from dask_bridges import DataError, MemberFailed, PlacementError
from dask_bridges.testing.clusters import command_line_cluster
from dask_bridges.testing.contract.base import ROWS, Contract, make_data, train_in_task
from dask_bridges.testing.faults import Fault, trouble
from dask_bridges.testing.traces import leftovers

__all__ = ["RunContract"]


class RunContract(Contract):
    """It trains wherever and however it is called."""

    # Clusters of every kind

    def test_trains_on_worker_processes(self, bridges_client: Client) -> None:
        X, y = make_data()
        self.check(self.train(bridges_client, X, y), X, y)

    def test_trains_on_threads_of_one_process(self) -> None:
        X, y = make_data()
        with (
            LocalCluster(n_workers=2, threads_per_worker=2, processes=False, dashboard_address=":0") as cluster,
            Client(cluster) as client,
        ):
            self.check(self.train(client, X, y), X, y)
            assert leftovers(client) == {}

    @pytest.mark.parametrize(("nanny", "threads"), [(True, 1), (False, 3)], ids=["nanny", "no nanny, 3 threads"])
    def test_trains_on_workers_started_from_the_command_line(self, nanny: bool, threads: int) -> None:
        X, y = make_data()
        with command_line_cluster(workers=2, threads=threads, nanny=nanny) as cluster:
            client = cluster.client
            self.check(self.train(client, X, y), X, y)
            assert leftovers(client) == {}

    def test_nothing_of_ours_is_needed_on_the_scheduler(self) -> None:
        X, y = make_data()
        with command_line_cluster(workers=2, bare_scheduler=True) as cluster:
            client = cluster.client
            self.check(self.train(client, X, y), X, y)
            with pytest.raises(MemberFailed, match="deliberate"):
                self.train(client, X, y, fault=Fault(1, 0, trouble))
            self.use(client, self.train(client, X, y), X)
            assert leftovers(client) == {}

    def test_waits_for_the_first_worker_of_an_adaptive_cluster(self) -> None:
        X, y = make_data()
        with (
            LocalCluster(n_workers=0, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster,
            Client(cluster) as client,
        ):
            cluster.adapt(minimum=0, maximum=2, interval="100ms")
            self.check(self.train(client, X, y), X, y)

    def test_says_that_no_worker_came(self) -> None:
        X, y = make_data()
        with (
            LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as cluster,
            Client(cluster) as client,
            pytest.raises(PlacementError, match=r"no workers, and none came within 0\.2 s"),
        ):
            self.train(client, X, y, timeout=0.2)

    # Callers of every kind

    def test_an_asynchronous_client_gets_an_awaitable(self, bridges_cluster: LocalCluster) -> None:
        X, y = make_data()

        async def main() -> Any:
            async with Client(bridges_cluster.scheduler_address, asynchronous=True) as client:
                return await self.train(client, X, y)

        self.check(asyncio.run(main()), X, y)

    def test_trains_inside_a_task_of_a_worker_with_one_thread(self, bridges_client: Client) -> None:
        X, y = make_data()
        self.check(bridges_client.submit(train_in_task, self, X, y, pure=False).result(), X, y)

    def test_two_clients_threads_and_tasks_train_at_once(self, bridges_client: Client) -> None:
        X, y = make_data()
        with Client(bridges_client.cluster) as other, ThreadPoolExecutor(4) as pool:
            tasks = [bridges_client.submit(train_in_task, self, X, y, pure=False) for _ in range(3)]
            futures = [pool.submit(self.train, client, X, y) for client in (bridges_client, other) * 2]
            for future in (*futures, *tasks):
                self.check(future.result(), X, y)

    # Data of every kind

    @pytest.mark.parametrize(
        "chunks", [(ROWS,), (0, 1, 119, 0, 120), (200, 20, 20)], ids=["one partition", "empty ones", "unequal ones"]
    )
    def test_trains_on_partitions_as_they_come(self, bridges_client: Client, chunks: tuple[int, ...]) -> None:
        X, y = make_data(chunks)
        self.check(self.train(bridges_client, X, y), X, y)

    def test_rows_that_do_not_match_are_refused_with_both_lengths(self, bridges_client: Client) -> None:
        X, y = make_data()
        with pytest.raises(DataError, match=r"240 rows and \w+ has 210"):
            self.train(bridges_client, X, y[:210])

    def test_a_partition_that_raises_is_named_with_its_collection(self, bridges_client: Client) -> None:
        X, y = make_data()
        broken = y.map_blocks(_fail_on_third, dtype=y.dtype, meta=y._meta)
        with pytest.raises(DataError, match=r"partition 3 of (y|label) could not be computed: TroubleError"):
            self.train(bridges_client, X, broken)


def _fail_on_third(block: Any, block_info: Any = None) -> Any:
    if block_info and block_info[0]["chunk-location"][0] == 3:
        trouble()
    return block
