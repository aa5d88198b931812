"""`train` gives the model, and everything else, that `xgboost.train` gives on one machine."""

import asyncio
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import xgboost as xgb
from distributed import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dask_xgboost
from dask_bridges import MemberFailed

pytestmark = pytest.mark.cluster

OBJECTIVES = (
    "reg:squarederror", "binary:logistic", "multi:softmax", "multi:softprob", "count:poisson", "reg:tweedie",
)  # fmt: skip
LOGISTIC = {"objective": "binary:logistic", "max_depth": 3, "eta": 0.5}
SQUARED = {"objective": "reg:squarederror", "max_depth": 3, "eta": 0.5}
few_layouts = settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def params_of(objective: str) -> dict[str, Any]:
    classes = {"num_class": 3} if objective.startswith("multi") else {}
    return {"objective": objective, "max_depth": 3, "eta": 0.5, **classes}


def alone(params: Any, X: Any, label: Any, *, rounds: int = 4, **fields: Any) -> xgb.Booster:
    """The oracle: one process, all rows."""
    return xgb.train(params, xgb.QuantileDMatrix(X, label, **fields), rounds)


def assert_same(booster: xgb.Booster, oracle: xgb.Booster, X: Any, **matrix: Any) -> None:
    data = xgb.DMatrix(X, **matrix)
    assert booster.num_boosted_rounds() == oracle.num_boosted_rounds()
    np.testing.assert_allclose(booster.predict(data), oracle.predict(data), atol=1e-5)


def blocks(values: Any, cuts: Any = 70) -> Any:
    """A dask array of `values`, cut by rows."""
    return da.from_array(values, chunks=(cuts, *values.shape[1:]))


def placed(client: Client, cuts: tuple[int, ...], owners: list[int], *values: Any) -> list[Any]:
    """Dask arrays whose blocks lie on the workers of `owners`."""
    workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
    edges = np.cumsum([0, *cuts])
    return [
        da.concatenate([
            da.from_delayed(
                client.scatter(array[start:stop], workers=[workers[owner]], hash=False),
                (stop - start, *array.shape[1:]),
                array.dtype,
            )
            for start, stop, owner in zip(edges, edges[1:], owners)
        ])
        for array in values
    ]  # fmt: skip


@st.composite
def layouts(draw: Any, units: int, size: int) -> tuple[tuple[int, ...], list[int]]:
    """Sizes of up to six partitions, some empty, of `units` times `size` rows; and the worker of each."""
    edges = sorted(draw(st.lists(st.integers(0, units), min_size=2, max_size=5)))
    cuts = np.diff([0, *edges, units]) * size
    owners = draw(st.lists(st.integers(0, 2), min_size=len(cuts), max_size=len(cuts)))
    return tuple(int(cut) for cut in cuts), owners


# The same model as one machine


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_model_is_that_of_one_machine_wherever_the_rows_lie(
    bridges_client: Client, rows: Any, objective: str
) -> None:
    params, label = params_of(objective), rows.labels[objective]
    oracle = alone(params, rows.X, label, weight=rows.weight)

    @few_layouts
    @given(layouts(len(rows.X), 1))
    def check(layout: Any) -> None:
        X, y, weight = placed(bridges_client, *layout, rows.X, label, rows.weight)
        with dask.config.set({"dask-bridges.balance-tolerance": 1e9}):  # leave the rows where they are
            booster = dask_xgboost.train(bridges_client, params, X, y, weight=weight, num_boost_round=4)
        assert_same(booster, oracle, rows.X)

    check()


@pytest.mark.parametrize("kind", ["array", "frame", "column", "keyword"])
def test_labels_are_a_collection_or_a_column(bridges_client: Client, rows: Any, kind: str) -> None:
    frame = rows.frame()[["f0", "f1", "f2", "label"]]
    features, df = frame.drop(columns="label"), dd.from_pandas(frame, npartitions=4)
    given: dict[str, Any] = {
        "array": {"X": blocks(features.to_numpy()), "y": blocks(frame.label.to_numpy())},
        "frame": {"X": df[list(features)], "y": df.label},
        "column": {"X": df, "y": "label"},
        "keyword": {"X": df, "label": "label"},
    }[kind]
    booster = dask_xgboost.train(bridges_client, LOGISTIC, **given, num_boost_round=4)
    X = features.to_numpy() if kind == "array" else features
    assert_same(booster, alone(LOGISTIC, X, frame.label), X)
    assert booster.feature_names == (None if kind == "array" else list(features))


class Case:
    """A keyword or parameter of `xgboost.train`, and what single-process XGBoost is given for it."""

    def __init__(self, params: Any = None, **fields: Any) -> None:
        self.params = params or {}
        self.fields = fields


def hundreds(rows: Any) -> Any:
    return rows.labels["reg:squarederror"] * 100


CASES = {
    "base_margin": lambda rows: Case(base_margin=rows.X[:, 3] / 10),
    "base_margin of classes": lambda rows: Case(
        params_of("multi:softprob"), label=rows.labels["multi:softprob"], base_margin=rows.X[:, 1:4] / 10
    ),
    "weight": lambda rows: Case(weight=rows.weight),
    "feature_weights": lambda rows: Case(
        {"colsample_bynode": 0.4, "seed": 5}, feature_weights=np.array([0.0, 5.0, 1.0, 1.0, 0.1])
    ),
    "feature_names": lambda rows: Case(feature_names=["a", "b", "c", "d", "e"]),
    "feature_types": lambda rows: Case(feature_types=["float", "c", "int", "q", "c"]),
    "bounds": lambda rows: Case(
        {"objective": "survival:aft", "aft_loss_distribution": "normal"},
        label=None,
        label_lower_bound=np.exp(rows.labels["reg:squarederror"]),
        label_upper_bound=np.where(rows.X[:, 4] > 20, np.inf, np.exp(rows.labels["reg:squarederror"]) + 0.5),
    ),
    "several labels": lambda rows: Case(label=np.stack([rows.labels["reg:squarederror"], rows.X[:, 0] / 9], axis=1)),
    "vector leaves": lambda rows: Case(
        {"multi_strategy": "multi_output_tree"},
        label=np.stack([rows.labels["reg:squarederror"], rows.X[:, 0] / 9], axis=1),
    ),
    "dart": lambda rows: Case({"booster": "dart", "rate_drop": 0.5, "one_drop": 1, "seed": 3}),
    "forest": lambda rows: Case({"num_parallel_tree": 3, "colsample_bynode": 0.6, "seed": 2}),
    "constraints": lambda rows: Case(
        {"monotone_constraints": "(1,-1,0,0,0)", "interaction_constraints": "[[0,1],[2,3,4]]"}
    ),
    "bool labels": lambda rows: Case({"objective": "binary:logistic"}, label=rows.X[:, 0] > 14),
    "whole labels": lambda rows: Case(label=rows.X[:, 0].astype("int8")),
    "missing": lambda rows: Case(missing=7.0),
}


@pytest.mark.parametrize("name", CASES)
def test_gives_the_model_of_one_machine_with(bridges_client: Client, rows: Any, name: str) -> None:
    case = CASES[name](rows)
    params = {**SQUARED, **case.params}
    fields = {"label": rows.labels["reg:squarederror"], **case.fields}
    oracle = alone(params, rows.X, **fields)
    whole = ("feature_names", "feature_types", "feature_weights", "missing")
    lazy = {key: value if key in whole or value is None else blocks(value) for key, value in fields.items()}
    booster = dask_xgboost.train(bridges_client, params, blocks(rows.X), **lazy, num_boost_round=4)
    given = {key: fields[key] for key in ("feature_names", "feature_types", "missing") if key in fields}
    assert_same(booster, oracle, rows.X, **given)


def test_parameters_that_are_none_are_left_out_as_xgboost_does(bridges_client: Client, rows: Any) -> None:
    label = rows.labels["binary:logistic"]
    params = {**LOGISTIC, "max_bin": None, "nthread": None, "eval_metric": None, "num_class": None}
    booster = dask_xgboost.train(bridges_client, params, blocks(rows.X), blocks(label), num_boost_round=4)
    assert_same(booster, alone(params, rows.X, label), rows.X)


def test_max_bin_may_be_a_keyword(bridges_client: Client, rows: Any) -> None:
    label = rows.labels["reg:squarederror"]
    X = np.argsort(np.argsort(label + rows.X.T, axis=1), axis=1).T.astype("float32")  # 420 values, not 256
    booster = dask_xgboost.train(bridges_client, SQUARED, blocks(X), blocks(label), num_boost_round=4, max_bin=512)
    assert_same(booster, alone({**SQUARED, "max_bin": 512}, X, label, max_bin=512), X)


def test_params_may_be_pairs_with_several_metrics(bridges_client: Client, rows: Any) -> None:
    params = [*SQUARED.items(), ("eval_metric", "mae"), ("eval_metric", "rmse")]
    X, y = blocks(rows.X), blocks(rows.labels["reg:squarederror"])
    history: dict[str, Any] = {}
    booster = dask_xgboost.train(bridges_client, params, X, y, evals=[(X, "train")], evals_result=history)
    assert_same(booster, alone(params, rows.X, rows.labels["reg:squarederror"], rounds=10), rows.X)
    assert list(history["train"]) == ["mae", "rmse"]


def test_a_custom_objective_gives_the_model_of_one_machine(bridges_client: Client, rows: Any) -> None:
    def absolute(predictions: Any, matrix: xgb.DMatrix) -> tuple[Any, Any]:
        error = predictions - matrix.get_label()
        root = np.sqrt(error**2 + 1)
        return error / root, 1 / root**3

    label = hundreds(rows)
    booster = dask_xgboost.train(
        bridges_client, {"max_depth": 3}, blocks(rows.X), blocks(label), obj=absolute, num_boost_round=4
    )
    oracle = xgb.train({"max_depth": 3}, xgb.QuantileDMatrix(rows.X, label), 4, obj=absolute)
    assert_same(booster, oracle, rows.X)


# Collections of every kind


@pytest.mark.parametrize("kind", ["sparse", "columns in chunks", "unknown chunks", "other chunks of y", "one frame"])
def test_collections_may_be(bridges_client: Client, rows: Any, kind: str) -> None:
    label = rows.labels["binary:logistic"]
    X, y, dense = blocks(rows.X), blocks(label), rows.X
    if kind == "sparse":
        X = X.map_blocks(scipy.sparse.csr_matrix)
        dense = scipy.sparse.csr_matrix(rows.X)
    elif kind == "columns in chunks":
        X = X.rechunk((70, 2))
    elif kind == "unknown chunks":
        df = dd.from_pandas(rows.frame(), npartitions=4)
        X, y = df[[f"f{i}" for i in range(5)]].to_dask_array(), df.label.to_dask_array()
    elif kind == "other chunks of y":
        y = y.rechunk(99)
    else:
        X, y = dd.from_dask_array(X, columns=list("abcde")), dd.from_dask_array(y, columns="label").to_frame()
        dense = pd.DataFrame(rows.X, columns=list("abcde"))
    assert_same(
        dask_xgboost.train(bridges_client, LOGISTIC, X, y, num_boost_round=4), alone(LOGISTIC, dense, label), dense
    )


def test_a_matrix_is_made_once_and_trained_on_often(bridges_client: Client, rows: Any) -> None:
    label = rows.labels["reg:squarederror"]
    X, y, weight = blocks(rows.X), blocks(label), blocks(rows.weight)
    matrix = dask_xgboost.DMatrix(bridges_client, X, y, weight=weight)
    for depth in (2, 3):
        params = {**SQUARED, "max_depth": depth}
        booster = dask_xgboost.train(bridges_client, params, matrix, num_boost_round=4, evals=[(matrix, "train")])
        assert_same(booster, alone(params, rows.X, label, weight=rows.weight), rows.X)


def test_an_asynchronous_client_awaits_a_matrix(bridges_cluster: Any, rows: Any) -> None:
    async def main() -> xgb.Booster:
        async with Client(bridges_cluster.scheduler_address, asynchronous=True) as client:
            matrix = dask_xgboost.DMatrix(client, blocks(rows.X), blocks(rows.labels["binary:logistic"]))
            with pytest.raises(RuntimeError, match="await it first"):
                _ = matrix.parts
            return await dask_xgboost.train(client, LOGISTIC, await matrix, num_boost_round=4)

    assert_same(asyncio.run(main()), alone(LOGISTIC, rows.X, rows.labels["binary:logistic"]), rows.X)


# Going on from a model


@pytest.mark.parametrize("form", ["booster", "path", "bytes"])
def test_goes_on_from_a_model(bridges_client: Client, rows: Any, tmp_path: Any, form: str) -> None:
    X, y = blocks(rows.X), blocks(rows.labels["binary:logistic"])
    first = dask_xgboost.train(bridges_client, LOGISTIC, X, y, num_boost_round=2)
    first.save_model(tmp_path / "first.ubj")
    given = {"booster": first, "path": str(tmp_path / "first.ubj"), "bytes": first.save_raw()}[form]
    booster = dask_xgboost.train(bridges_client, LOGISTIC, X, y, num_boost_round=2, xgb_model=given)
    assert_same(booster, alone(LOGISTIC, rows.X, rows.labels["binary:logistic"]), rows.X)


# Evaluation


def parts_of(rows: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    frame = rows.frame().drop(columns="qid")
    return frame[:300], frame[300:].reset_index(drop=True)


@pytest.mark.parametrize("form", ["matrix", "frame", "tuple", "weighted tuple", "few rows"])
def test_evaluation_and_early_stopping_are_those_of_one_machine(bridges_client: Client, rows: Any, form: str) -> None:
    train, valid = parts_of(rows)
    valid = valid[:2] if form == "few rows" else valid
    columns = ["f0", "f1", "f2", "f3", "f4"]
    weights = {} if form in ("frame", "few rows") else {"weight": valid.weight}
    kept = [*columns, "label"]
    ddf, vdf = dd.from_pandas(train[kept], npartitions=4), dd.from_pandas(valid, npartitions=2)
    what = {
        "matrix": lambda: dask_xgboost.DMatrix(bridges_client, vdf, "label", weight="weight"),
        "frame": lambda: vdf[kept],
        "few rows": lambda: vdf[kept],
        "tuple": lambda: (vdf[columns], vdf["label"]),
        "weighted tuple": lambda: (vdf[columns], vdf["label"], vdf["weight"]),
    }[form]()
    if form == "tuple":
        weights = {}
    params = {**LOGISTIC, "eval_metric": ["error", "logloss"], "eta": 1.0}
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    booster = dask_xgboost.train(
        bridges_client, params, ddf, "label", num_boost_round=30, early_stopping_rounds=3,
        evals=[(ddf, "train"), (what, "valid")], evals_result=ours,
    )  # fmt: skip
    dtrain = xgb.QuantileDMatrix(train[columns], train.label)
    dvalid = xgb.QuantileDMatrix(valid[columns], valid.label, ref=dtrain, **weights)
    oracle = xgb.train(
        params, dtrain, 30, evals=[(dtrain, "train"), (dvalid, "valid")], early_stopping_rounds=3,
        evals_result=theirs, verbose_eval=False,
    )  # fmt: skip
    assert booster.best_iteration == oracle.best_iteration
    assert booster.best_score == pytest.approx(oracle.best_score, abs=1e-5)
    assert booster.num_boosted_rounds() == oracle.num_boosted_rounds() < 30
    assert {name: list(log) for name, log in ours.items()} == {name: list(log) for name, log in theirs.items()}
    for name, log in theirs.items():
        for metric, values in log.items():
            assert ours[name][metric] == pytest.approx(values, abs=1e-5)


def test_callbacks_run_on_every_rank_and_rank_0_tells_its_state(bridges_client: Client, rows: Any) -> None:
    class Recorder(xgb.callback.TrainingCallback):
        def __init__(self) -> None:
            self.rounds: list[int] = []

        def before_training(self, model: Any) -> Any:
            self.ranks = xgb.collective.allreduce(np.eye(3)[xgb.collective.get_rank()], xgb.collective.Op.SUM).tolist()
            self.rank = xgb.collective.get_rank()
            return model

        def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
            self.rounds.append(epoch)
            return epoch == 2

    recorder, rates = Recorder(), xgb.callback.LearningRateScheduler([0.5, 0.4, 0.3, 0.2])
    booster = dask_xgboost.train(
        bridges_client, LOGISTIC, blocks(rows.X), blocks(rows.labels["binary:logistic"]), callbacks=[recorder, rates]
    )
    assert (recorder.ranks, recorder.rank, recorder.rounds) == ([1, 1, 1], 0, [0, 1, 2])
    assert booster.num_boosted_rounds() == 3


def test_the_best_model_may_be_kept_by_a_callback(bridges_client: Client, rows: Any) -> None:
    train, valid = (dd.from_pandas(part.drop(columns="weight"), npartitions=3) for part in parts_of(rows))
    stop = xgb.callback.EarlyStopping(rounds=3, save_best=True)
    booster = dask_xgboost.train(
        bridges_client, {**LOGISTIC, "eta": 1.0}, train, "label", num_boost_round=30, evals=[(valid, "valid")],
        callbacks=[stop],
    )  # fmt: skip
    assert booster.num_boosted_rounds() == booster.best_iteration + 1 < 27
    assert stop.best_scores["valid"]["logloss"]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({}, "1"), ({"nthread": 2}, "2"), ({"n_jobs": 2}, "2"), ({"n_jobs": -1}, "1"), ({"nthread": 0}, "1")],
)
def test_each_worker_uses_its_threads_unless_told_otherwise(
    bridges_client: Client, rows: Any, given: Any, wanted: str
) -> None:
    class Threads(xgb.callback.TrainingCallback):
        def after_training(self, model: Any) -> Any:
            import json

            self.found = json.loads(model.save_config())["learner"]["generic_param"]["nthread"]
            return model

    threads = Threads()
    dask_xgboost.train(
        bridges_client,
        {**LOGISTIC, **given},
        blocks(rows.X),
        blocks(rows.labels["binary:logistic"]),
        callbacks=[threads],
    )
    assert threads.found == wanted


def test_maximize_tells_early_stopping_what_is_better(bridges_client: Client, rows: Any) -> None:
    def worse_every_round(predictions: Any, matrix: xgb.DMatrix) -> tuple[str, float]:
        return "spread", float(np.std(predictions))

    X, y = blocks(rows.X), blocks(rows.labels["binary:logistic"])
    for maximize, rounds in ((True, 8), (False, 3)):
        booster = dask_xgboost.train(
            bridges_client, {**LOGISTIC, "eta": 0.01, "disable_default_eval_metric": 1}, X, y, num_boost_round=8,
            evals=[(X, "train")], custom_metric=worse_every_round, early_stopping_rounds=2, maximize=maximize,
        )  # fmt: skip
        assert booster.num_boosted_rounds() == rounds


def test_the_tracker_runs_in_a_worker(bridges_client: Client, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_here(**_: Any) -> None:
        raise AssertionError("a tracker in the process of client and scheduler")

    monkeypatch.setattr("dask_xgboost.communicator.RabitTracker", not_here)
    booster = dask_xgboost.train(
        bridges_client, LOGISTIC, blocks(rows.X), blocks(rows.labels["binary:logistic"]), num_boost_round=4
    )
    assert_same(booster, alone(LOGISTIC, rows.X, rows.labels["binary:logistic"]), rows.X)


def test_verbose_eval_prints_the_lines_of_xgboost(bridges_client: Client, rows: Any, capsys: Any) -> None:
    X, y = blocks(rows.X), blocks(rows.labels["binary:logistic"])
    dask_xgboost.train(bridges_client, LOGISTIC, X, y, num_boost_round=6, evals=[(X, "train")], verbose_eval=4)
    printed = [line.partition("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == ["[0]", "[4]", "[5]"]


def test_an_error_of_xgboost_is_the_cause_of_what_is_raised(bridges_client: Client, rows: Any) -> None:
    with pytest.raises(MemberFailed, match="max_depth") as caught:
        dask_xgboost.train(
            bridges_client, {"max_depth": "deep"}, blocks(rows.X), blocks(rows.labels["binary:logistic"])
        )
    assert isinstance(caught.value.__cause__, xgb.core.XGBoostError)
