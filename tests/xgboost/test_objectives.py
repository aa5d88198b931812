"""Each objective, with its metrics and evaluation rows, is trained and measured as on one machine."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dask.array as da
import numpy as np
import pytest
import xgboost as xgb
from distributed import Client
from xgboost import collective
from xgboost.tracker import RabitTracker

import dask_xgboost

pytestmark = pytest.mark.cluster

CHUNKS = (30, 200, 60, 130)
later = pytest.mark.slow


def targets(rows: Any) -> dict[str, Any]:
    signal = rows.labels["reg:squarederror"]
    lower = np.exp(signal)
    return {
        "signal": signal,
        "binary": rows.labels["binary:logistic"],
        "counts": rows.labels["count:poisson"],
        "thirds": rows.labels["multi:softprob"],
        "positive": lower + 0.1,
        "several": np.stack([signal, rows.X[:, 0] / 9, -signal], axis=1),
        "labels": np.stack([signal > 0, signal > 0.5], axis=1).astype("float32"),
        "lower": lower,
        "upper": np.where(rows.X[:, 4] > 20, np.inf, lower + 0.5),
    }


def aft(distribution: str) -> tuple[Any, Any]:
    params = {"objective": "survival:aft", "aft_loss_distribution": distribution, "aft_loss_distribution_scale": 1.2}
    metrics = ["aft-nloglik", "interval-regression-accuracy"]
    return {**params, "eval_metric": metrics}, {"label_lower_bound": "lower", "label_upper_bound": "upper"}


def of(target: str, objective: str, *metrics: str, **params: Any) -> tuple[Any, Any]:
    wanted = {"eval_metric": list(metrics)} if metrics else {}
    return {"objective": objective, **wanted, **params}, {"label": target}


CASES: dict[str, tuple[Any, Any]] = {
    "aft, normal": aft("normal"),
    "aft, logistic": aft("logistic"),
    "aft, extreme": aft("extreme"),
    "poisson": of("counts", "count:poisson", "poisson-nloglik", "mae"),
    "tweedie": of("counts", "reg:tweedie", "tweedie-nloglik@1.3", tweedie_variance_power=1.3),
    "gamma": of("positive", "reg:gamma", "gamma-nloglik", "gamma-deviance", "mape"),
    "huber": of("signal", "reg:pseudohubererror", "mphe"),
    "squared log": of("positive", "reg:squaredlogerror", "rmsle"),
    "hinge": of("binary", "binary:hinge", "error"),
    "raw logits": of("binary", "binary:logitraw", "auc"),
    "classes": of("thirds", "multi:softprob", "mlogloss", "merror", num_class=3),
    "several targets": of("several", "reg:squarederror", "rmse", "mae"),
    "vector leaves": of("several", "reg:squarederror", "rmse", multi_strategy="multi_output_tree"),
    "several labels": of("labels", "binary:logistic", "logloss"),
    "dart": of("signal", "reg:squarederror", booster="dart", rate_drop=0.5, one_drop=1, seed=3),
    "monotone": of("signal", "reg:squarederror", monotone_constraints="(1,-1,0,0,0)"),
    "interactions": of("signal", "reg:squarederror", interaction_constraints="[[0,1],[2,3,4]]"),
    "lossguide": of("signal", "reg:squarederror", grow_policy="lossguide", max_leaves=7, max_depth=0),
}


def both(client: Client, rows: Any, params: Any, fields: Any, **keywords: Any) -> Any:
    """Booster and history, of the cluster and of one process; every third row is for evaluation."""
    found = targets(rows)
    given = {name: found[target] for name, target in fields.items()}
    valid = np.arange(len(rows.X)) % 3 == 0
    params = {"max_depth": 3, "eta": 0.4, **params}
    weight = rows.weight

    def lazy(values: Any) -> Any:
        return da.from_array(values, chunks=(CHUNKS, *values.shape[1:]))

    def held_out(values: Any) -> Any:
        return da.from_array(values[valid], chunks=(50, *values.shape[1:]))

    dvalid = dask_xgboost.DMatrix(
        client, held_out(rows.X), **{name: held_out(values) for name, values in given.items()}, weight=held_out(weight)
    )  # fmt: skip
    X = lazy(rows.X)
    ours: dict[str, Any] = {}
    booster = dask_xgboost.train(
        client, params, X, **{name: lazy(values) for name, values in given.items()}, weight=lazy(weight),
        num_boost_round=5, evals=[(X, "train"), (dvalid, "valid")], evals_result=ours, **keywords,
    )  # fmt: skip
    matrix = xgb.QuantileDMatrix(rows.X, weight=weight, **given)
    other = xgb.QuantileDMatrix(
        rows.X[valid], weight=weight[valid], **{name: values[valid] for name, values in given.items()}, ref=matrix
    )
    theirs: dict[str, Any] = {}
    oracle = xgb.train(
        params, matrix, 5, evals=[(matrix, "train"), (other, "valid")], evals_result=theirs, verbose_eval=False
    )
    return (booster, ours), (oracle, theirs)


def assert_same(ours: Any, theirs: Any, rows: Any) -> None:
    X = xgb.DMatrix(rows.X)
    np.testing.assert_allclose(ours[0].predict(X), theirs[0].predict(X), rtol=1e-4, atol=1e-5)
    assert {name: list(log) for name, log in ours[1].items()} == {name: list(log) for name, log in theirs[1].items()}
    for name, log in theirs[1].items():
        for metric, values in log.items():
            np.testing.assert_allclose(ours[1][name][metric], values, rtol=1e-4, atol=2e-5, err_msg=f"{name} {metric}")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("aft, normal", "several labels", "gamma") else later) for name in CASES],
)
def test_is_trained_and_measured_as_on_one_machine(bridges_client: Client, rows: Any, name: str) -> None:
    assert_same(*both(bridges_client, rows, *CASES[name]), rows)


@pytest.mark.parametrize(
    "case",
    [
        of("signal", "reg:quantileerror", "quantile", quantile_alpha=0.3),
        pytest.param(of("signal", "reg:quantileerror", "quantile", quantile_alpha=[0.1, 0.5, 0.9]), marks=later),
        pytest.param(of("signal", "reg:absoluteerror", "mae"), marks=later),
    ],
)
def test_leaves_that_want_all_rows_are_right_on_one_worker(bridges_client: Client, rows: Any, case: Any) -> None:
    one = sorted(bridges_client.scheduler_info(n_workers=-1)["workers"])[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same(*both(bridges_client, rows, *case, workers=one), rows)


@later
def test_monotone_constraints_hold(bridges_client: Client, rows: Any) -> None:
    (booster, _), _ = both(bridges_client, rows, *CASES["monotone"])
    grid = np.tile(rows.X[:1], (30, 1))
    for column, rising in ((0, True), (1, False)):
        values = grid.copy()
        values[:, column] = np.arange(30)
        steps = np.diff(booster.predict(xgb.DMatrix(values)))
        assert (steps >= 0).all() if rising else (steps <= 0).all()
        assert steps.any()


def test_trees_are_pruned_as_on_one_machine(bridges_client: Client, rows: Any) -> None:
    base, label = {"max_depth": 3, "eta": 0.4, "base_score": 0.0}, rows.labels["reg:squarederror"]
    first = xgb.train(base, xgb.QuantileDMatrix(rows.X, label), 4)
    params = {**base, "process_type": "update", "updater": "prune", "gamma": 5.0}
    booster = dask_xgboost.train(
        bridges_client, params, da.from_array(rows.X, chunks=(CHUNKS, 5)), da.from_array(label, chunks=(CHUNKS,)),
        num_boost_round=4, xgb_model=first, n_workers=1,
    )  # fmt: skip
    oracle = xgb.train(params, xgb.QuantileDMatrix(rows.X, label), 4, xgb_model=first)
    assert booster.get_dump() == oracle.get_dump() != first.get_dump()


def updated_on_two_ranks(params: Any, kind: Any) -> list[Any]:
    """The first lines of trees that were updated on ranks of 100 and of 300 rows; or what was raised, by rank."""
    X = np.random.default_rng(0).integers(0, 30, (400, 3)).astype("float32")
    first = xgb.train({"max_depth": 3}, xgb.QuantileDMatrix(X, X[:, 0]), 2).save_raw()
    tracker = RabitTracker(n_workers=2, host_ip="127.0.0.1", sortby="task")
    tracker.start()

    def update(rows: slice) -> list[str]:
        with collective.CommunicatorContext(**tracker.worker_args(), dmlc_task_id=str(rows.start)):
            matrix = kind(X[rows], X[rows, 0], nthread=1)
            booster = xgb.train({"process_type": "update", **params}, matrix, 2, xgb_model=bytearray(first))
            return [tree.splitlines()[0] for tree in booster.get_dump(with_stats=True)]

    with ThreadPoolExecutor() as pool:
        ranks = [pool.submit(update, rows) for rows in (slice(100), slice(100, 400))]
        return [rank.exception(30) or rank.result() for rank in ranks]


def test_what_upstream_breaks_on_several_ranks_is_still_broken() -> None:
    """Once this fails, `process_type="update"` need no longer be refused on several workers."""
    pruned = updated_on_two_ranks({"updater": "prune", "gamma": 5.0}, xgb.QuantileDMatrix)
    assert any("Invalid cast, from Null" in str(error) for error in pruned)
    refreshed = updated_on_two_ranks({"updater": "refresh"}, xgb.DMatrix)
    assert all(line.endswith("cover=300") for rank in refreshed for line in rank)  # the largest rank's, not 400
    with pytest.raises(xgb.core.XGBoostError, match="Not implemented for `QuantileDMatrix`"):
        raise updated_on_two_ranks({"updater": "refresh"}, xgb.QuantileDMatrix)[0]
