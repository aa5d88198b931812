"""The contract: what a person may expect of every bridge, as tests that bridge tests subclass."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dask.array as da
import numpy as np
import pytest
from distributed import Client, LocalCluster

from dask_bridges import DataError, GangTimeout, MemberFailed, MemberLost, PlacementError
from dask_bridges.testing.clusters import command_line_cluster, leftovers
from dask_bridges.testing.faults import Fault, Hold, TroubleError, die, leave, trouble

__all__ = ["BridgeContract"]

ROWS, COLUMNS = 240, 3


def make_data(chunk: int | tuple[int, ...] = 30) -> tuple[Any, Any]:
    """Small whole numbers, so that sums and cut points are exact."""
    rng = np.random.default_rng(7)
    X = rng.integers(0, 20, size=(ROWS, COLUMNS)).astype("float32")
    y = (X[:, 0] > X[:, 1]).astype("float32")
    return da.from_array(X, chunks=(chunk, COLUMNS)), da.from_array(y, chunks=(chunk,))


def _train_in_task(contract: BridgeContract, X: Any, y: Any) -> Any:
    """Runs inside a task: the bridge finds the worker's client by itself."""
    return contract.train(None, X, y)


@pytest.mark.cluster
class BridgeContract:
    """Subclass it, name the class ``Test…``, and say how to train and how to check the result."""

    def train(self, client: Client | None, X: Any, y: Any, **options: Any) -> Any:
        """Train for a few rounds.

        `options` are the bridge's own ``workers=``, ``exclusive=`` and ``timeout=``, and ``fault=``,
        to be called with (rank=, round=) on every rank after each round; ``rounds=`` is their number.
        """
        raise NotImplementedError

    def check(self, result: Any, X: Any, y: Any) -> None:
        """Assert that the result is what one process gives on all rows."""
        raise NotImplementedError

    def use(self, client: Client, result: Any, X: Any) -> None:
        """Compute on the cluster with a result, where the bridge has something for that."""

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
        self.check(bridges_client.submit(_train_in_task, self, X, y, pure=False).result(), X, y)

    def test_two_clients_and_two_threads_train_at_once(self, bridges_client: Client) -> None:
        X, y = make_data()
        with Client(bridges_client.cluster) as other, ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(self.train, client, X, y) for client in (bridges_client, other) * 2]
            for future in futures:
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

    # Failures

    @pytest.mark.parametrize("rank", [0, 1, 2])
    def test_the_root_cause_is_raised_and_the_workers_are_free(self, bridges_client: Client, rank: int) -> None:
        X, y = make_data()
        with pytest.raises(MemberFailed, match="TroubleError: deliberate") as caught:
            self.train(bridges_client, X, y, fault=Fault(rank, 1, trouble), rounds=1000)
        assert isinstance(caught.value.__cause__, TroubleError)
        assert caught.value.rank == rank
        assert caught.value.worker in bridges_client.scheduler_info(n_workers=-1)["workers"]
        self.check(self.train(bridges_client, X, y), X, y)

    def test_sys_exit_fails_the_member_and_kills_no_worker(self, bridges_client: Client) -> None:
        X, y = make_data()
        before = set(bridges_client.scheduler_info(n_workers=-1)["workers"])
        with pytest.raises(MemberFailed, match=r"SystemExit\(0\)") as caught:
            self.train(bridges_client, X, y, fault=Fault(1, 1, leave), rounds=1000)
        gone = before - set(bridges_client.scheduler_info(n_workers=-1)["workers"])
        assert caught.value.worker not in gone
        # Of the others only those that the error itself says were restarted, stuck in the framework.
        assert all(worker in " ".join(getattr(caught.value, "__notes__", [])) for worker in gone)

    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_killed_worker_is_named_and_the_next_training_runs(
        self, bridges_doomed_client: Client, rank: int
    ) -> None:
        X, y = make_data()
        with pytest.raises(MemberLost, match=f"member {rank} was lost") as caught:
            self.train(bridges_doomed_client, X, y, fault=Fault(rank, 1, die), rounds=1000)
        assert caught.value.worker in str(caught.value)
        self.check(self.train(bridges_doomed_client, X, y), X, y)

    # Turns

    def test_who_waits_too_long_is_told_for_whom(self, bridges_client: Client) -> None:
        X, y = make_data()
        hold = Hold.new()
        with ThreadPoolExecutor(1) as pool, hold.released_at_last(bridges_client):
            first = pool.submit(self.train, bridges_client, X, y, fault=hold, rounds=2)
            assert hold.reached(bridges_client).wait(30)
            with pytest.raises(GangTimeout, match=r"waits for running .* \(gang [0-9a-f]+\) on tcp://"):
                self.train(bridges_client, X, y, timeout=0.5)
            assert not first.done()
        self.check(self.train(bridges_client, X, y), X, y)

    def test_trainings_that_share_workers_run_at_once(self, bridges_client: Client) -> None:
        X, y = make_data()
        hold = Hold.new()
        with ThreadPoolExecutor(1) as pool, hold.released_at_last(bridges_client):
            first = pool.submit(self.train, bridges_client, X, y, fault=hold, rounds=2, exclusive=False)
            assert hold.reached(bridges_client).wait(30)
            self.check(self.train(bridges_client, X, y, exclusive=False), X, y)
            assert not first.done()

    def test_a_worker_that_joins_later_is_left_out(self) -> None:
        X, y = make_data()
        hold = Hold.new()
        with (
            LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0") as cluster,
            Client(cluster) as client,
            ThreadPoolExecutor(1) as pool,
        ):
            with hold.released_at_last(client):
                first = pool.submit(self.train, client, X, y, fault=hold)
                assert hold.reached(client).wait(30)
                cluster.scale(2)
                client.wait_for_workers(2, timeout=30)
            self.check(first.result(), X, y)

    def test_only_named_workers_are_used(self, bridges_client: Client) -> None:
        X, y = make_data()
        chosen = sorted(bridges_client.scheduler_info(n_workers=-1)["workers"])[:1]
        with pytest.raises(MemberFailed) as caught:
            self.train(bridges_client, X, y, workers=chosen, fault=Fault(0, 0, trouble))
        assert caught.value.worker == chosen[0]
        with pytest.raises(PlacementError, match="nowhere"):
            self.train(bridges_client, X, y, workers=["nowhere"])


def _fail_on_third(block: Any, block_info: Any = None) -> Any:
    if block_info and block_info[0]["chunk-location"][0] == 3:
        trouble()
    return block
