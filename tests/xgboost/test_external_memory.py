"""Matrices on the workers' disks: the same models as in memory, of data that are larger, and nothing left behind."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask.array as da
import dask.config
import numpy as np
import pytest
import xgboost as xgb
from distributed import Client, LocalCluster, get_worker
from tests.xgboost.losses import DiesOnce
from tests.xgboost.waiting import wait_on_workers
from xgboost import collective

import dask_xgboost
from dask_bridges import DataError, MemberFailed
from dask_bridges.testing.faults import Hold, TroubleError

pytestmark = pytest.mark.cluster

PARAMS = {"objective": "binary:logistic", "max_depth": 3, "eta": 0.5, "eval_metric": "logloss"}
ROWS, WORKERS = 900, 2


def arrays(seed: int = 1, rows: int = ROWS) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(rows, 4)).astype("float32")
    X[rng.random(X.shape) < 0.1] = np.nan
    y = (X[:, 0] * X[:, 1] + rng.normal(0, 0.5, rows) > 0).astype("float32")
    return da.from_array(X, chunks=(100, 4)), da.from_array(y, chunks=100)


def train(client: Client, X: Any, y: Any = None, **options: Any) -> tuple[list[str], dict[str, Any]]:
    """The trees, and the history of the metrics."""
    history: dict[str, Any] = {}
    options = {"num_boost_round": 5, "progress": False, "evals_result": history} | options
    booster = dask_xgboost.train(client, options.pop("params", PARAMS), X, y, **options)
    return booster.get_dump(with_stats=True), history


def caches(place: Path) -> list[Path]:
    """The folders of matrices below a folder."""
    return sorted(place.glob("dask-bridges-*/xgboost-*"))


def caches_on_workers(client: Client) -> list[Path]:
    """Those in the workers' local directories."""
    local = client.run(lambda dask_worker: dask_worker.local_directory)
    return [cache for place in local.values() for cache in caches(Path(place))]


def wait_until_gone(client: Client, place: Path | None = None) -> None:
    """Wait until no folder is left, on the workers."""
    given = str(place) if place else None
    wait_on_workers(
        client, lambda worker: not [*Path(given or worker.local_directory).glob("dask-bridges-*/*xgboost-*")]
    )


class Looks(xgb.callback.TrainingCallback):
    """Writes down what is in a folder, and how open it is."""

    def __init__(self, place: Path) -> None:
        self.place, self.seen = place, []

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        homes = [*self.place.glob("dask-bridges-*")]
        self.seen = [(stat.S_IMODE(each.stat().st_mode), each.name) for each in (*homes, *caches(self.place))]
        return False


@pytest.fixture
def client(bridges_client: Client) -> Iterator[Client]:
    """Nothing is left for the next test."""
    yield bridges_client
    gc.collect()
    wait_until_gone(bridges_client)


@pytest.mark.parametrize("cuts", ["sketch", pytest.param("quantiles", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "params",
    [
        {"subsample": 0.5, "colsample_bynode": 0.5, "seed": 3},
        pytest.param({"booster": "dart", "rate_drop": 0.5, "seed": 3}, marks=pytest.mark.slow),
        pytest.param({"grow_policy": "lossguide", "max_leaves": 6, "max_depth": 0}, marks=pytest.mark.slow),
        pytest.param({"objective": "reg:absoluteerror", "eval_metric": "mae"}, marks=pytest.mark.slow),
    ],
    ids=["sampled", "dart", "lossguide", "adaptive"],
)
@pytest.mark.filterwarnings("ignore:reg.absoluteerror on")
def test_the_model_is_that_of_matrices_in_memory(client: Client, cuts: str, params: Any) -> None:
    """Bit for bit, on one worker: on several, what is drawn depends on where rows lie."""
    (X, y), valid = arrays(), arrays(2, 300)
    evals = [(X, "train"), (valid, "valid")]
    options = {"params": PARAMS | params, "cuts": cuts, "evals": evals, "n_workers": 1}
    assert train(client, X, y, external_memory=True, **options) == train(client, X, y, **options)


def test_a_folder_may_be_given_and_what_is_in_it_is_private(client: Client, tmp_path: Path) -> None:
    (X, y), valid = arrays(), arrays(2, 300)
    options: Any = {"cuts": "quantiles", "evals": [(X, "train"), (valid, "valid")]}
    looks = Looks(tmp_path)
    _, inside = train(client, X, y, **options)
    outside = train(client, X, y, external_memory=tmp_path, callbacks=[looks], **options)
    for name, log in inside.items():
        np.testing.assert_allclose(outside[1][name]["logloss"], log["logloss"], rtol=1e-5)
    workers = len(client.scheduler_info(n_workers=-1)["workers"])
    assert len(looks.seen) == 1 + 2 * workers  # a folder for each matrix
    assert {mode for mode, _ in looks.seen} == {0o700}
    assert caches_on_workers(client) == []
    there = caches(tmp_path)
    assert train(client, X, y, external_memory=tmp_path, **options) == outside
    assert caches(tmp_path) == there  # what is binned was found again
    del X, y, valid, options
    gc.collect()
    wait_until_gone(client, tmp_path)


@pytest.mark.slow
def test_ranks_without_rows_of_a_set_and_any_kind_of_block_will_do(client: Client) -> None:
    import scipy.sparse

    X, y = arrays()
    few = (X[:100], y[:100])
    for blocks in (X, X.map_blocks(scipy.sparse.csr_matrix)):
        options: Any = {"evals": [(few, "few")], "cuts": "quantiles"}
        outside, inside = (train(client, blocks, y, external_memory=disk, **options)[1] for disk in (True, False))
        np.testing.assert_allclose(outside["few"]["logloss"], inside["few"]["logloss"], rtol=1e-5)


def test_it_is_in_the_local_directory_until_the_matrix_goes(client: Client) -> None:
    X, y = arrays()
    matrix = dask_xgboost.DMatrix(client, X, y, external_memory=True, release=True)
    first = train(client, matrix, evals=[(matrix, "train")])
    kept = caches_on_workers(client)
    assert len(kept) == len(client.scheduler_info(n_workers=-1)["workers"])
    assert train(client, matrix, evals=[(matrix, "train")]) == first
    assert caches_on_workers(client) == kept
    del matrix
    gc.collect()
    wait_until_gone(client)


class Holds(xgb.callback.TrainingCallback):
    def __init__(self, hold: Hold) -> None:
        self.hold = hold

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        self.hold(collective.get_rank(), epoch)
        return False


def test_a_matrix_that_goes_before_the_workers_have_taken_it_leaves_nothing(client: Client) -> None:
    """When the training ends, all their threads have other work."""
    matrix = dask_xgboost.DMatrix(client, *arrays(), external_memory=True)
    workers = list(client.scheduler_info(n_workers=-1)["workers"])
    training, *others = (Hold.new(client) for _ in range(1 + len(workers)))
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        for hold in (training, *others):
            stack.enter_context(hold.released_at_last(client))
        trained = pool.submit(train, client, matrix, callbacks=[Holds(training)])
        assert training.reached(client).wait(timeout=60)
        work = [client.submit(hold, 0, 0, workers=[each], pure=False) for hold, each in zip(others, workers)]
        assert all(hold.reached(client).wait(timeout=20) for hold in others)
        training.released(client).set()
        trained.result(timeout=60)
        del matrix
        gc.collect()
        assert caches_on_workers(client)
    client.gather(work)
    wait_until_gone(client)


@pytest.mark.parametrize("resident", [True, False])
def test_nothing_is_left_of_a_training_that_fails_or_keeps_nothing(client: Client, resident: bool) -> None:
    class Fails(xgb.callback.TrainingCallback):
        def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
            if collective.get_rank() == 1 and epoch == 2:
                raise TroubleError("deliberate")
            return False

    X, y = arrays()
    with dask.config.set({"dask-bridges.xgboost.resident": resident}):
        with pytest.raises(MemberFailed, match="TroubleError: deliberate") as caught:
            train(client, X, y, external_memory=True, callbacks=[Fails()])
        wait_until_gone(client)
        assert caught.value.__cause__ is not None
        if not resident:
            train(client, X, y, external_memory=True)
            wait_until_gone(client)


@pytest.mark.slow
def test_cross_validation_works_on_it(client: Client) -> None:
    X, y = arrays()
    matrices = [dask_xgboost.DMatrix(client, X, y, external_memory=disk) for disk in (False, True)]
    inside, outside = (dask_xgboost.cv(client, PARAMS, each, num_boost_round=4, nfold=3) for each in matrices)
    assert inside.equals(outside)
    del matrices


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"external_memory": "scratch"}, DataError, "external_memory='scratch': give True, .*absolute path"),
        ({"external_memory": 3}, DataError, "external_memory=3: give True"),
        ({"external_memory": "s3://bucket/x"}, DataError, "a folder on the workers' own disks"),
        ({"external_memory": True, "params": PARAMS | {"device": "cuda"}}, DataError, "X is in external memory, .*GPU"),
        ({"external_memory": "/no/such/folder"}, DataError, "can make no folder in /no/such/folder: .*No such file"),
    ],
)
def test_what_cannot_be_is_refused(client: Client, options: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        train(client, *arrays(), **options)


@pytest.mark.slow
def test_a_matrix_says_itself_where_it_is(client: Client) -> None:
    matrix = dask_xgboost.DMatrix(client, *arrays())
    with pytest.raises(DataError, match="X is a DMatrix: pass external_memory when it is made"):
        train(client, matrix, external_memory=True)


# With losses


@dataclass(frozen=True)
class NotesFolders:
    """The folders of matrices that there are, a line each."""

    place: Path | None

    def __call__(self) -> str:
        return "\n".join(map(str, caches(self.place or Path(get_worker().local_directory))))


@pytest.mark.slow
@pytest.mark.parametrize("given", [True, False])
def test_it_goes_on_after_a_loss_and_leaves_nothing_of_the_dead(
    doomed: Client, tmp_path: Path, given: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "dask_xgboost.supervising")  # pytest would keep the error that is logged
    X, y = arrays()
    place = tmp_path / "place"
    place.mkdir()
    disk: Any = place if given else True
    options = {"num_boost_round": 6, "checkpoint_every": 2, "params": PARAMS | {"subsample": 0.5}}
    matrix = dask_xgboost.DMatrix(doomed, X, y, external_memory=disk)
    first = train(doomed, matrix, evals=[(matrix, "train")], **options)
    mark = tmp_path / "died"
    dies = DiesOnce(mark, round_=3, note=NotesFolders(place if given else None))
    assert train(doomed, matrix, evals=[(matrix, "train")], callbacks=[dies], **options) == first
    there = {Path(line) for line in mark.read_text().splitlines()}
    assert len(there) == (2 if given else 1)
    left = {path for path in there if path.exists()}
    assert len(left) == (1 if given else 0)  # the survivor's is used again, unless it was not looked at
    now = caches(place) if given else caches_on_workers(doomed)
    assert len(now) == 2
    del matrix, X, y
    gc.collect()
    wait_until_gone(doomed, place if given else None)


# Larger than memory

LIMIT, TIMES, COLUMNS, EACH = 512 << 20, 4, 100, 10_000


def _drawn(numbers: Any) -> Any:
    """Rows of a partition, 8 MB of them."""
    rng = np.random.default_rng([int(number) for number in numbers.ravel()[:1]])
    return rng.normal(size=(EACH, COLUMNS)) if numbers.size else np.empty((0, COLUMNS))


def _labels(X: Any) -> Any:
    return (X[:, 0] * X[:, 1] > 0).astype("float32")


def drawn_on_workers(partitions: int) -> tuple[Any, Any]:
    numbers = da.arange(partitions, chunks=1)
    shape = ((EACH,) * partitions, (COLUMNS,))
    X = numbers.map_blocks(_drawn, dtype="float64", new_axis=1, chunks=shape, meta=np.empty((0, 0)))
    return X, X.map_blocks(_labels, dtype="float32", drop_axis=1, meta=np.empty(0, "float32"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_it_trains_on_four_times_the_memory_of_a_worker(tmp_path: Path) -> None:
    """Their nannies kill workers that use more than 95 % of it."""
    partitions = -(-TIMES * LIMIT // (8 * COLUMNS * EACH))
    X, y = drawn_on_workers(partitions)
    history: dict[str, Any] = {}
    with (
        LocalCluster(
            2, threads_per_worker=1, memory_limit=LIMIT, local_directory=tmp_path, dashboard_address=":0"
        ) as c,
        Client(c, set_as_default=False) as client,
    ):
        before = set(client.run(os.getpid).values())
        booster = dask_xgboost.train(
            client, {"objective": "binary:logistic", "max_depth": 3, "eta": 1}, X, y, num_boost_round=4,
            external_memory=True, evals=[(X, "train")], evals_result=history, max_restarts=0,
        )  # fmt: skip
        assert set(client.run(os.getpid).values()) == before  # nobody was killed
    rows, labels = (part.compute() for part in drawn_on_workers(3))
    assert booster.num_boosted_rounds() == 4
    error = -np.mean(np.log(np.where(labels, *(lambda p: (p, 1 - p))(booster.inplace_predict(rows)))))
    assert history["train"]["logloss"] == sorted(history["train"]["logloss"], reverse=True)
    assert abs(error - history["train"]["logloss"][-1]) < 0.01  # of some of the same rows
