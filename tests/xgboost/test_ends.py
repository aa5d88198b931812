"""How XGBoost's members end: none waits in the collective for ever, and the tracker leaves nothing."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

import dask.config
import psutil
import pytest
import xgboost as xgb
from distributed import Client, Event
from xgboost import collective

import dask_xgboost
from dask_bridges.testing import wait_until_free
from dask_bridges.testing.contract.base import make_data
from dask_xgboost.communicator import _Tracker

PARAMS = {"objective": "binary:logistic", "max_depth": 3}


class StandsStill(xgb.callback.TrainingCallback):
    """Rank 0 stops after its first round for good, and sets an event."""

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        if collective.get_rank() == 0:
            Event("stands-still").set()
            threading.Event().wait()
        return False


@pytest.mark.slow
@pytest.mark.cluster
def test_ranks_that_wait_for_a_peer_end_when_asked_and_their_workers_live_on(bridges_doomed_client: Client) -> None:
    X, y = make_data()
    before = bridges_doomed_client.run(os.getpid)

    async def train_and_cancel() -> None:
        async with Client(bridges_doomed_client.scheduler.address, asynchronous=True) as client:
            callbacks = [StandsStill()]
            training = asyncio.ensure_future(
                dask_xgboost.train(client, PARAMS, X, y, num_boost_round=1000, callbacks=callbacks)
            )
            assert await Event("stands-still", client=client).wait(30)
            training.cancel()
            with pytest.raises(asyncio.CancelledError):
                await training

    with dask.config.set({"dask-bridges.stop-timeout": "2s"}):
        asyncio.run(train_and_cancel())
    wait_until_free(bridges_doomed_client, timeout=10)
    bridges_doomed_client.wait_for_workers(3, timeout=60)
    after = bridges_doomed_client.run(os.getpid)
    assert len(set(before.values()) & set(after.values())) == 2  # all but the worker of rank 0


def held() -> tuple[set[int], int]:
    """Ports that this process listens on, and threads that Python does not know."""
    process = psutil.Process()
    ports = {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    return ports, process.num_threads() - threading.active_count()


@pytest.mark.slow
def test_a_tracker_whose_group_never_forms_is_freed_with_its_port_and_threads() -> None:
    ports, threads = held()
    for _ in range(50):
        tracker = _Tracker(2, "127.0.0.1", range(1))
        tracker.free()
        tracker.free()  # by whoever comes second
    now_ports, now_threads = held()
    assert now_ports <= ports
    assert now_threads <= threads
