"""The contract where somebody else ends a training: its caller, its cluster, or what killed them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest
from distributed import Client, LocalCluster

from dask_bridges import BridgeError, MemberLost
from dask_bridges.testing.clusters import command_line_cluster
from dask_bridges.testing.contract.base import Contract, make_data, train_in_task
from dask_bridges.testing.faults import Hold
from dask_bridges.testing.traces import wait_until_free

__all__ = ["EndingContract"]

#: A caller in a process of its own: it has the address, and a file with all else.
_CALLER = """
import sys, cloudpickle
from distributed import Client
with open(sys.argv[2], "rb") as file:
    contract, X, y, options = cloudpickle.load(file)
with Client(sys.argv[1]) as client:
    contract.train(client, X, y, **options)
"""


class EndingContract(Contract):
    """Members end with whoever wanted them, and callers hear of what was taken from them."""

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
    def test_members_end_with_their_caller(self, bridges_client: Client, how: signal.Signals, tmp_path: Path) -> None:
        X, y = make_data()
        hold = Hold.new(bridges_client)
        file = tmp_path / "call.pickle"
        file.write_bytes(cloudpickle.dumps((self, X, y, {"fault": hold, "rounds": 1000})))
        command = [sys.executable, "-c", _CALLER, bridges_client.scheduler.address, str(file)]
        caller = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        with hold.released_at_last(bridges_client):
            assert hold.reached(bridges_client).wait(60)
            caller.send_signal(how)
        errors = caller.communicate(timeout=60)[1]
        assert caller.returncode != 0
        assert ("KeyboardInterrupt" in errors) == (how == signal.SIGINT)
        wait_until_free(bridges_client, timeout=self.ends_within)
        self.check(self.train(bridges_client, X, y), X, y)

    def test_members_end_when_their_awaitable_is_cancelled(
        self, bridges_cluster: LocalCluster, bridges_client: Client
    ) -> None:
        X, y = make_data()
        hold = Hold.new(bridges_client)

        async def main() -> None:
            async with Client(bridges_cluster.scheduler_address, asynchronous=True) as client:
                training = asyncio.ensure_future(self.train(client, X, y, fault=hold, rounds=1000))
                assert await hold.reached(client).wait(60)
                training.cancel()
                await hold.released(client).set()
                with pytest.raises(asyncio.CancelledError):
                    await training

        asyncio.run(main())
        wait_until_free(bridges_client, timeout=self.ends_within)
        self.check(self.train(bridges_client, X, y), X, y)

    def test_members_end_when_the_task_around_them_is_cancelled(self, bridges_client: Client) -> None:
        X, y = make_data()
        hold = Hold.new(bridges_client)
        with hold.released_at_last(bridges_client):
            task = bridges_client.submit(train_in_task, self, X, y, fault=hold, rounds=1000, pure=False)
            assert hold.reached(bridges_client).wait(60)
            task.cancel()
        wait_until_free(bridges_client, timeout=self.ends_within)
        self.check(self.train(bridges_client, X, y), X, y)

    def test_an_adaptive_cluster_keeps_the_workers_of_a_training(self) -> None:
        X, y = make_data()
        with (
            LocalCluster(
                n_workers=2, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=":0"
            ) as cluster,
            Client(cluster) as client,
            ThreadPoolExecutor(1) as pool,
        ):
            used, hold = sorted(client.scheduler_info(n_workers=-1)["workers"])[0], Hold.new(client)
            training = pool.submit(self.train, client, X, y, workers=[used], fault=hold)
            with hold.released_at_last(client):
                assert hold.reached(client).wait(60)
                cluster.adapt(minimum=0, maximum=2, interval="50ms", wait_count=2)
                client.sync(_until_workers, client, {used})
            self.check(training.result(60), X, y)

    @pytest.mark.parametrize("how", ["restart", "restart_workers", "retire_workers"])
    def test_workers_taken_away_are_lost_members(self, bridges_doomed_client: Client, how: str) -> None:
        X, y = make_data()
        client, hold = bridges_doomed_client, Hold.new(bridges_doomed_client)
        taken = sorted(client.scheduler_info(n_workers=-1)["workers"])[:1]
        with ThreadPoolExecutor(1) as pool:
            training = pool.submit(self.train, client, X, y, fault=hold, rounds=1000)
            with hold.released_at_last(client):
                assert hold.reached(client).wait(60)
                match how:
                    case "restart":
                        client.restart(wait_for_workers=False)
                    case "restart_workers":
                        client.restart_workers(taken)
                    case "retire_workers":
                        client.retire_workers(taken)
            with pytest.raises(MemberLost, match="was lost") as caught:
                training.result(60)
        assert how == "restart" or caught.value.worker == taken[0]
        wait_until_free(client, timeout=10)
        client.wait_for_workers(2, timeout=60)
        self.check(self.train(client, X, y), X, y)

    def test_a_killed_scheduler_is_a_clean_error_and_the_members_end(self) -> None:
        X, y = make_data()
        with command_line_cluster(workers=2) as cluster, ThreadPoolExecutor(1) as pool:
            hold = Hold.new(cluster.client)
            processes = [psutil.Process(pid) for pid in cluster.client.run(os.getpid).values()]
            training: Any = pool.submit(self.train, cluster.client, X, y, fault=hold, rounds=1000)
            assert hold.reached(cluster.client).wait(60)
            cluster.scheduler.kill()
            with pytest.raises(BridgeError, match="the scheduler is gone"):
                training.result(30)
            assert psutil.wait_procs(processes, timeout=60)[1] == []


async def _until_workers(client: Client, workers: set[str]) -> None:
    """Wait until the cluster has these workers and no others."""
    while set((await client.scheduler.identity(n_workers=-1))["workers"]) != workers:
        pass
