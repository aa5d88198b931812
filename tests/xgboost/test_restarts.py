"""Trainings that go on when workers die: from where, to which model, how often, and what is left."""

from __future__ import annotations

import importlib
import os
import signal
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
from distributed import Client, futures_of, get_worker
from tests.xgboost.losses import die
from xgboost import collective

import dask_xgboost
from dask_bridges import DataError, MemberFailed, MemberLost, PlacementError, safekeeping
from dask_bridges.checkpoints import Checkpoints
from dask_bridges.testing import command_line_cluster, footprint, leftovers, wait_until_free
from dask_bridges.testing.faults import Hold, TroubleError
from dask_bridges.testing.traces import wait_until_same

pytestmark = pytest.mark.cluster

WORKERS, ROWS, COLUMNS, ROUNDS, EVERY = 3, 900, 4, 11, 4
PLAIN = {"objective": "binary:logistic", "max_depth": 3, "eta": 0.5, "seed": 9, "eval_metric": ["auc", "logloss"]}
SAMPLED = PLAIN | {"subsample": 0.5, "colsample_bytree": 0.7, "colsample_bynode": 0.7}
DART = SAMPLED | {"booster": "dart", "rate_drop": 0.4}


@pytest.fixture
def client(doomed: Client) -> Iterator[Client]:
    """Afterwards no worker keeps a state."""
    yield doomed
    wait_until_free(doomed, timeout=10)
    assert [kept for some in doomed.run(lambda: list(safekeeping._kept)).values() for kept in some] == []


def data() -> tuple[Any, Any]:
    """Rows whose cuts depend on which of them are together."""
    rng = np.random.default_rng(1)
    X = rng.normal(size=(ROWS, COLUMNS)).astype("float32")
    y = (X[:, 0] * X[:, 1] + rng.normal(0, 0.4, ROWS) > 0).astype("float32")
    return da.from_array(X, chunks=(100, COLUMNS)), da.from_array(y, chunks=100)


class Diary(xgb.callback.TrainingCallback):
    """Writes down the rounds of each rank, remembers its own, and does something once, or every time."""

    def __init__(self, folder: Path, *deeds: tuple[int, int, Any], again: bool = False) -> None:
        self.folder, self.deeds, self.again = folder, deeds, again
        self.rounds: list[int] = []

    def before_training(self, model: Any) -> Any:
        self._write("begins", collective.get_rank())
        self.rounds = []
        return model

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        rank = collective.get_rank()
        self._write(f"rank {rank}", epoch)
        self.rounds.append(epoch)
        for number, (at_rank, at_round, deed) in enumerate(self.deeds):
            mark = self.folder / f"deed {number}"
            if (rank, epoch) == (at_rank, at_round) and (self.again or not mark.exists()):
                mark.touch()
                deed()
        return False

    def _write(self, name: str, value: int) -> None:
        with (self.folder / name).open("a") as file:
            file.write(f"{value}\n")

    def read(self, name: str) -> list[int]:
        return [int(line) for line in (self.folder / name).read_text().split()]

    @property
    def attempts(self) -> int:
        return self.read("begins").count(0)


@dataclass(frozen=True)
class Dies:
    """Dies where it is called on that worker."""

    worker: str

    def __call__(self) -> None:
        if get_worker().address == self.worker:
            die()


def trouble() -> None:
    raise TroubleError("deliberate")


class Runs:
    """Trainings on the same partitions, which stay where they are."""

    def __init__(self, client: Client, y: Any = None, **options: Any) -> None:
        X, labels = data()
        self.client = client
        self.X = dask_xgboost.DMatrix(client, X, labels if y is None else y)
        self.valid = dask_xgboost.DMatrix(client, *data())
        self.options = options

    def train(self, params: Any, *callbacks: Any, **options: Any) -> tuple[xgb.Booster, Any]:
        history: dict[str, Any] = {}
        defaults = {"num_boost_round": ROUNDS, "checkpoint_every": EVERY, "early_stopping_rounds": 9, **self.options}
        booster = dask_xgboost.train(
            self.client, params, self.X, evals=[(self.valid, "valid")], evals_result=history, callbacks=callbacks,
            **{**defaults, **options},
        )  # fmt: skip
        return booster, history


def same(ours: tuple[xgb.Booster, Any], theirs: tuple[xgb.Booster, Any], rounds: int = ROUNDS) -> None:
    """Bit for bit, with all values of all metrics."""
    assert ours[0].get_dump() == theirs[0].get_dump()
    assert ours[0].save_raw("ubj") == theirs[0].save_raw("ubj")
    assert ours[1] == theirs[1]
    assert [len(values) for values in ours[1]["valid"].values()] == [rounds, rounds]


# To the same model


@pytest.mark.parametrize(
    ("rank", "round_", "back"),
    [
        pytest.param(0, 0, 0, id="first round", marks=pytest.mark.slow),
        pytest.param(1, EVERY - 1, 0, id="before a checkpoint", marks=pytest.mark.slow),
        pytest.param(0, EVERY + 2, EVERY, id="on the way"),
        pytest.param(2, ROUNDS - 1, 2 * EVERY, id="last round", marks=pytest.mark.slow),
    ],
)
def test_a_training_goes_on_when_a_worker_is_killed(
    client: Client, tmp_path: Path, rank: int, round_: int, back: int
) -> None:
    runs = Runs(client)
    oracle = runs.train(SAMPLED)
    before = footprint(client)
    diary = Diary(tmp_path, (rank, round_, die))
    same(runs.train(SAMPLED, diary), oracle)
    other = (rank + 1) % WORKERS
    again = [*range(round_ + 1), *range(back, ROUNDS)]
    if round_ == EVERY - 1:  # its peers may have kept that round before they heard of it
        assert diary.read(f"rank {other}") in (again, [*range(EVERY), *range(EVERY, ROUNDS)])
    else:
        assert diary.read(f"rank {other}") == again
    assert diary.rounds == [*range(ROUNDS)]
    assert diary.attempts == 2
    assert leftovers(client) == {}
    wait_until_same(client, before, timeout=10)


def lethal(function: str, after: bool) -> None:
    """See that a function is the last that this process calls."""
    module, name = function.rsplit(".", 1)
    there = importlib.import_module(module)
    original = getattr(there, name)

    def last(*arguments: Any, **keywords: Any) -> None:
        if after:
            original(*arguments, **keywords)
        die()

    setattr(there, name, last)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("function", "after"),
    [
        pytest.param("dask_xgboost.rank.communicator", False, id="before it joins the others"),
        pytest.param("dask_xgboost.rank.agree", True, id="when all have joined"),
        pytest.param("dask_xgboost.ready.common_cuts", False, id="before cuts are found"),
        pytest.param("dask_xgboost.ready.common_cuts", True, id="when they are found"),
        pytest.param("dask_xgboost.ready.build", True, id="when it has binned its rows"),
        pytest.param("dask_xgboost.rank._boost", True, id="after all rounds"),
        pytest.param("dask_xgboost.rank.TrainResult", False, id="when it has parted from the others"),
    ],
)
def test_it_goes_on_in_whatever_phase_a_worker_is_killed(client: Client, function: str, after: bool, rank: int) -> None:
    if function.endswith("TrainResult") and rank:
        pytest.skip("only rank 0 has a result")
    with dask.config.set({"dask-bridges.xgboost.resident": False}):
        runs = Runs(client, cuts="quantiles")
        oracle = runs.train(SAMPLED)
        before = client.run(os.getpid)
        client.run(lethal, function, after, workers=[runs.X.parts.holding()[rank]])
        same(runs.train(SAMPLED), oracle)
    client.wait_for_workers(WORKERS, timeout=60)
    assert len(set(before.values()) & set(client.run(os.getpid).values())) == WORKERS - 1
    assert leftovers(client) == {}


class Holds(xgb.callback.TrainingCallback):
    def __init__(self, hold: Hold) -> None:
        self.hold = hold

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        self.hold(rank=collective.get_rank(), round=epoch)
        return False


@pytest.mark.slow
@pytest.mark.parametrize("how", ["restarted by its nanny", "retired", "terminated"])
def test_it_goes_on_when_a_worker_is(client: Client, how: str) -> None:
    """Cuts at quantiles do not depend on how many are left."""
    runs, rows = Runs(client, cuts="quantiles"), xgb.DMatrix(data()[0].compute())
    oracle, history = runs.train(PLAIN)
    worker, hold = runs.X.parts.holding()[1], Hold.new(client)
    pid = client.run(os.getpid)[worker]
    with (
        dask.config.set({"dask-bridges.worker-return-timeout": "2s" if how == "retired" else "300s"}),
        ThreadPoolExecutor(1) as pool,
        hold.released_at_last(client),
    ):
        training = pool.submit(runs.train, PLAIN, Holds(hold))
        assert hold.reached(client).wait(60)
        if how == "retired":
            client.retire_workers([worker])
        elif how == "terminated":
            os.kill(pid, signal.SIGTERM)
        else:
            client.restart_workers([worker], timeout=60)
        hold.released(client).set()
        booster, found = training.result(120)
    assert pid not in client.run(os.getpid).values()
    np.testing.assert_allclose(booster.predict(rows), oracle.predict(rows), atol=1e-5)
    for metric, values in history["valid"].items():
        np.testing.assert_allclose(found["valid"][metric], values, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("params", [PLAIN, DART], ids=["plain", "dart"])
def test_it_survives_two_losses(client: Client, tmp_path: Path, params: Any) -> None:
    runs = Runs(client)
    oracle = runs.train(params)
    diary = Diary(tmp_path, (0, 1, die), (2, EVERY + 1, die))
    same(runs.train(params, diary), oracle)
    assert diary.attempts == 3


@pytest.mark.slow
def test_early_stopping_stops_where_it_would_have(client: Client, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 2, ROWS).astype("float32")
    runs = Runs(client, da.from_array(noise, chunks=100), num_boost_round=100, early_stopping_rounds=6)
    oracle = runs.train(PLAIN)
    stopped = len(oracle[1]["valid"]["logloss"])
    assert EVERY < stopped < 100
    ours = runs.train(PLAIN, Diary(tmp_path, (1, stopped - 2, die)))
    same(ours, oracle, stopped)
    assert ours[0].best_iteration == oracle[0].best_iteration


@pytest.mark.slow
def test_all_workers_may_be_lost_at_once(client: Client, tmp_path: Path) -> None:
    runs = Runs(client)
    oracle = runs.train(SAMPLED)
    same(runs.train(SAMPLED, Diary(tmp_path, *((rank, EVERY, die) for rank in range(WORKERS)))), oracle)


@pytest.mark.slow
def test_with_fewer_workers_the_cuts_stay_and_so_does_the_model(tmp_path: Path) -> None:
    rows, coarse = xgb.DMatrix(data()[0].compute()), PLAIN | {"max_bin": 8}
    with (
        dask.config.set({"dask-bridges.worker-return-timeout": "1s"}),
        command_line_cluster(workers=3, nanny=False) as cluster,
    ):
        runs = Runs(cluster.client)
        oracle, history = runs.train(coarse)
        booster, resumed = runs.train(coarse, Diary(tmp_path, (1, EVERY + 1, die)))
        assert len(cluster.client.scheduler_info(n_workers=-1)["workers"]) == 2
        anew = runs.train(coarse)[0]
    np.testing.assert_allclose(booster.predict(rows), oracle.predict(rows), atol=1e-5)
    assert np.abs(anew.predict(rows) - oracle.predict(rows)).max() > 1e-3  # with other cuts
    for metric, values in history["valid"].items():
        np.testing.assert_allclose(resumed["valid"][metric], values, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("persisted", [False, True])
def test_collections_are_computed_again_where_they_are_lost(
    client: Client, tmp_path: Path, rows: Any, named: bool, persisted: bool
) -> None:
    X, y = (
        da.from_array(values, chunks=(70, *values.shape[1:])) for values in (rows.X, rows.labels["binary:logistic"])
    )
    workers = sorted(client.scheduler_info(n_workers=-1)["workers"])[:2] if named else None
    if persisted:  # on one worker, from which it is spread
        on = (workers or list(client.scheduler_info(n_workers=-1)["workers"]))[:1]
        X, y = client.persist([X, y], workers=on, allow_other_workers=True)
        for future in futures_of([X, y]):
            future.result()
    names = [client.scheduler_info(n_workers=-1)["workers"][worker]["name"] for worker in workers] if workers else None
    diary, history = Diary(tmp_path, (1, EVERY, die)), {}
    booster = dask_xgboost.train(
        client, PLAIN, X, y, num_boost_round=ROUNDS, checkpoint_every=EVERY, evals=[(X, "train")],
        evals_result=history, callbacks=[diary], workers=names,
    )  # fmt: skip
    assert diary.attempts == 2
    alone, evals = xgb.QuantileDMatrix(rows.X, rows.labels["binary:logistic"]), {}
    oracle = xgb.train(PLAIN, alone, ROUNDS, evals=[(alone, "train")], evals_result=evals, verbose_eval=False)
    np.testing.assert_allclose(booster.inplace_predict(rows.X), oracle.inplace_predict(rows.X), atol=1e-5)
    np.testing.assert_allclose(history["train"]["logloss"], evals["train"]["logloss"], atol=1e-5)


@pytest.mark.slow
def test_it_goes_on_inside_a_task(client: Client, tmp_path: Path) -> None:
    workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
    names = [client.scheduler_info(n_workers=-1)["workers"][worker]["name"] for worker in workers]
    diary = Diary(tmp_path, (1, EVERY, die))

    def inside() -> int:
        with dask.config.set({"dask-bridges.worker-return-timeout": "60s"}):
            X, y = data()
            booster = dask_xgboost.train(
                None, PLAIN, X, y, num_boost_round=ROUNDS, callbacks=[diary], workers=names[1:]
            )
            return int(booster.num_boosted_rounds())

    assert client.submit(inside, workers=workers[:1], pure=False).result(120) == ROUNDS
    assert diary.attempts == 2


# With a place for checkpoints


class KillingCheckpoints(Checkpoints):
    """Kills the worker that keeps the second checkpoint, when all of it but the manifest is written."""

    def _put_files(self, folder: str, files: Any) -> None:
        super()._put_files(folder, files)
        mark = Path(self._root).with_name("mark")
        if self.steps() and not mark.exists():
            mark.touch()
            die()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["path", "file://", "killed while it keeps one"])
def test_it_goes_on_from_a_place_that_is_given(client: Client, tmp_path: Path, kind: str) -> None:
    place: Any = {"path": tmp_path / "kept", "file://": (tmp_path / "kept").as_uri()}.get(kind)
    deeds = [(0, EVERY + 1, die)] if place else []
    diary, runs = Diary(tmp_path, *deeds), Runs(client)
    oracle = runs.train(SAMPLED)
    same(runs.train(SAMPLED, diary, checkpoint=place or KillingCheckpoints(tmp_path / "kept")), oracle)
    assert diary.attempts == 2
    assert Checkpoints(tmp_path / "kept").steps() == [EVERY, 2 * EVERY]


@pytest.mark.slow
def test_a_later_call_goes_on_from_it(client: Client, tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    kept, runs = tmp_path / "kept", Runs(client)
    oracle = runs.train(SAMPLED)
    with pytest.raises(MemberLost):
        runs.train(SAMPLED, Diary(folders[0], (1, EVERY + 1, die)), checkpoint=kept, max_restarts=0)
    client.wait_for_workers(WORKERS, timeout=60)
    diary = Diary(folders[1])
    same(runs.train(SAMPLED, diary, checkpoint=kept), oracle)
    assert diary.read("rank 0") == [*range(EVERY, ROUNDS)]
    with pytest.raises(DataError, match="is of another training, with other params"):
        runs.train(PLAIN, checkpoint=kept)
    with pytest.raises(DataError, match="is of round 8, and num_boost_round is 5"):
        runs.train(SAMPLED, checkpoint=kept, num_boost_round=5)


# When it is given up


def test_what_the_user_raises_is_not_tried_again(bridges_client: Client, tmp_path: Path) -> None:
    diary = Diary(tmp_path, (1, EVERY, trouble), again=True)
    with pytest.raises(MemberFailed, match="TroubleError: deliberate"):
        Runs(bridges_client).train(SAMPLED, diary)
    assert diary.attempts == 1
    assert [kept for some in bridges_client.run(lambda: list(safekeeping._kept)).values() for kept in some] == []


@pytest.mark.slow
def test_a_bug_that_kills_at_the_same_round_is_told_after_two_more_attempts(client: Client, tmp_path: Path) -> None:
    diary = Diary(tmp_path, (1, EVERY + 1, die), again=True)
    with pytest.raises(MemberLost, match=r"member 1 was lost .*killed by signal 9") as caught:
        Runs(client).train(SAMPLED, diary, max_restarts=10)
    assert diary.attempts == 3
    assert caught.value.__notes__[1:] == [f"The last 2 attempts, of 3, came no further than round {EVERY + 2}."]
    assert leftovers(client) == {}


@pytest.mark.slow
def test_it_is_started_again_no_more_often_than_allowed(client: Client, tmp_path: Path) -> None:
    diary = Diary(tmp_path, (1, 1, die), (1, 2, die))
    with pytest.raises(MemberLost, match="member 1 was lost") as caught:
        Runs(client).train(SAMPLED, diary, max_restarts=1)
    assert diary.attempts == 2
    assert caught.value.__notes__[1:] == ["It was started again as often as max_restarts=1 allows."]


@pytest.mark.slow
def test_a_restart_of_the_cluster_ends_it(client: Client, tmp_path: Path) -> None:
    hold = Hold.new(client)
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(Runs(client).train, SAMPLED, Holds(hold))
        with hold.released_at_last(client):
            assert hold.reached(client).wait(60)
            client.restart(wait_for_workers=False)
        with pytest.raises(MemberLost, match="was lost"):
            training.result(60)


@pytest.mark.slow
def test_data_bound_to_a_worker_that_is_gone_end_it(client: Client, tmp_path: Path) -> None:
    workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
    X, y = client.persist(data(), workers=workers[:1])
    for future in futures_of([X, y]):
        future.result()
    with (
        dask.config.set({"dask-bridges.worker-return-timeout": "2s"}),
        pytest.raises(PlacementError, match="may only run on workers that are gone") as caught,
    ):
        dask_xgboost.train(
            client, PLAIN, X, y, callbacks=[Diary(tmp_path, *((r, 3, Dies(workers[0])) for r in range(3)))]
        )
    assert isinstance(caught.value.__cause__, MemberLost)


@pytest.mark.slow
def test_the_loss_of_data_that_cannot_be_had_again_ends_it(client: Client, tmp_path: Path) -> None:
    X, y = (part.compute() for part in data())
    owner = sorted(client.scheduler_info(n_workers=-1)["workers"])
    parts = [client.scatter(X[start : start + 300], workers=[owner[i]]) for i, start in enumerate((0, 300, 600))]
    only = da.concatenate([da.from_delayed(part, (300, COLUMNS), "float32") for part in parts])
    with pytest.raises(MemberLost, match="member 1 was lost"):
        dask_xgboost.train(client, PLAIN, only, da.from_array(y, chunks=300), callbacks=[Diary(tmp_path, (1, 3, die))])


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"checkpoint": "memory://kept"}, DataError, "is the memory of one process"),
        ({"checkpoint": "nothing://kept"}, Exception, "checkpoints at nothing://kept"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every=0: give a whole number from 1"),
        ({"max_restarts": -1}, ValueError, "max_restarts=-1: give a whole number from 0"),
        ({"max_restarts": 1.5}, ValueError, "max_restarts=1.5"),
        ({"params": PLAIN | {"process_type": "update"}, "checkpoint": "kept"}, ValueError, "no checkpoint can be kept"),
        ({"params": {"lambdarank_unbiased": True}, "checkpoint": "kept"}, ValueError, "no checkpoint can be kept"),
    ],
)
def test_what_cannot_be_is_refused(bridges_client: Client, options: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        dask_xgboost.train(bridges_client, **{"params": PLAIN, "X": data()[0], "y": data()[1], **options})
