"""What people do with XGBoost on Dask, from end to end: the situations that its own Dask interface is tested in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
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
from sklearn.metrics import hinge_loss, log_loss

import dask_xgboost

pytestmark = pytest.mark.cluster
later = pytest.mark.slow
COLUMNS = list("abcd")


def numbers(rows: int = 360, seed: int = 1, classes: int = 2) -> tuple[Any, Any]:
    """Whole numbers of few values, and labels that follow them."""
    rng = np.random.default_rng(seed)
    X = rng.integers(0, 25, (rows, 4)).astype("float32")
    signal = X[:, 0] + X[:, 1] * X[:, 2] / 25 + rng.normal(0, 4, rows)
    return X, np.digitize(signal, np.quantile(signal, np.linspace(0, 1, classes + 1)[1:-1])).astype("float32")


def lazy(values: Any, chunks: Any = 60) -> Any:
    return da.from_array(values, chunks=(chunks, *values.shape[1:]))


def predicted(booster: xgb.Booster, X: Any, **keywords: Any) -> Any:
    return booster.predict(xgb.DMatrix(X, **keywords))


# Training


@pytest.mark.parametrize("weighted", [pytest.param(False, marks=later), True])
def test_covers_add_up_and_are_those_of_one_machine(bridges_client: Client, weighted: bool) -> None:
    X, y = numbers()
    weight = np.linspace(0.5, 2, len(X)).astype("float32") if weighted else None
    params = {"max_depth": 3}
    booster = dask_xgboost.train(
        bridges_client, params, lazy(X), lazy(y), weight=None if weight is None else lazy(weight), num_boost_round=1
    )
    oracle = xgb.train(params, xgb.QuantileDMatrix(X, y, weight=weight), 1)
    trees = [json.loads(model.get_dump(with_stats=True, dump_format="json")[0]) for model in (booster, oracle)]
    assert trees[0]["cover"] == pytest.approx(trees[1]["cover"]) == (len(X) if weight is None else weight.sum())
    stack = [trees[0]]
    while stack:
        node = stack.pop()
        if "children" in node:
            assert node["cover"] == pytest.approx(sum(child["cover"] for child in node["children"]))
            stack.extend(node["children"])


@pytest.mark.parametrize(
    ("objective", "chunks"),
    [("reg:squarederror", (10, 340, 10)), pytest.param("binary:logistic", (350, 5, 5), marks=later)],
)
def test_the_first_guess_is_that_of_all_rows(bridges_client: Client, objective: str, chunks: Any) -> None:
    X, y = numbers()
    order = np.argsort(y, kind="stable")
    with dask.config.set({"dask-bridges.balance-tolerance": 1e9}):
        booster = dask_xgboost.train(
            bridges_client, {"objective": objective}, lazy(X[order], chunks), lazy(y[order], chunks), num_boost_round=1
        )
    oracle = xgb.train({"objective": objective}, xgb.QuantileDMatrix(X, y), 1)
    found = [
        json.loads(model.save_config())["learner"]["learner_model_param"]["base_score"] for model in (booster, oracle)
    ]
    assert json.loads(found[0]) == pytest.approx(json.loads(found[1]))


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("some values on one worker", marks=later),
        "a whole column on one worker",
        pytest.param("a column of none", marks=later),
    ],
)
def test_values_may_be_missing_on_some_workers_only(bridges_client: Client, how: str) -> None:
    X, y = numbers()
    where = {"some values on one worker": slice(0, 60, 7), "a whole column on one worker": slice(60, 120)}
    X[where.get(how, slice(None)), 1] = np.nan
    booster = dask_xgboost.train(bridges_client, {}, lazy(X), lazy(y), num_boost_round=3)
    oracle = xgb.train({}, xgb.QuantileDMatrix(X, y), 3)
    np.testing.assert_allclose(predicted(booster, X), predicted(oracle, X), atol=1e-5)


@pytest.mark.parametrize("classes", [2, pytest.param(4, marks=later)])
def test_one_row_is_trained_on_and_gone_on_from(bridges_client: Client, classes: int) -> None:
    X, y = numbers(classes=classes)
    params = {"objective": "multi:softprob", "num_class": 4, "eval_metric": "merror"} if classes > 2 else {}
    history: dict[str, Any] = {}
    given: dict[str, Any] = {"evals": [((lazy(X), lazy(y)), "many")], "evals_result": history, "num_boost_round": 2}
    first = dask_xgboost.train(bridges_client, params, lazy(X[:1]), lazy(y[:1]), **given)
    then = dask_xgboost.train(bridges_client, params, lazy(X[:1]), lazy(y[:1]), xgb_model=first, **given)
    assert (first.num_boosted_rounds(), then.num_boosted_rounds()) == (2, 4)
    assert [len(values) for values in history["many"].values()] == [2]
    assert dask_xgboost.predict(bridges_client, then, lazy(X)).compute().shape == ((360, 4) if classes > 2 else (360,))


@pytest.mark.parametrize("classes", [2, pytest.param(3, marks=later)])
def test_boosting_goes_on_from_predictions(bridges_client: Client, classes: int) -> None:
    """Margins are collections that are computed with the data."""
    X, y = numbers(classes=classes)
    params = {"objective": "multi:softprob", "num_class": 3} if classes > 2 else {"objective": "binary:logistic"}
    params = {**params, "base_score": 0.5}
    first = dask_xgboost.train(bridges_client, params, lazy(X), lazy(y), num_boost_round=2)
    margin = dask_xgboost.predict(bridges_client, first, lazy(X), output_margin=True)
    second = dask_xgboost.train(bridges_client, params, lazy(X), lazy(y), base_margin=margin, num_boost_round=2)
    both = dask_xgboost.train(bridges_client, params, lazy(X), lazy(y), num_boost_round=4)
    found = dask_xgboost.predict(bridges_client, second, lazy(X), base_margin=margin, output_margin=True).compute()
    np.testing.assert_allclose(found, both.predict(xgb.DMatrix(X), output_margin=True), atol=1e-4)


@pytest.mark.parametrize("max_cat_to_onehot", [pytest.param(99, marks=later), 1])
def test_categories_are_split_as_indicators_are(bridges_client: Client, max_cat_to_onehot: int) -> None:
    X, y = numbers(classes=3)
    frame = pd.DataFrame(X, columns=COLUMNS).assign(label=y)
    frame["a"] = (frame.a % 5).astype(int).map(dict(enumerate(["tea", "rum", "gin", "ale", "milk"]))).astype("category")
    params = {"max_cat_to_onehot": max_cat_to_onehot, "max_depth": 3}
    booster = dask_xgboost.train(
        bridges_client, params, dd.from_pandas(frame, npartitions=6), "label", num_boost_round=4
    )
    features = frame.drop(columns="label")
    oracle = xgb.train(params, xgb.QuantileDMatrix(features, y, enable_categorical=True), 4)
    found = predicted(booster, features, enable_categorical=True)
    np.testing.assert_allclose(found, predicted(oracle, features, enable_categorical=True), atol=1e-5)
    if max_cat_to_onehot == 99:
        dummies = pd.get_dummies(features, columns=["a"]).astype("float32")
        plain = dask_xgboost.train(
            bridges_client, params, dd.from_pandas(dummies.assign(label=y), npartitions=6), "label", num_boost_round=4
        )
        np.testing.assert_allclose(found, predicted(plain, dummies), atol=1e-5)


@pytest.mark.slow
def test_sparse_rows_with_missing_ones_train_as_dense_ones(bridges_client: Client) -> None:
    X, y = numbers()
    X[::4] = np.nan
    X[X < 5] = np.nan
    histories = []
    for kind in (np.asarray, lambda block: scipy.sparse.csr_matrix(np.nan_to_num(block))):
        model = dask_xgboost.XGBClassifier(n_estimators=4, missing=0.0 if kind is not np.asarray else np.nan)
        values = lazy(X).map_blocks(kind)
        model.fit(values, lazy(y), eval_set=[(values, lazy(y))], verbose=False)
        histories.append(model.evals_result()["validation_0"]["logloss"])
    np.testing.assert_allclose(*histories, rtol=1e-5)


def test_partitions_lie_on_one_worker_each(bridges_client: Client) -> None:
    X, y = numbers()
    matrix = dask_xgboost.DMatrix(bridges_client, lazy(X), lazy(y))

    def held() -> list[int]:
        """On how many workers each partition is."""
        return [len(workers) for workers in bridges_client.who_has(matrix.parts.futures).values()]

    assert held() == [1] * 6
    assert sum(len(keys) for keys in bridges_client.has_what().values()) == 6
    dask_xgboost.train(bridges_client, {}, matrix, num_boost_round=1, evals=[(matrix, "train")])
    assert held() == [1] * 6


@pytest.mark.slow
def test_a_model_is_saved_every_round_by_one_of_the_workers(bridges_client: Client, tmp_path: Path) -> None:
    X, y = numbers()
    saved = []
    for name, make, data in (("here", xgb, (X, y)), ("there", dask_xgboost, (lazy(X), lazy(y)))):
        folder = tmp_path / name
        folder.mkdir()
        keep = xgb.callback.TrainingCheckPoint(directory=folder, interval=1, name="model")
        make.XGBRegressor(n_estimators=4, callbacks=[keep]).fit(*data)
        saved.append(sorted(path.name for path in folder.iterdir()))
    assert saved[0] == saved[1] != []
    files = [tmp_path / name / saved[0][-1] for name in ("here", "there")]
    np.testing.assert_allclose(*(predicted(xgb.Booster(model_file=file), X) for file in files), atol=1e-5)


class Verbosity(xgb.callback.TrainingCallback):
    def before_training(self, model: Any) -> Any:
        self.found = xgb.get_config()["verbosity"]
        return model


def test_the_configuration_of_here_holds_on_the_workers(bridges_client: Client) -> None:
    X, y = numbers()
    seen = Verbosity()
    with xgb.config_context(verbosity=3):
        dask_xgboost.train(bridges_client, {}, lazy(X), lazy(y), num_boost_round=1, callbacks=[seen])
    assert seen.found == 3
    dask_xgboost.train(bridges_client, {}, lazy(X), lazy(y), num_boost_round=1, callbacks=[seen])
    assert seen.found == xgb.get_config()["verbosity"] != 3


def test_metrics_of_scikit_learn_are_taken_one_beside_those_of_xgboost(bridges_client: Client) -> None:
    X, y = numbers()
    given = {"eval_set": [(lazy(X), lazy(y))], "verbose": False}
    model = dask_xgboost.XGBClassifier(n_estimators=2, eval_metric=["logloss", dask_xgboost.gathered(hinge_loss)])
    found = model.fit(lazy(X), lazy(y), **given).evals_result()["validation_0"]
    oracle = xgb.XGBClassifier(n_estimators=2, eval_metric=["logloss", hinge_loss])
    wanted = oracle.fit(X, y, eval_set=[(X, y)], verbose=False).evals_result()["validation_0"]
    for name in ("logloss", "hinge_loss"):
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-5)
    with pytest.raises(NotImplementedError, match="multiple custom metrics"):
        dask_xgboost.XGBClassifier(eval_metric=[hinge_loss, log_loss]).fit(lazy(X), lazy(y), **given)


TREES = st.fixed_dictionaries({
    "max_depth": st.integers(1, 6),
    "max_leaves": st.integers(0, 20),
    "grow_policy": st.sampled_from(["depthwise", "lossguide"]),
    "max_bin": st.sampled_from([32, 64, 256]),
    "min_child_weight": st.sampled_from([0.5, 1.0, 5.0]),
    "lambda": st.floats(0.1, 3.0),
    "alpha": st.sampled_from([0.0, 0.2]),
    "gamma": st.sampled_from([0.0, 0.1]),
    "eta": st.floats(0.05, 0.5),
})  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["reg:squarederror", "binary:logistic"])
def test_trees_of_any_shape_are_those_of_one_machine(bridges_client: Client, objective: str) -> None:
    X, y = numbers()
    dX = dask_xgboost.DMatrix(bridges_client, lazy(X), lazy(y))

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(TREES)
    def check(params: Any) -> None:
        params = {**params, "objective": objective}
        history: dict[str, Any] = {}
        booster = dask_xgboost.train(
            bridges_client, params, dX, num_boost_round=6, evals=[(dX, "train")], evals_result=history
        )
        (values,) = history["train"].values()
        assert (np.diff(values) <= 1e-6).all()
        oracle = xgb.train(params, xgb.QuantileDMatrix(X, y, max_bin=params["max_bin"]), 6)
        np.testing.assert_allclose(predicted(booster, X), predicted(oracle, X), atol=1e-4)

    check()


# Layouts


@st.composite
def placed(draw: Any) -> tuple[list[int], list[int]]:
    """Where rows are cut, and the worker of each partition."""
    edges = sorted(draw(st.lists(st.integers(0, 360), min_size=1, max_size=6)))
    return edges, draw(st.lists(st.integers(0, 2), min_size=len(edges) + 1, max_size=len(edges) + 1))


def mixed() -> pd.DataFrame:
    """Columns of every kind, with missing values, weights, and a label."""
    X, y = numbers()
    frame = pd.DataFrame(X, columns=COLUMNS)
    frame.loc[::9, "a"] = np.nan
    frame["b"] = frame.b.astype("Int16")
    frame.loc[::11, "b"] = pd.NA
    frame["c"] = pd.Categorical.from_codes((frame.c % 4).astype(int), ["N", "E", "S", "W"])
    frame["d"] = frame.d > 12
    return frame.assign(label=y, weight=np.linspace(0.5, 2, len(frame)))


def test_any_split_and_any_place_of_the_same_rows_gives_the_same_model(bridges_client: Client) -> None:
    frame = mixed()
    params = {"objective": "binary:logistic", "max_depth": 4, "eval_metric": ["auc", "logloss"]}
    features = frame[COLUMNS]
    matrix = xgb.QuantileDMatrix(features, frame.label, weight=frame.weight, enable_categorical=True)
    wanted: dict[str, Any] = {}
    oracle = xgb.train(params, matrix, 4, evals=[(matrix, "e")], evals_result=wanted, verbose_eval=False)
    workers = sorted(bridges_client.scheduler_info(n_workers=-1)["workers"])

    @settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(placed(), placed())
    def check(train: Any, valid: Any) -> None:
        frames = []
        for edges, owners in (train, valid):
            parts = [frame[start:stop] for start, stop in zip([0, *edges], [*edges, len(frame)])]
            held = [
                bridges_client.scatter(part, workers=[workers[owner]], hash=False) for part, owner in zip(parts, owners)
            ]
            frames.append(dd.from_delayed(held, meta=frame[:0], verify_meta=False))
        found: dict[str, Any] = {}
        with dask.config.set({"dask-bridges.balance-tolerance": 1e9}):  # leave the rows where they are
            booster = dask_xgboost.train(
                bridges_client, params, frames[0], "label", weight="weight", num_boost_round=4,
                evals=[(frames[1], "e")], evals_result=found,
            )  # fmt: skip
        np.testing.assert_allclose(
            predicted(booster, features, enable_categorical=True), predicted(oracle, features, enable_categorical=True),
            atol=1e-5,
        )  # fmt: skip
        for name, values in wanted["e"].items():
            np.testing.assert_allclose(found["e"][name], values, atol=2e-5)

    check()


# Predicting with what was trained


@pytest.mark.parametrize(
    "kind",
    [pytest.param("numbers", marks=later), pytest.param("classes", marks=later), pytest.param("dart", marks=later)],
)
def test_contributions_add_up_to_margins(bridges_client: Client, kind: str) -> None:
    X, y = numbers(classes=3)
    params: dict[str, Any] = {
        "numbers": {"objective": "reg:squarederror"},
        "classes": {"objective": "multi:softprob", "num_class": 3, "num_parallel_tree": 2},
        "dart": {"booster": "dart", "rate_drop": 0.3},
    }[kind]
    booster = dask_xgboost.train(bridges_client, params, lazy(X), lazy(y), num_boost_round=4)

    def found(**keywords: Any) -> Any:
        return dask_xgboost.predict(bridges_client, booster, lazy(X), **keywords).compute()

    margins, shares = found(output_margin=True), found(pred_contribs=True)
    assert shares.shape == ((360, 3, 5) if kind == "classes" else (360, 5))
    np.testing.assert_allclose(shares.sum(axis=-1), margins, atol=1e-4)
    np.testing.assert_allclose(found(pred_interactions=True).sum(axis=(-1, -2)), margins, atol=1e-4)
    leaves = found(pred_leaf=True, strict_shape=True)
    assert leaves.shape == (360, 4, *((3, 2) if kind == "classes" else (1, 1)))
    some = found(iteration_range=(0, 2))
    np.testing.assert_allclose(some, booster.predict(xgb.DMatrix(X), iteration_range=(0, 2)), atol=1e-6)
    assert np.abs(some - found()).max() > 1e-3


# At the same time


def work(seed: int) -> tuple[Any, Any, int]:
    X, y = numbers(seed=seed)
    return X, y, 2 + seed


def check_model(booster: xgb.Booster, seed: int) -> None:
    X, y, rounds = work(seed)
    assert booster.num_boosted_rounds() == rounds
    oracle = xgb.train({"objective": "binary:logistic"}, xgb.QuantileDMatrix(X, y), rounds)
    np.testing.assert_allclose(predicted(booster, X), predicted(oracle, X), atol=1e-5)


def fit(seed: int, client: Client | None = None) -> Any:
    X, y, rounds = work(seed)
    return dask_xgboost.XGBClassifier(n_estimators=rounds, client=client).fit(lazy(X), lazy(y)).get_booster()


def fit_in_task(seed: int) -> bytes:
    return bytes(fit(seed).save_raw())


def from_tasks(client: Client) -> list[Any]:
    futures = [client.submit(fit_in_task, seed, pure=False) for seed in range(3)]
    return [xgb.Booster(model_file=bytearray(raw)) for raw in client.gather(futures)]


def from_two_clients(client: Client) -> list[Any]:
    with (
        Client(client.scheduler.address, set_as_default=False) as other,
        ThreadPoolExecutor() as pool,
    ):
        return list(pool.map(fit, range(3), [client, other, client]))


def from_coroutines(client: Client) -> list[Any]:
    async def main() -> list[Any]:
        async with Client(client.scheduler.address, asynchronous=True) as own:
            trainings = []
            for seed in range(3):
                X, y, rounds = work(seed)
                params = {"objective": "binary:logistic"}
                trainings.append(dask_xgboost.train(own, params, lazy(X), lazy(y), num_boost_round=rounds))
            return list(await asyncio.gather(*trainings))

    return asyncio.run(main())


@pytest.mark.parametrize(
    "how", [from_tasks, pytest.param(from_two_clients, marks=later), pytest.param(from_coroutines, marks=later)]
)
def test_trainings_at_the_same_time_are_each_as_if_alone(
    bridges_client: Client, how: Callable[[Client], list[Any]]
) -> None:
    for seed, booster in enumerate(how(bridges_client)):
        check_model(booster, seed)


# The retired package


@pytest.mark.slow
def test_what_the_retired_package_did_is_done(bridges_client: Client) -> None:
    """Ten rows in frames and arrays, columns in chunks; trained twice; by functions and by estimators."""
    frame = pd.DataFrame({"x": range(1, 11), "y": [1, 0] * 5})
    labels = pd.Series([1, 0, 1, 0, 1, 0, 1, 1, 1, 1])
    params = {"max_depth": 2, "eta": 1, "objective": "binary:logistic"}
    oracle = xgb.train(params, xgb.DMatrix(frame, labels), 10)
    ddf, dlabels = dd.from_pandas(frame, npartitions=4), dd.from_pandas(labels, npartitions=4)
    X, y = da.from_array(frame.to_numpy(), chunks=(2, 2)), da.from_array(labels.to_numpy(), chunks=2)
    for data, target in ((ddf, dlabels), (ddf, dlabels), (X, y), (X.rechunk((5, 1)), y.rechunk(5))):
        booster = dask_xgboost.train(bridges_client, params, data, target)
        found = dask_xgboost.predict(bridges_client, booster, data)
        assert isinstance(found, dd.Series if data is ddf else da.Array)
        wanted = oracle.predict(xgb.DMatrix(frame))
        np.testing.assert_allclose(found.compute(), wanted, atol=1e-5)
    for name in ("XGBClassifier", "XGBRegressor"):
        ours, theirs = getattr(dask_xgboost, name)(), getattr(xgb, name)()
        ours.fit(X.rechunk(5), y.rechunk(5))
        theirs.fit(frame.to_numpy(), labels)
        np.testing.assert_allclose(ours.feature_importances_, theirs.feature_importances_, atol=1e-5)
        np.testing.assert_allclose(ours.predict(X).compute(), theirs.predict(frame.to_numpy()), atol=1e-5)
