"""What a training has binned stays on the workers for the next one, and is never taken for something else."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask.array as da
import dask.config
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import xgboost as xgb
from distributed import Client, Scheduler, Worker
from tests.xgboost.losses import DiesOnce
from tests.xgboost.waiting import wait_on_workers
from xgboost import collective

import dask_xgboost
from dask_bridges import PlacementError
from dask_bridges.testing.faults import Hold
from dask_xgboost.supervising import FETCHES, Supervised

pytestmark = pytest.mark.cluster

PARAMS = {"objective": "binary:logistic", "max_depth": 3, "eta": 0.5, "eval_metric": "logloss"}
ROWS = 900


def values(seed: int = 1) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    X = rng.integers(-15, 15, (ROWS, 4)).astype("float32")
    return X, (X[:, 0] * X[:, 1] + rng.normal(0, 40, ROWS) > 0).astype("float32")


def arrays(seed: int = 1) -> tuple[Any, Any]:
    X, y = values(seed)
    return da.from_array(X, chunks=(100, 4)), da.from_array(y, chunks=100)


class Counted:
    """Collections whose partitions leave a mark whenever they are computed."""

    def __init__(self, folder: Path, seed: int = 1) -> None:
        self.folder = folder
        X, self.y = arrays(seed)
        self.X = X.map_blocks(_marked, str(folder), dtype=X.dtype)

    def count(self) -> int:
        return len(list(self.folder.iterdir()))


def _marked(block: Any, folder: str) -> Any:
    if len(block) > 1:  # and not Dask's guess at what comes out
        Path(folder, os.urandom(8).hex()).touch()
    return block


def train(client: Client, X: Any, y: Any, params: Any = None, **options: Any) -> Any:
    """What the model predicts of the rows of seed 1."""
    options = {"num_boost_round": 5, "progress": False, "cuts": "quantiles"} | options
    booster = dask_xgboost.train(client, params or PARAMS, X, y, **options)
    return booster.inplace_predict(values()[0])


def alone(client: Client, X: Any, y: Any, params: Any = None, **options: Any) -> Any:
    """The same where nothing is kept, and partitions may lie elsewhere."""
    with dask.config.set({"dask-bridges.xgboost.resident": False}):
        return train(client, X, y, params, **options)


def same(*predictions: Any) -> bool:
    return all(np.allclose(each, predictions[0], atol=1e-5) for each in predictions)


def kept(client: Client) -> dict[str, list[str]]:
    """What each worker keeps; Dask's own word."""
    return client.run(lambda dask_worker: [key for key in dask_worker.data if str(key).startswith("dask-bridges-m")])


def wait_until_none_is_kept(client: Client) -> None:
    _wait_until(client, lambda key: not key.startswith("dask-bridges-m"))


def _wait_until(client: Client, holds: Callable[[str], bool]) -> None:
    """Wait until it holds for all keys of data on all workers."""
    wait_on_workers(client, lambda worker: all(holds(str(key)) for key in list(worker.data)))


@pytest.fixture
def client(bridges_client: Client) -> Iterator[Client]:
    """Nothing is kept for the next test."""
    yield bridges_client
    gc.collect()
    wait_until_none_is_kept(bridges_client)


def test_the_second_training_reads_nothing_and_gives_the_same_model(client: Client, tmp_path: Path) -> None:
    data = Counted(tmp_path)
    first = train(client, data.X, data.y, evals=[(data.X, "train")])
    once = data.count()
    assert once == data.X.npartitions
    again = train(client, data.X, data.y, evals=[(data.X, "train")])
    less = train(client, data.X, data.y)  # an evaluation set less
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, less)
    assert data.count() == once


def test_evaluation_sets_are_kept_as_well(client: Client, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "valid").mkdir()
    data, valid = Counted(tmp_path / "train"), Counted(tmp_path / "valid", seed=2)
    histories: list[dict[str, Any]] = [{}, {}, {}]
    for history in histories[:2]:
        train(client, data.X, data.y, evals=[((valid.X, valid.y), "valid")], evals_result=history)
    assert (data.count(), valid.count()) == (data.X.npartitions, valid.X.npartitions)
    alone(client, data.X, data.y, evals=[((valid.X, valid.y), "valid")], evals_result=histories[2])
    assert histories[0] == histories[1]
    np.testing.assert_allclose(histories[0]["valid"]["logloss"], histories[2]["valid"]["logloss"], rtol=1e-5)


@pytest.mark.slow
def test_what_is_other_is_binned_anew(client: Client) -> None:
    X, y = arrays()
    others: list[dict[str, Any]] = [
        {"params": PARAMS | {"max_bin": 8}}, {"y": 1 - y}, {"weight": da.from_array(np.arange(ROWS), chunks=100)},
        {"missing": 0.0}, {"feature_weights": [0, 0, 1, 1], "params": PARAMS | {"colsample_bytree": 0.5, "seed": 3}},
        {"cuts": "sketch"}, {},
    ]  # fmt: skip
    for other in others:
        changed = {"X": X, "y": y} | other
        assert same(train(client, **changed), alone(client, **changed)), other


def test_a_frame_that_was_changed_in_place_is_another(client: Client) -> None:
    X, y = values()
    frame = dd.from_pandas(pd.DataFrame(X, columns=list("abcd")).assign(label=y), npartitions=6)
    before = train(client, frame, "label")
    frame["a"] = -frame["b"]
    after = train(client, frame, "label")
    assert same(after, alone(client, frame, "label"))
    assert not same(after, before)


def test_nothing_of_it_runs_any_more_when_a_training_returns(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dask_xgboost.supervising.SETTLED_WITHIN", 30)
    for seed in range(3):
        X, y = arrays(seed)
        train(client, X, y, num_boost_round=20)
        running = [key for keys in client.processing().values() for key in keys]
        assert not [key for key in running if str(key).startswith("dask-bridges-m")]
        assert all(map(any, kept(client).values()))


def test_what_is_kept_goes_with_the_collection(client: Client) -> None:
    X, y = arrays()
    train(client, X, y)
    train(client, X, y)
    assert [len(keys) for keys in kept(client).values()] == [1] * len(kept(client))
    del X
    gc.collect()
    wait_until_none_is_kept(client)


def test_what_is_kept_goes_with_the_matrix(client: Client) -> None:
    matrix = dask_xgboost.DMatrix(client, *arrays())
    np.testing.assert_array_equal(train(client, matrix, None), train(client, matrix, None))
    assert all(kept(client).values())
    del matrix
    gc.collect()
    wait_until_none_is_kept(client)


def test_partitions_are_let_go_of_once_they_are_binned(client: Client, tmp_path: Path) -> None:
    data = Counted(tmp_path)
    matrix = dask_xgboost.DMatrix(client, data.X, data.y, release=True)
    models = [train(client, matrix, None) for _ in range(2)]
    assert data.count() == data.X.npartitions
    _wait_until(client, lambda key: key.startswith("dask-bridges-m"))
    assert same(*models, alone(client, data.X, data.y))
    few = PARAMS | {"max_bin": 8}
    assert same(train(client, matrix, None, few), alone(client, data.X, data.y, few))


@pytest.mark.parametrize("where", ["one worker", "all workers"])
@pytest.mark.parametrize("release", [True, False])
@pytest.mark.slow
def test_where_memory_is_short_it_is_dropped_and_binned_again(client: Client, where: str, release: bool) -> None:
    X, y = arrays()
    matrix = dask_xgboost.DMatrix(client, X, y, release=release)
    valid = dask_xgboost.DMatrix(client, *arrays(seed=2), release=release)
    first = train(client, matrix, None, evals=[(valid, "valid")])
    train(client, matrix, None, evals=[(valid, "valid")])
    workers = list(kept(client))

    def spill(dask_worker: Worker) -> list[bool]:
        """What Dask does from 60 % of the memory limit on."""
        names = [key for key in dask_worker.data if str(key).startswith("dask-bridges-m")]
        while dask_worker.data.fast:
            dask_worker.data.evict()
        return [dask_worker.data[name].built is None for name in names]

    dropped = client.run(spill, workers=workers[:1] if where == "one worker" else workers)
    assert all(len(some) == 2 for some in dropped.values())
    assert all(all(some) for some in dropped.values())
    assert same(first, *(train(client, matrix, None, evals=[(valid, "valid")]) for _ in range(2)))


class OnRank(xgb.callback.TrainingCallback):
    def __init__(self, hold: Any) -> None:
        self.hold = hold

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        self.hold(rank=collective.get_rank(), round=epoch)
        return False


def test_two_trainings_at_a_time_do_not_share_it(client: Client) -> None:
    X, y = arrays()
    expected = [train(client, X, y), alone(client, X, y, PARAMS | {"eta": 0.1})]
    hold = Hold.new(client)
    with hold.released_at_last(client), ThreadPoolExecutor(2) as pool:
        first = pool.submit(train, client, X, y, callbacks=[OnRank(hold)], exclusive=False)
        assert hold.reached(client).wait(timeout=60)
        second = pool.submit(train, client, X, y, PARAMS | {"eta": 0.1}, exclusive=False).result(timeout=60)
        hold.released(client).set()
        assert same(first.result(timeout=60), expected[0])
        assert same(second, expected[1])


def test_nothing_is_kept_where_it_is_not_wanted(client: Client, tmp_path: Path) -> None:
    data = Counted(tmp_path)
    alone(client, data.X, data.y)
    alone(client, data.X, data.y)
    assert data.count() == 2 * data.X.npartitions
    assert not any(kept(client).values())


async def take_away(keys: Sequence[Any], worker: str, to: str, dask_scheduler: Scheduler) -> None:
    """What `Client.rebalance` does."""
    await dask_scheduler.gather_on_worker(to, {key: [worker] for key in keys})
    await dask_scheduler.delete_worker_data(worker, list(keys), "test")


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.slow
def test_partitions_that_are_taken_away_are_brought_back_but_not_for_ever(
    client: Client, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    matrix = dask_xgboost.DMatrix(client, *arrays())
    first = train(client, matrix, None)
    attempt, left = Supervised._attempt, list(range(FETCHES + more))

    async def attempt_without(training: Supervised, *arguments: Any) -> Any:
        if left:
            left.pop()
            here, there, *_ = training._seating.ranks
            matrix.residents.forget(there)
            await client.run_on_scheduler(take_away, matrix.parts.keys_on(there), there, here)
        return await attempt(training, *arguments)

    monkeypatch.setattr(Supervised, "_attempt", attempt_without)
    if more:
        with pytest.raises(PlacementError, match=r"were taken from \['tcp://\S+'\] before .* again and again"):
            train(client, matrix, None)
    assert same(train(client, matrix, None), first)
    assert not left


# With losses


@pytest.mark.slow
def test_what_a_lost_worker_had_is_binned_again_there_alone(doomed: Client, tmp_path: Path) -> None:
    X, y = arrays()
    matrix = dask_xgboost.DMatrix(doomed, X, y)
    options = {"num_boost_round": 6, "checkpoint_every": 2}
    first = train(doomed, matrix, None, **options)
    np.testing.assert_array_equal(train(doomed, matrix, None, **options), first)
    before = kept(doomed)
    mark = tmp_path / "died"
    np.testing.assert_array_equal(train(doomed, matrix, None, callbacks=[DiesOnce(mark)], **options), first)
    np.testing.assert_array_equal(train(doomed, matrix, None, **options), first)
    dead, now = mark.read_text(), kept(doomed)
    assert {worker: keys for worker, keys in now.items() if worker in before} == {
        worker: keys for worker, keys in before.items() if worker != dead
    }
    assert all(now.values())


@pytest.mark.slow
def test_after_a_restart_of_all_workers_all_is_binned_again(doomed: Client, tmp_path: Path) -> None:
    data = Counted(tmp_path)
    first = train(doomed, data.X, data.y)
    once = data.count()
    doomed.restart(timeout=60)
    assert same(train(doomed, data.X, data.y), first)
    assert data.count() == 2 * once
