"""`cv` gives what `xgboost.cv` gives on one machine for the same folds, and the folds are as they should be."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import xgboost as xgb
from distributed import Client
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import KFold, StratifiedKFold, TimeSeriesSplit
from xgboost import collective

import dask_xgboost
from dask_bridges import DataError
from dask_xgboost.dealing import Asked
from dask_xgboost.folds import Block, Folds, masks

ROWS, ROUNDS = 600, 6


def values() -> tuple[Any, Any, Any]:
    """Features of few values, all of which are in every fold, so that all machines find the same cuts."""
    rng = np.random.default_rng(2)
    X = rng.integers(0, 6, (ROWS, 4)).astype("float32")
    signal = X[:, 0] - X[:, 1] * X[:, 2] / 3 + rng.normal(0, 1, ROWS)
    return X, signal, rng.uniform(0.2, 3, ROWS).astype("float32")


LABELS = {
    "binary:logistic": lambda signal: (signal > 0).astype("float32"),
    "reg:squarederror": lambda signal: signal,
    "multi:softprob": lambda signal: np.digitize(signal, [-1, 1]),
    "multi:softmax": lambda signal: np.digitize(signal, [-1, 1]),
    "count:poisson": lambda signal: np.floor(np.exp(signal / 3)),
    "reg:absoluteerror": lambda signal: signal,
}

POSITIONS = [np.arange(ROWS) % 3 == fold for fold in range(3)]
FOLDS = [(np.flatnonzero(~test), np.flatnonzero(test)) for test in POSITIONS]


def collections(*arrays: Any, chunks: int = 100) -> list[Any]:
    return [da.from_array(each, chunks=(chunks, *each.shape[1:])) for each in arrays]


def assert_same(ours: pd.DataFrame, theirs: pd.DataFrame, rtol: float = 1e-4) -> None:
    assert set(ours.columns) == set(theirs.columns)
    pd.testing.assert_frame_equal(ours[theirs.columns], theirs, rtol=rtol, atol=1e-5)


# Folds


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 10),
    number=st.integers(2, 5),
    seed=st.integers(0, 9),
    shuffle=st.booleans(),
    stratified=st.booleans(),
)
def test_every_row_is_left_out_once_wherever_its_partition_lies(
    sizes: list[int], number: int, seed: int, shuffle: bool, stratified: bool
) -> None:
    starts = np.concatenate([[0], np.cumsum(sizes)])
    labels = np.random.default_rng(seed).integers(0, 2, starts[-1])
    blocks = [Block(part, int(starts[part]), int(starts[part + 1])) for part in range(len(sizes))]

    def of(some: list[Block]) -> Any:
        rows = np.concatenate([np.empty(0, "int64"), *(np.arange(block.start, block.stop) for block in some)])
        found = masks(Folds(({},), number, int(starts[-1]), tuple(some), stratified, shuffle, seed), labels[rows])
        assert all((train != test).all() for train, test in found)
        left_out = np.stack([test for _, test in found])
        assert (left_out.sum(axis=0) == 1).all()
        return left_out.argmax(axis=0)

    whole = of(blocks)
    np.testing.assert_array_equal(np.concatenate([of(blocks[::2]), of(blocks[1::2])]), np.concatenate(
        [whole[block.start : block.stop] for block in (*blocks[::2], *blocks[1::2])]
    ))  # fmt: skip
    if not stratified:
        assert np.ptp(np.bincount(whole, minlength=number)) <= 1
    else:
        for block in blocks:
            for label in (0, 1):
                fold = whole[block.start : block.stop][labels[block.start : block.stop] == label]
                assert np.ptp(np.bincount(fold, minlength=number)) <= 1


# On a cluster


@pytest.mark.cluster
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("objective", LABELS)
def test_metrics_are_those_of_one_machine(bridges_client: Client, objective: str, weighted: bool) -> None:
    X, signal, weight = values()
    y = LABELS[objective](signal)
    metrics = {"binary:logistic": ["logloss", "auc", "error"], "multi:softprob": ["merror", "mlogloss"]}
    params: dict[str, Any] = {"objective": objective, "max_depth": 3, "eval_metric": metrics.get(objective, [])}
    if objective.startswith("multi"):
        params["num_class"] = 3
    if not params["eval_metric"]:
        del params["eval_metric"]
    workers = list(bridges_client.scheduler_info()["workers"])
    if objective == "reg:absoluteerror":  # whose leaves depend on which rows are together
        workers = workers[:1]
    dX, dy, dweight = collections(X, y, weight)
    ours = dask_xgboost.cv(
        bridges_client, params, dX, dy, weight=dweight if weighted else None, folds=FOLDS, num_boost_round=ROUNDS,
        workers=workers, progress=False,
    )  # fmt: skip
    if not weighted:  # of rows without weights XGBoost's medians lie between two of them, of others on one
        weight = np.ones(ROWS) if objective == "reg:absoluteerror" else None
    theirs = xgb.cv(params, xgb.DMatrix(X, y, weight=weight), ROUNDS, folds=FOLDS)
    assert_same(ours, theirs)


def tweaked(predictions: Any, matrix: Any) -> Any:
    """An objective that heeds no weights."""
    difference = predictions - matrix.get_label()
    return difference, np.ones_like(difference)


def far_off(predictions: Any, matrix: Any) -> Any:
    """A metric that heeds no weights either."""
    return "far", float(np.mean(np.abs(predictions - matrix.get_label()) > 1))


@pytest.mark.cluster
def test_objectives_and_metrics_that_are_functions_see_nothing_of_rows_left_out(bridges_client: Client) -> None:
    X, signal, _ = values()
    options = {"folds": FOLDS, "num_boost_round": ROUNDS, "obj": tweaked, "custom_metric": far_off}
    params = {"max_depth": 3, "base_score": 0.0, "disable_default_eval_metric": 1}
    ours = dask_xgboost.cv(bridges_client, params, *collections(X, signal), progress=False, **options)
    theirs = xgb.cv(params, xgb.DMatrix(X, signal), **options)
    assert list(ours.columns) == list(theirs.columns)
    assert_same(ours, theirs)


@pytest.mark.cluster
@pytest.mark.parametrize("params", [{"booster": "dart", "rate_drop": 0.3, "seed": 5}, {"max_bin": 4}, {}], ids=str)
def test_early_stopping_looks_at_the_mean_over_the_folds(bridges_client: Client, params: Any) -> None:
    X, signal, _ = values()
    options = {"folds": FOLDS, "num_boost_round": 40, "early_stopping_rounds": 2, "metrics": ["mae", "rmse"]}
    params = {"eta": 0.9, "max_depth": 5, **params}
    ours = dask_xgboost.cv(bridges_client, params, *collections(X, signal), progress=False, cuts="quantiles", **options)
    assert 1 <= len(ours) < 40
    assert ours["test-rmse-mean"].idxmin() == len(ours) - 1
    if "max_bin" not in params:
        assert_same(ours, xgb.cv(params, xgb.DMatrix(X, signal), **options))


@pytest.mark.cluster
def test_many_sets_of_parameters_share_one_matrix(bridges_client: Client) -> None:
    X, signal, _ = values()
    frame = dd.from_pandas(pd.DataFrame(X, columns=list("abcd")).assign(label=signal), npartitions=5)
    sets = [{"max_depth": depth, "eta": eta} for depth in (1, 4) for eta in (0.1, 0.7)]
    options = {"nfold": 4, "seed": 3, "progress": False}
    many = dask_xgboost.cv(bridges_client, sets, frame, "label", **options)
    for params, result in zip(sets, many):
        assert_same(dask_xgboost.cv(bridges_client, params, frame, "label", **options), result, rtol=1e-6)
    best = min(zip(sets, many), key=lambda pair: pair[1]["test-rmse-mean"].min())[0]
    assert best["eta"] == 0.7


@pytest.mark.cluster
def test_a_matrix_is_afterwards_as_it_was(bridges_client: Client) -> None:
    X, signal, weight = values()
    for given_weight in (None, weight):
        dX, dy, dweight = collections(X, signal, weight)
        matrix = dask_xgboost.DMatrix(bridges_client, dX, dy, weight=None if given_weight is None else dweight)
        before = dask_xgboost.train(bridges_client, {}, matrix, progress=False).save_raw()
        dask_xgboost.cv(bridges_client, {}, matrix, folds=FOLDS, progress=False)
        assert dask_xgboost.train(bridges_client, {}, matrix, progress=False).save_raw() == before


@pytest.mark.cluster
def test_splitters_of_scikit_learn_make_the_folds(bridges_client: Client) -> None:
    X, signal, _ = values()
    y = LABELS["binary:logistic"](signal)
    params = {"objective": "binary:logistic"}
    for splitter in (StratifiedKFold(4, shuffle=True, random_state=1), TimeSeriesSplit(3)):
        pairs = list(splitter.split(X, y))
        ours = dask_xgboost.cv(bridges_client, params, *collections(X, y), folds=splitter, progress=False)
        assert_same(ours, xgb.cv(params, xgb.DMatrix(X, y), folds=pairs))


# Query groups


def queries() -> tuple[Any, Any, Any, Any]:
    """Relevant or not, in groups of very different sizes; of some groups nothing is relevant. A weight a group."""
    rng = np.random.default_rng(8)
    qid = np.sort(np.minimum(rng.geometric(0.08, ROWS), 40)) * 101
    X = rng.integers(0, 6, (ROWS, 4)).astype("float32")
    relevant = (X[:, 0] + rng.normal(0, 2, ROWS) > 3) & (qid % 5 != 0)
    return X, relevant.astype("float32"), qid, rng.uniform(0.3, 3, 41).astype("float32")[qid // 101]


def ranked(params: Any, pairs: Any, rounds: int, *, weighted: bool = False) -> pd.DataFrame:
    """The oracle: XGBoost trains and evaluates on the rows of each fold alone."""
    X, y, qid, weight = queries()

    def rows_of(groups: Any) -> Any:
        rows = np.isin(qid, groups)
        _, first = np.unique(qid[rows], return_index=True)
        return xgb.DMatrix(X[rows], y[rows], qid=qid[rows], weight=weight[rows][first] if weighted else None)

    found: dict[str, list[Any]] = {}
    for train, test in pairs:
        sides, history = {"train": rows_of(train), "test": rows_of(test)}, {}
        evals = [(matrix, name) for name, matrix in sides.items()]
        xgb.train(params, sides["train"], rounds, evals=evals, evals_result=history, verbose_eval=False)
        for name, log in history.items():
            for metric, each in log.items():
                found.setdefault(f"{name}-{metric}", []).append(each)
    return pd.DataFrame({
        f"{name}-{what}": take(values, axis=0)
        for name, values in found.items()
        for what, take in (("mean", np.mean), ("std", np.std))
    })  # fmt: skip


RANKINGS: list[Any] = [
    pytest.param("rank:ndcg", False, id="ndcg"),
    pytest.param("rank:ndcg", True, id="ndcg, weighted", marks=pytest.mark.slow),
    pytest.param("rank:map", True, id="map, weighted", marks=pytest.mark.slow),
    pytest.param("rank:pairwise", False, id="pairwise", marks=pytest.mark.slow),
]


@pytest.mark.cluster
@pytest.mark.parametrize(("objective", "weighted"), RANKINGS)
def test_whole_query_groups_are_left_out_and_the_metrics_are_those_of_one_machine(
    bridges_client: Client, objective: str, weighted: bool
) -> None:
    """Partitions cut groups. Of weighted ones XGBoost scales the weights worker by worker: one worker."""
    X, y, qid, weight = queries()
    metrics = ["ndcg", "ndcg@3", "ndcg@3-", "map@5", "pre@2"]
    params = {"objective": objective, "max_depth": 3, "eta": 0.5, "eval_metric": metrics}
    ids = np.unique(qid)
    pairs = [(ids[np.arange(len(ids)) % 3 != fold], ids[np.arange(len(ids)) % 3 == fold]) for fold in range(3)]
    dX, dy, dqid, dweight = collections(X, y, qid, weight)
    ours = dask_xgboost.cv(
        bridges_client, params, dX, dy, qid=dqid, weight=dweight if weighted else None, folds=pairs,
        num_boost_round=ROUNDS, progress=False, n_workers=1 if weighted else None,
    )  # fmt: skip
    assert_same(ours, ranked(params, pairs, ROUNDS, weighted=weighted))


def of_groups(predictions: Any, matrix: Any) -> Any:
    """How many groups there are, and rows."""
    return [("groups", (len(matrix.get_group()), 1)), ("rows", (len(predictions), 1))]


@pytest.mark.cluster
def test_query_groups_are_dealt_out_and_functions_see_those_of_a_fold_alone(bridges_client: Client) -> None:
    X, y, qid, _ = queries()
    options: dict[str, Any] = {"num_boost_round": 2, "progress": False, "as_pandas": False}
    dX, dy, dqid = collections(X, y, qid)
    matrix = dask_xgboost.DMatrix(bridges_client, dX, dy, qid=dqid)
    before = dask_xgboost.train(bridges_client, {"objective": "rank:ndcg"}, matrix, progress=False).save_raw()
    groups, workers = len(np.unique(qid)), len(bridges_client.scheduler_info(n_workers=-1)["workers"])
    found = dask_xgboost.cv(
        bridges_client, {"objective": "rank:ndcg"}, matrix, nfold=4, custom_metric=of_groups, **options
    )
    for what, total in (("groups", groups), ("rows", ROWS)):
        mean = found[f"test-{what}-mean"][0] * workers
        assert mean == pytest.approx(total / 4)
        assert found[f"train-{what}-mean"][0] * workers == pytest.approx(total * 3 / 4)
    assert found["test-groups-std"][0] * workers <= 1
    split = dask_xgboost.cv(bridges_client, {"objective": "rank:ndcg"}, matrix, folds=KFold(4), **options)
    ids = np.unique(qid)
    named = [(ids[train], ids[test]) for train, test in KFold(4).split(ids)]
    assert dask_xgboost.cv(bridges_client, {"objective": "rank:ndcg"}, matrix, folds=named, **options) == split
    assert dask_xgboost.train(bridges_client, {"objective": "rank:ndcg"}, matrix, progress=False).save_raw() == before


class Round(xgb.callback.TrainingCallback):
    """Kills the worker of rank 1 once; ends the training after round 3."""

    def __init__(self, mark: Path | None = None) -> None:
        self.mark = mark

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        if self.mark is not None and collective.get_rank() == 1 and epoch == 2 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        assert isinstance(evals_log["test"]["rmse"][-1], tuple)  # the mean, and the standard deviation
        return epoch == 3


@pytest.mark.cluster
def test_callbacks_and_lines_are_those_of_xgboost(bridges_client: Client, capsys: Any) -> None:
    X, signal, _ = values()
    result = dask_xgboost.cv(
        bridges_client, {}, *collections(X, signal), callbacks=[Round()], verbose_eval=1, as_pandas=False,
        progress=False, stratified=False, shuffle=False,
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["[0]", "[1]", "[2]", "[3]"]
    assert f"test-rmse-mean:{result['test-rmse-mean'][3]:.5f}" in lines[3]


@pytest.mark.cluster
@pytest.mark.slow
def test_a_lost_worker_costs_time_only(bridges_doomed_client: Client, tmp_path: Path) -> None:
    X, signal, _ = values()
    frame = collections(X, signal)
    result = dask_xgboost.cv(
        bridges_doomed_client, {}, *frame, callbacks=[Round(tmp_path / "died")], progress=False, folds=iter(FOLDS)
    )
    assert (tmp_path / "died").exists()
    assert_same(result, xgb.cv({}, xgb.DMatrix(X, signal), 4, folds=FOLDS))


@pytest.mark.cluster
def test_what_cannot_be_cross_validated_is_refused(bridges_client: Client) -> None:
    X, signal, _ = values()
    dX, dy = collections(X, signal)
    for options, message in [
        ({"nfold": 1}, "nfold=1: give a whole number from 2 to the 600 rows"),
        ({"nfold": 601}, "nfold=601"),
        ({"folds": []}, "folds is empty"),
        ({"folds": [([0, 1], [600])]}, "between 0 and 599"),
        ({"folds": [([0, 1], [])]}, "or none"),
    ]:
        with pytest.raises(DataError, match=message):
            dask_xgboost.cv(bridges_client, {}, dX, dy, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="share one matrix"):
        dask_xgboost.cv(bridges_client, [{"max_bin": 8}, {}], dX, dy)
    with pytest.raises(ValueError, match="empty sequence"):
        dask_xgboost.cv(bridges_client, [], dX, dy)


RANKED = {"objective": "rank:ndcg"}


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        ({}, {}, "with the objectives rank:ndcg, .* not with None"),
        (RANKED | {"eval_metric": ["map", "auc"]}, {}, "cannot leave any out of auc: use ndcg"),
        (RANKED, {"stratified": True}, "which stay whole"),
        (RANKED, {"number": 61}, "nfold=61: give a whole number from 2 to the 60 query groups"),
        (RANKED, {"given": [([0], [60])]}, r"ids of query groups that X has not, or none: \[60\]"),
        (RANKED, {"given": [([0], [])]}, "or none"),
        (RANKED, {"given": []}, "folds is empty"),
    ],
)
def test_what_cannot_be_cross_validated_by_groups_is_refused(params: Any, options: Any, message: str) -> None:
    ids = [SimpleNamespace(groups=np.arange(40)), SimpleNamespace(groups=np.arange(40, 60))]
    matrix: Any = SimpleNamespace(rows=600, infos=ids, has=lambda field: field == "qid")
    asked = {"number": 3, "stratified": False, "given": None, "shuffle": True, "seed": 0} | options
    with pytest.raises(DataError, match=message):
        asyncio.run(Asked([params], **asked).settle(None, matrix))  # type: ignore[arg-type]
