"""The button that ends a training early: after the same round on all ranks, with the model so far."""

from __future__ import annotations

import asyncio
import os
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import pytest
import xgboost as xgb
from distributed import Client
from xgboost import collective

import dask_bridges
import dask_xgboost
from dask_bridges.events import Log, Metrics
from dask_bridges.testing.faults import Hold

pytestmark = pytest.mark.cluster

PARAMS = {"objective": "binary:logistic", "max_depth": 2, "verbosity": 2}
ROUNDS = 500


@dataclass(eq=False)
class Calls(xgb.callback.TrainingCallback):
    """Calls a function after each round of each rank, which may end the training."""

    function: Any

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        return bool(self.function(collective.get_rank(), epoch))


def data() -> tuple[Any, Any]:
    X = np.random.default_rng(3).integers(0, 20, (300, 3)).astype("float32")
    return da.from_array(X, chunks=(50, 3)), da.from_array((X[:, 0] > X[:, 1]).astype("float32"), chunks=50)


def alone(rounds: int) -> xgb.Booster:
    X, y = data()
    return xgb.train(PARAMS, xgb.QuantileDMatrix(X.compute(), y.compute()), rounds)


def assert_same(booster: xgb.Booster, most: int, least: int = 1) -> int:
    """The model is that of one machine after so many rounds: the word to stop may come while the next one begins."""
    rounds = booster.num_boosted_rounds()
    assert least <= rounds <= most
    X = xgb.DMatrix(data()[0].compute())
    np.testing.assert_allclose(booster.predict(X), alone(rounds).predict(X), atol=1e-6)
    return rounds


def begin(pool: ThreadPoolExecutor, client: Client, function: Any, **keywords: Any) -> Future[xgb.Booster]:
    X, y = data()
    return pool.submit(
        dask_xgboost.train, client, PARAMS, X, y, num_boost_round=ROUNDS, evals=[(X, "train")],
        callbacks=[Calls(function)], **keywords,
    )  # fmt: skip


def test_another_client_ends_a_training_after_the_round_it_is_at(bridges_client: Client) -> None:
    hold, history = Hold.new(bridges_client), {}
    with (
        ThreadPoolExecutor() as pool,
        Client(bridges_client.scheduler.address, set_as_default=False) as other,
        hold.released_at_last(bridges_client),
    ):
        training = begin(pool, bridges_client, hold, evals_result=history)
        assert hold.reached(bridges_client).wait(60)
        # The other ranks have decided for themselves to go on, and wait to agree.
        (gang,) = dask_bridges.gangs(other)
        assert (gang.label, gang.state, gang.mine, len(gang.workers)) == ("XGBoost training", "running", False, 3)
        told = gang.events()
        assert [event.values for event in told if isinstance(event, Metrics)] == [
            {"train-logloss": pytest.approx(0.6, abs=0.1)}
        ]
        assert {event.rank for event in told if isinstance(event, Log)} == {0, 1, 2}
        gang.stop()
        (gang,) = dask_bridges.gangs(bridges_client)
        assert (gang.state, gang.mine) == ("finishing", True)
        hold.released(bridges_client).set()
        rounds = assert_same(training.result(60), most=2)
        assert len(history["train"]["logloss"]) == rounds
        assert dask_bridges.gangs(other) == []
        gang.stop()  # it has ended: nothing to do


def test_a_training_that_waits_for_its_turn_ends_after_its_first_round(bridges_client: Client) -> None:
    hold = Hold.new(bridges_client)
    with ThreadPoolExecutor() as pool, hold.released_at_last(bridges_client):
        first = begin(pool, bridges_client, hold)
        assert hold.reached(bridges_client).wait(60)
        second = begin(pool, bridges_client, goes_on)
        while len(found := dask_bridges.gangs(bridges_client)) < 2:
            pass
        assert [gang.state for gang in found] == ["running", "waiting"]
        for gang in found:
            gang.stop()
        hold.released(bridges_client).set()
        assert_same(first.result(60), most=2)
        assert_same(second.result(60), most=1)


@pytest.mark.slow
def test_who_is_lost_after_it_was_asked_to_stop_does_not_make_it_go_on(bridges_doomed_client: Client) -> None:
    client = bridges_doomed_client
    hold = Hold.new(client)
    with ThreadPoolExecutor() as pool, hold.released_at_last(client):
        training = begin(pool, client, hold)
        assert hold.reached(client).wait(60)
        (gang,) = dask_bridges.gangs(client)
        gang.stop()
        (pid,) = client.run(os.getpid, workers=[gang.workers[0]]).values()
        hold.released(client).set()  # for the attempt that follows; this one's rank 0 may be a round further, too
        os.kill(pid, signal.SIGKILL)
        assert training.result(120).num_boosted_rounds() <= 2


def test_a_rank_that_ends_by_itself_ends_all(bridges_client: Client) -> None:
    X, y = data()
    booster = dask_xgboost.train(
        bridges_client, PARAMS, X, y, num_boost_round=ROUNDS, callbacks=[Calls(at_2_on_rank_1)]
    )  # fmt: skip
    assert_same(booster, 3, 3)


def goes_on(rank: int, round_: int) -> bool:
    return False


def at_2_on_rank_1(rank: int, round_: int) -> bool:
    return (rank, round_) == (1, 2)


def test_an_asynchronous_client_stops_what_it_listens_to(bridges_cluster: Any) -> None:
    async def main() -> xgb.Booster:
        async with Client(bridges_cluster.scheduler_address, asynchronous=True) as client:
            third = asyncio.Event()

            def listen(event: Any) -> None:
                if isinstance(event, Metrics) and event.step == 2:
                    third.set()

            X, y = data()
            training = asyncio.ensure_future(
                dask_xgboost.train(
                    client, PARAMS, X, y, num_boost_round=100_000, evals=[(X, "train")], listen=listen
                )
            )  # fmt: skip
            await third.wait()
            (gang,) = await dask_bridges.gangs(client)
            await gang.stop()
            return await training

    assert_same(asyncio.run(main()), 99_999, 3)
