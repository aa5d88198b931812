"""The contract where several trainings want the same workers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from distributed import Client, LocalCluster

from dask_bridges import GangTimeout, MemberFailed, PlacementError
from dask_bridges.testing.contract.base import Contract, make_data
from dask_bridges.testing.faults import Fault, Hold, trouble

__all__ = ["TurnContract"]


class TurnContract(Contract):
    """Workers are given in turn."""

    def test_who_waits_too_long_is_told_for_whom(self, bridges_client: Client) -> None:
        X, y = make_data()
        hold = Hold.new(bridges_client)
        with ThreadPoolExecutor(1) as pool, hold.released_at_last(bridges_client):
            first = pool.submit(self.train, bridges_client, X, y, fault=hold, rounds=2)
            assert hold.reached(bridges_client).wait(90)
            with pytest.raises(GangTimeout, match=r"waits for running .* \(gang [0-9a-f]+\) on tcp://"):
                self.train(bridges_client, X, y, timeout=0.5)
            assert not first.done()
        self.check(self.train(bridges_client, X, y), X, y)

    def test_trainings_that_share_workers_run_at_once(self, bridges_client: Client) -> None:
        X, y = make_data()
        hold = Hold.new(bridges_client)
        with ThreadPoolExecutor(1) as pool, hold.released_at_last(bridges_client):
            first = pool.submit(self.train, bridges_client, X, y, fault=hold, rounds=2, exclusive=False)
            assert hold.reached(bridges_client).wait(90)
            self.check(self.train(bridges_client, X, y, exclusive=False), X, y)
            assert not first.done()

    def test_a_worker_that_joins_later_is_left_out(self) -> None:
        X, y = make_data()
        with (
            LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0") as cluster,
            Client(cluster) as client,
            ThreadPoolExecutor(1) as pool,
        ):
            hold = Hold.new(client)
            with hold.released_at_last(client):
                first = pool.submit(self.train, client, X, y, fault=hold)
                assert hold.reached(client).wait(90)
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
