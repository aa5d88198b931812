"""Which workers train: named ones, those that hold most of the rows, those that declare resources."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dask.array as da
import numpy as np
import pytest
import xgboost as xgb
from distributed import Client, Scheduler, SpecCluster, Worker, get_worker
from xgboost import collective

import dask_xgboost
from dask_bridges import GangTimeout, PlacementError
from dask_bridges.events import Started
from dask_bridges.testing import loopback
from dask_bridges.testing.faults import Hold

pytestmark = pytest.mark.cluster

PARAMS = {"objective": "binary:logistic", "max_depth": 2}
RESOURCES: dict[str, dict[str, float]] = {
    "plain": {},
    "large": {"memory": 64e9},
    "larger": {"memory": 128e9, "fast": 1},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[SpecCluster]:
    """Workers that declare different resources."""
    options = {"protocol": "tcp://", "dashboard_address": ":0", "host": "127.0.0.1"}
    workers = {
        name: {"cls": Worker, "options": {"nthreads": 1, "name": name, "resources": resources, "host": "127.0.0.1"}}
        for name, resources in RESOURCES.items()
    }
    with SpecCluster(workers=workers, scheduler={"cls": Scheduler, "options": options}) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: SpecCluster) -> Iterator[Client]:
    with Client(cluster) as client:
        client.wait_for_workers(3, timeout=60)
        yield client


class Where(xgb.callback.TrainingCallback):
    """Tells which worker is rank 0, and of how many."""

    def before_training(self, model: Any) -> Any:
        self.name, self.world = get_worker().name, collective.get_world_size()
        return model


def addresses(client: Client) -> dict[str, str]:
    return {info["name"]: address for address, info in client.scheduler_info(n_workers=-1)["workers"].items()}


def data(client: Client | None = None, *owners: str) -> tuple[Any, Any]:
    """Rows in partitions of 40, of which the first ones lie on the workers of these names."""
    X = np.random.default_rng(0).integers(0, 20, (240, 2)).astype("float32")
    lazy = da.from_array(X, chunks=(40, 2))
    if client is not None:
        where = addresses(client)
        held = [
            client.scatter(X[at : at + 40], workers=[where[owner]], hash=False)
            for at, owner in zip(range(0, 240, 40), owners)
        ]
        lazy = da.concatenate([da.from_delayed(block, (40, 2), "float32") for block in held])
    return lazy, (lazy[:, 0] > lazy[:, 1]).astype("float32")


def used(client: Client, X: Any, y: Any, **places: Any) -> set[str]:
    """Names of the workers that have trained."""
    seen: list[Any] = []
    booster = dask_xgboost.train(client, PARAMS, X, y, num_boost_round=2, listen=seen.append, **places)
    assert booster.num_boosted_rounds() == 2
    names = {address: name for name, address in addresses(client).items()}
    return {names[event.worker] for event in seen if isinstance(event, Started)}


def test_a_number_of_workers_are_those_that_hold_most(client: Client) -> None:
    owners = ("large", "plain", "plain", "plain", "larger", "larger")
    assert used(client, *data(client, *owners)) == set(RESOURCES)
    assert used(client, *data(client, *owners), n_workers=1) == {"plain"}
    assert used(client, *data(client, *owners), n_workers=2) == {"plain", "larger"}
    assert used(client, *data(client, *owners), n_workers=1, workers=["large", "larger"]) < {"large", "larger"}


@pytest.mark.parametrize(
    ("resources", "wanted"),
    [({"memory": 64e9}, {"large", "larger"}), ({"memory": 1e11}, {"larger"}), ({"fast": 1, "memory": 1}, {"larger"})],
)
def test_resources_choose_workers(client: Client, resources: Any, wanted: set[str]) -> None:
    assert used(client, *data(), resources=resources) == wanted


def test_a_matrix_that_is_there_moves_to_the_workers_that_are_chosen(client: Client) -> None:
    matrix = dask_xgboost.DMatrix(client, *data())
    assert used(client, matrix, None, resources={"memory": 64e9}, n_workers=1) < {"large", "larger"}


@pytest.mark.parametrize("where", ["collections", "memory"])
def test_estimators_take_the_same_words(client: Client, where: str) -> None:
    X, y = data()
    given = (X, y) if where == "collections" else (X.compute(), y.compute())
    model = dask_xgboost.XGBClassifier(n_estimators=2, client=client, callbacks=[Where()])
    for places, wanted in (
        ({"workers": ["large"]}, ("large", 1)),
        ({"resources": {"fast": 1}}, ("larger", 1)),
        ({"n_workers": 1, "workers": ["plain"]}, ("plain", 1)),
    ):
        model.fit(*given, **places, timeout=30)
        assert (model.callbacks[0].name, model.callbacks[0].world) == wanted
    with pytest.raises(PlacementError, match=r"workers=\['nobody'\] are not in the cluster"):
        model.fit(*given, workers=["nobody"])
    with pytest.raises(PlacementError, match=r"a training with resources={'gold': 1}: 0 of the 3 workers will do"):
        model.fit(*given, resources={"gold": 1})
    ranker = dask_xgboost.XGBRanker(n_estimators=2, client=client)
    with pytest.raises(PlacementError, match=r"resources={'gold': 1}"):
        ranker.fit(*given, qid=(X[:, 0] if where == "collections" else given[0][:, 0]), resources={"gold": 1})


def test_more_workers_than_there_are_are_waited_for(client: Client, cluster: SpecCluster) -> None:
    with pytest.raises(
        PlacementError, match=r"n_workers=4: 3 of the 3 workers will do after 0.3 s; there are tcp:.*fast"
    ):
        used(client, *data(), n_workers=4, timeout="300ms")
    with ThreadPoolExecutor() as pool:
        training = pool.submit(used, client, *data(), n_workers=4, timeout="60s")
        worker = cluster.sync(_late_worker, cluster.scheduler_address)
        try:
            assert len(training.result(60)) == 4
        finally:
            cluster.sync(worker.close)


async def _late_worker(scheduler: str) -> Worker:
    return await Worker(scheduler, nthreads=1, name="late", host="127.0.0.1")


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({"n_workers": 0}, "n_workers=0: give a whole number from 1"),
        ({"n_workers": 1.5}, "n_workers=1.5"),
        ({"resources": {"gold": 0}}, r"resources={'gold': 0}: give a number greater than 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(client: Client, places: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        used(client, *data(), **places)


def test_the_turn_is_waited_for_no_longer_than_told(client: Client) -> None:
    X, y = data()
    hold = Hold.new(client)
    with ThreadPoolExecutor() as pool, hold.released_at_last(client):
        held = pool.submit(loopback.train, client, X, y, fault=hold)
        assert hold.reached(client).wait(60)
        with pytest.raises(GangTimeout, match=r"had no turn within 0.1 s: waits for running loopback"):
            dask_xgboost.XGBClassifier(client=client, n_estimators=1).fit(X, y, timeout="100ms")
        hold.released(client).set()
        held.result(60)
