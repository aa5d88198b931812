"""The estimators are XGBoost's own, on whatever the rows lie: collections on workers, numpy and pandas."""

import asyncio
import copy
import json
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import joblib
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import xgboost as xgb
import xgboost.dask
from distributed import Client, LocalCluster
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator, parametrize_with_checks

import dask_xgboost
from dask_bridges import DataError

cluster, slow = pytest.mark.cluster, pytest.mark.slow


def later(*values: Any) -> Any:
    """A parameter set that runs with the slow ones."""
    return pytest.param(*values, marks=slow)


COLUMNS = ["f0", "f1", "f2", "f3", "f4"]
KINDS = ["XGBClassifier", "XGBRegressor", "XGBRFClassifier", "XGBRFRegressor"]
FEW: dict[str, Any] = {"n_estimators": 4, "max_depth": 3}
#: Random forests draw rows and columns on every worker; these draw none.
ALL_ROWS = {"subsample": 1.0, "colsample_bynode": 1.0}
WORDS = np.array(["early", "late", "never"])


def pair(kind: str, **params: Any) -> tuple[Any, Any]:
    """Ours, and XGBoost's own."""
    params = {**FEW, **params}
    return getattr(dask_xgboost, kind)(**params), getattr(xgb, kind)(**params)


def labels_of(kind: str, rows: Any) -> Any:
    if "Classifier" in kind:
        return rows.labels["multi:softprob"].astype(int)
    return rows.labels["reg:squarederror"].astype("float32")


def blocks(values: Any, cuts: Any = 70) -> Any:
    return da.from_array(values, chunks=(cuts, *np.shape(values)[1:]))


def frame_of(rows: Any, **more: Any) -> pd.DataFrame:
    return pd.DataFrame(rows.X, columns=COLUMNS).assign(**more)


def words_of(rows: Any) -> Any:
    return WORDS[rows.labels["multi:softprob"].astype(int)]


def values_of(model: Any, X: Any) -> Any:
    """Probabilities, or predictions: what tells models apart."""
    return model.predict_proba(X) if hasattr(model, "predict_proba") else model.predict(X)


def params_of(model: Any) -> dict[str, Any]:
    """Hyper-parameters; nan, the default of `missing`, equals itself only as the same object."""
    return {name: str(value) if value != value else value for name, value in model.get_params().items()}


def refuse_to_run(*_: Any, **__: Any) -> None:
    raise AssertionError("something was computed")


@pytest.fixture
def two_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in memory goes to two workers, few as its rows are."""
    monkeypatch.setattr("dask_xgboost.inmemory.ROWS_A_PARTITION", 200)


# scikit-learn's own checks, here; below on a cluster

SUBSAMPLED = "a random forest draws rows, weighted and repeated ones differently; so does XGBoost's own"
OBJECTIVE = "more than two classes change the parameter objective; so in XGBoost, and what reads models relies on it"
FAILURES = {
    "XGBClassifier": {
        "check_dont_overwrite_parameters": OBJECTIVE,
        "check_estimators_overwrite_params": OBJECTIVE,
    },
    "XGBRegressor": {"check_regressor_multioutput": "XGBoost predicts float32; scikit-learn asks for float64"},
}
FOREST = dict.fromkeys(
    ["check_sample_weight_equivalence_on_dense_data", "check_sample_weight_equivalence_on_sparse_data"], SUBSAMPLED
)
FAILURES |= {"XGBRFClassifier": FAILURES["XGBClassifier"] | FOREST, "XGBRFRegressor": FAILURES["XGBRegressor"] | FOREST}


class OneQuery(dask_xgboost.XGBRanker):  # type: ignore[misc]
    """scikit-learn knows no queries: all rows answer one."""

    def fit(self, X: Any, y: Any) -> Any:
        return super().fit(X, y, qid=np.zeros(len(np.asarray(y)), dtype=int))


def checked(*kinds: str) -> list[Any]:
    return [getattr(dask_xgboost, kind)(n_estimators=3, n_jobs=1) for kind in kinds]


def expected_failures(model: Any) -> dict[str, str]:
    return FAILURES.get(type(model).__name__, {})


@parametrize_with_checks(checked("XGBClassifier", "XGBRegressor"), expected_failed_checks=expected_failures)
def test_scikit_learns_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@slow
@parametrize_with_checks(
    [*checked("XGBRFClassifier", "XGBRFRegressor"), OneQuery(n_estimators=3, n_jobs=1)],
    expected_failed_checks=expected_failures,
)
def test_scikit_learns_checks_of_the_other_estimators(estimator: Any, check: Any) -> None:
    check(estimator)


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_fails_of_scikit_learns_checks_fails_with_xgboosts_own_too(kind: str) -> None:
    found = check_estimator(getattr(xgb, kind)(n_estimators=3, n_jobs=1), on_fail=None, on_skip=None)
    failed = {result["check_name"] for result in found if result["status"] == "failed"}
    assert set(FAILURES[kind]) < failed


@pytest.fixture(scope="module")
def threads() -> Iterator[LocalCluster]:
    with LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0", silence_logs=False
    ) as cluster:
        yield cluster


@cluster
@slow
@parametrize_with_checks(checked(*KINDS), expected_failed_checks=expected_failures)
def test_scikit_learns_checks_on_a_cluster(estimator: Any, check: Any, threads: LocalCluster) -> None:
    with Client(threads):
        check(estimator)


# Without a client


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_client_an_estimator_is_xgboosts_own(rows: Any, kind: str) -> None:
    ours, plain = pair(kind)
    y = labels_of(kind, rows)
    assert params_of(ours) == params_of(plain)
    for model in (ours, plain):
        model.fit(rows.X[:300], y[:300], eval_set=[(rows.X[300:], y[300:])], verbose=False)
    np.testing.assert_array_equal(values_of(ours, rows.X), values_of(plain, rows.X))
    np.testing.assert_array_equal(ours.apply(rows.X), plain.apply(rows.X))
    np.testing.assert_array_equal(ours.feature_importances_, plain.feature_importances_)
    assert ours.evals_result() == plain.evals_result()
    assert ours.score(rows.X, y) == plain.score(rows.X, y)
    assert params_of(ours) == params_of(plain)


def test_a_collection_needs_a_client(rows: Any) -> None:
    with pytest.raises(ValueError, match="no Dask client"):
        dask_xgboost.XGBRegressor().fit(blocks(rows.X), blocks(rows.weight))


def test_what_is_not_fitted_says_so(rows: Any) -> None:
    with pytest.raises(NotFittedError):
        dask_xgboost.XGBClassifier().predict(blocks(rows.X))


# The same model as one machine


@cluster
@pytest.mark.parametrize(
    ("kind", "collection"),
    [("XGBClassifier", "array"), ("XGBClassifier", "frame"), later("XGBRegressor", "array"), ("XGBRegressor", "frame"),
     ("XGBRFClassifier", "array"), later("XGBRFClassifier", "frame"), later("XGBRFRegressor", "array"),
     ("XGBRFRegressor", "frame")],
)  # fmt: skip
def test_on_collections_the_model_is_that_of_one_machine(
    bridges_client: Client, rows: Any, kind: str, collection: str
) -> None:
    ours, plain = pair(kind, **(ALL_ROWS if "RF" in kind else {}))
    y = labels_of(kind, rows)
    X: Any = rows.X if collection == "array" else frame_of(rows)
    plain.fit(X, y, sample_weight=rows.weight)
    if collection == "array":
        ours.fit(blocks(X), blocks(y), sample_weight=blocks(rows.weight))
    else:
        df = dd.from_pandas(frame_of(rows, label=y, weight=rows.weight), npartitions=5)
        ours.fit(df[COLUMNS], df.label, sample_weight=df.weight)
    np.testing.assert_allclose(values_of(ours, X), values_of(plain, X), atol=1e-5)
    np.testing.assert_allclose(ours.feature_importances_, plain.feature_importances_, atol=1e-4)
    assert params_of(ours) == params_of(plain)
    assert ours.n_features_in_ == 5
    if collection == "frame":
        assert ours.feature_names_in_.tolist() == COLUMNS


@cluster
@pytest.mark.parametrize("kind", ["XGBClassifier", later("XGBRegressor")])
def test_the_model_is_that_of_xgboost_dask(bridges_client: Client, rows: Any, kind: str) -> None:
    X, y = blocks(rows.X), blocks(labels_of(kind, rows))
    ours = pair(kind)[0].fit(X, y)
    theirs = getattr(xgb.dask, f"Dask{kind}")(**FEW)
    theirs.client = bridges_client
    theirs.fit(X, y)
    np.testing.assert_allclose(values_of(ours, X).compute(), values_of(theirs, X).compute(), atol=1e-5)


@cluster
@pytest.mark.parametrize("kind", KINDS)
def test_in_memory_a_training_on_the_cluster_equals_one_here(
    bridges_client: Client, rows: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, plain = pair(kind)
    y = labels_of(kind, rows)
    plain.fit(rows.X, y, sample_weight=rows.weight)
    monkeypatch.setattr("xgboost.sklearn.train", refuse_to_run)
    ours.fit(rows.X, y, sample_weight=rows.weight)
    np.testing.assert_array_equal(values_of(ours, rows.X), values_of(plain, rows.X))


@cluster
@pytest.mark.usefixtures("two_partitions")
@pytest.mark.parametrize(
    "make", [np.asarray, pd.DataFrame, later(scipy.sparse.csc_matrix), later(np.ndarray.tolist)],
    ids=["numpy", "pandas", "sparse", "lists"],
)  # fmt: skip
def test_in_memory_rows_may_be_spread_over_workers(bridges_client: Client, rows: Any, make: Any) -> None:
    X, y = make(rows.X), labels_of("XGBClassifier", rows)
    ours, plain = pair("XGBClassifier")
    ranks: list[int] = []

    class Ranks(xgb.callback.TrainingCallback):
        def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
            self.world = xgb.collective.get_world_size()
            return False

    watch = Ranks()
    ours.set_params(callbacks=[watch]).fit(X, y)
    ranks.append(watch.world)
    plain.fit(X, y)
    assert ranks == [2]
    np.testing.assert_allclose(ours.predict_proba(X), plain.predict_proba(X), atol=1e-5)


# Labels


LABELS = {
    "strings": WORDS,
    "two strings": WORDS[:2],
    "objects": WORDS.astype(object),
    "two numbers": np.array([1, 2]),
    "floats": np.array([-1.0, 2.0, 5.0]),
    "dates": np.array(["2024-01-03", "2024-02-01", "2025-01-01"], dtype="datetime64[s]"),
}


@cluster
@pytest.mark.parametrize(
    "classes",
    [later(classes) if name in ("objects", "floats", "strings") else classes for name, classes in LABELS.items()],
    ids=LABELS,
)
def test_labels_of_any_kind_come_back(bridges_client: Client, rows: Any, classes: Any, tmp_path: Path) -> None:
    codes = rows.labels["binary:logistic" if len(classes) == 2 else "multi:softprob"].astype(int)
    ours, plain = pair("XGBClassifier")
    ours.fit(blocks(rows.X), blocks(classes[codes]))
    plain.fit(rows.X, codes)
    assert ours.classes_.tolist() == classes.tolist()
    assert ours.objective == plain.objective
    want = classes[plain.predict(rows.X)]
    assert ours.predict(blocks(rows.X)).compute().tolist() == ours.predict(rows.X).tolist() == want.tolist()
    frame = ours.predict(dd.from_pandas(frame_of(rows), npartitions=2))
    assert frame.dtype == frame.compute().dtype
    assert frame.compute().to_numpy().astype(classes.dtype).tolist() == want.tolist()
    ours.save_model(tmp_path / "model.json")
    loaded = dask_xgboost.XGBClassifier()
    loaded.load_model(tmp_path / "model.json")
    assert loaded.predict(rows.X).tolist() == want.tolist()


@cluster
@pytest.mark.parametrize("dtype", ["category", later("str"), later("boolean"), "Int64"])
def test_labels_may_be_of_pandas_dtypes(bridges_client: Client, rows: Any, dtype: str) -> None:
    codes = rows.labels["binary:logistic"].astype(int)
    values = pd.Series(WORDS[codes] if dtype in ("category", "str") else codes).astype(dtype)
    df = dd.from_pandas(frame_of(rows, label=values), npartitions=3)
    model = pair("XGBClassifier")[0].fit(df[COLUMNS], df.label)
    assert model.classes_.tolist() == sorted(set(values.tolist()))
    assert model.score(df[COLUMNS], df.label) == accuracy_score(values.tolist(), model.predict(rows.X).tolist())


@cluster
def test_only_the_distinct_labels_travel(bridges_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    X = da.from_array(rng.integers(0, 9, (60_000, 1)).astype("float32"), chunks=(20_000, 1))
    y = X[:, 0].map_blocks(lambda block: np.where(block > 4, "a" * 50, "b" * 50))
    arrived: list[int] = []
    gather = Client.gather

    def gather_and_weigh(self: Client, *args: Any, **kwargs: Any) -> Any:
        async def weigh() -> Any:
            result = await gather(self, *args, **kwargs)
            arrived.append(len(pickle.dumps(result)))
            return result

        return weigh() if self.asynchronous else gather(self, *args, **kwargs)

    monkeypatch.setattr(Client, "gather", gather_and_weigh)
    model = dask_xgboost.XGBClassifier(n_estimators=1).fit(X, y)
    assert model.classes_.tolist() == ["a" * 50, "b" * 50]
    assert arrived
    assert max(arrived) < 30_000


@cluster
def test_several_labels_a_row_are_indicators(bridges_client: Client, rows: Any) -> None:
    y = np.stack([rows.labels["binary:logistic"], rows.X[:, 1] > 14], axis=1).astype(int)
    ours, plain = pair("XGBClassifier")
    plain.fit(rows.X, y)
    ours.fit(blocks(rows.X), blocks(y))
    predicted = ours.predict(blocks(rows.X))
    assert predicted.shape == predicted.compute().shape == (420, 2)
    np.testing.assert_array_equal(predicted.compute(), plain.predict(rows.X))
    np.testing.assert_allclose(ours.predict_proba(blocks(rows.X)), plain.predict_proba(rows.X), atol=1e-5)


@cluster
def test_the_objective_follows_the_number_of_classes_again_and_again(bridges_client: Client, rows: Any) -> None:
    model, _ = pair("XGBClassifier")
    for objective, kind in [("multi:softprob", "multi:softprob"), ("binary:logistic", "binary:logistic")]:
        for where in (blocks, np.asarray):
            model.fit(where(rows.X), where(rows.labels[kind]))
            assert model.objective == objective
            assert json.loads(model.get_booster().save_config())["learner"]["objective"]["name"] == objective
    assert model.n_classes_ == 2


@cluster
def test_softmax_is_kept_and_still_has_probabilities(bridges_client: Client, rows: Any) -> None:
    ours, plain = pair("XGBClassifier", objective="multi:softmax")
    y = rows.labels["multi:softmax"].astype(int)
    ours.fit(blocks(rows.X), blocks(WORDS[y]))
    plain.fit(rows.X, y)
    assert ours.objective == "multi:softmax"
    assert ours.predict(blocks(rows.X)).compute().tolist() == WORDS[plain.predict(rows.X)].tolist()
    assert ours.predict(rows.X).tolist() == WORDS[plain.predict(rows.X)].tolist()
    np.testing.assert_allclose(ours.predict_proba(blocks(rows.X)), plain.predict_proba(rows.X), atol=1e-5)


# What else `fit` takes


@cluster
@pytest.mark.parametrize("where", ["collections", later("memory"), "memory for evaluation"])
def test_early_stopping_with_weights_and_margins_is_that_of_one_machine(
    bridges_client: Client, rows: Any, where: str
) -> None:
    y = words_of(rows) != "late"
    margin = np.where(rows.X[:, 3] > 9, 0.2, -0.1).astype("float32")
    train, valid = slice(0, 280), slice(280, None)
    ours, plain = pair(
        "XGBClassifier", n_estimators=40, learning_rate=0.9, early_stopping_rounds=3, eval_metric=["error", "logloss"]
    )

    def fit(model: Any, make: Any, make_eval: Any) -> Any:
        X, label, weight, start = (make(values[train]) for values in (rows.X, y, rows.weight, margin))
        eval_X, eval_y, eval_weight, eval_start = (make_eval(v[valid]) for v in (rows.X, y, rows.weight, margin))
        return model.fit(
            X, label, sample_weight=weight, base_margin=start, eval_set=[(X, label), (eval_X, eval_y)],
            sample_weight_eval_set=[weight, eval_weight], base_margin_eval_set=[start, eval_start], verbose=False,
        )  # fmt: skip

    make = np.asarray if where == "memory" else blocks
    fit(ours, make, blocks if where == "collections" else np.asarray)
    fit(plain, np.asarray, np.asarray)
    assert ours.best_iteration == plain.best_iteration < 30
    assert list(ours.evals_result()) == ["validation_0", "validation_1"]
    for name, log in plain.evals_result().items():
        for metric, values in log.items():
            assert ours.evals_result()[name][metric] == pytest.approx(values, abs=1e-5)
    for X, start in ((rows.X, margin), (blocks(rows.X), blocks(margin))):
        np.testing.assert_allclose(
            ours.predict_proba(X, base_margin=start), plain.predict_proba(rows.X, base_margin=margin), atol=1e-5
        )
        np.testing.assert_array_equal(ours.apply(X), plain.apply(rows.X))


@cluster
def test_an_evaluation_set_that_is_the_training_set_is_not_placed_again(
    bridges_client: Client, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    unplaced = dask_xgboost.DMatrix.unplaced

    def counted(*args: Any) -> Any:
        made.append(args[-1])
        return unplaced(*args)

    monkeypatch.setattr(dask_xgboost.DMatrix, "unplaced", counted)
    y = rows.labels["binary:logistic"]
    for make in (blocks, np.asarray):
        X, label, other = make(rows.X), make(y), make(rows.X[:200])
        sets = [(X, label), (other, make(y[:200])), (X, label)]
        model = pair("XGBClassifier")[0].fit(X, label, eval_set=sets, verbose=False)
        log = model.evals_result()
        assert log["validation_0"] == log["validation_2"] != log["validation_1"]
    assert made == ["X", "eval_set[1]"] * 2


@cluster
@pytest.mark.parametrize("kind", ["XGBClassifier", "XGBRegressor"])
def test_the_users_objective_and_metric_are_kept(bridges_client: Client, rows: Any, kind: str) -> None:
    def doubled(y_true: Any, y_pred: Any) -> tuple[Any, Any]:
        return 2 * (y_pred - y_true), np.full(len(y_true), 2.0)

    def far_off(y_true: Any, y_pred: Any) -> float:
        return float(np.mean(np.abs(y_true - y_pred)))

    ours, plain = pair(kind, objective=doubled, eval_metric=far_off)
    y = rows.labels["binary:logistic"].astype(int)
    X, lazy = blocks(rows.X), blocks(y)
    ours.fit(X, lazy, eval_set=[(X, lazy)], verbose=False)
    plain.fit(rows.X, y, eval_set=[(rows.X, y)], verbose=False)
    assert ours.objective is doubled
    assert clone(ours).objective is doubled
    np.testing.assert_allclose(values_of(ours, rows.X), values_of(plain, rows.X), atol=1e-5)
    assert ours.evals_result()["validation_0"]["far_off"] == pytest.approx(
        plain.evals_result()["validation_0"]["far_off"], abs=1e-5
    )


@cluster
def test_a_training_goes_on_from_a_model(bridges_client: Client, rows: Any) -> None:
    y = labels_of("XGBRegressor", rows)
    ours, plain = pair("XGBRegressor")
    ours.fit(blocks(rows.X), blocks(y), xgb_model=pair("XGBRegressor")[0].fit(rows.X, y))
    plain.fit(rows.X, y, xgb_model=pair("XGBRegressor")[1].fit(rows.X, y))
    assert ours.get_booster().num_boosted_rounds() == 8
    np.testing.assert_allclose(ours.predict(rows.X), plain.predict(rows.X), atol=1e-4)


@cluster
def test_categories_are_trained_on(bridges_client: Client, rows: Any) -> None:
    frame = frame_of(rows).assign(f0=pd.Categorical(WORDS[rows.X[:, 0].astype(int) % 3]))
    y = rows.labels["reg:squarederror"]
    ours, plain = pair("XGBRegressor", enable_categorical=True)
    plain.fit(frame, y)
    df = dd.from_pandas(frame.assign(label=y), npartitions=3)
    for X, label in ((df[COLUMNS], df.label), (frame, y)):
        ours.fit(X, label)
        np.testing.assert_allclose(ours.predict(df[COLUMNS]), plain.predict(frame), atol=1e-5)
    with pytest.raises(DataError, match=r"'f0'.*categorical and enable_categorical is False"):
        dask_xgboost.XGBRegressor().fit(frame, y)


@cluster
def test_negative_numbers_of_jobs_are_all_threads_of_a_worker(bridges_client: Client, rows: Any) -> None:
    class Threads(xgb.callback.TrainingCallback):
        def after_training(self, model: Any) -> Any:
            import json

            self.found = json.loads(model.save_config())["learner"]["generic_param"]["nthread"]
            return model

    for jobs, wanted in ((-1, "1"), (None, "1"), (2, "2")):
        watch = Threads()
        dask_xgboost.XGBRegressor(n_estimators=1, n_jobs=jobs, callbacks=[watch]).fit(rows.X, rows.weight)
        assert watch.found == wanted


@cluster
def test_metrics_are_printed_as_xgboost_does(bridges_client: Client, rows: Any, capsys: Any) -> None:
    model, _ = pair("XGBRegressor")
    model.fit(rows.X, rows.weight, eval_set=[(rows.X, rows.weight)])
    assert [line.partition("\t")[0] for line in capsys.readouterr().out.splitlines()] == ["[0]", "[1]", "[2]", "[3]"]


# Predictions of collections


@pytest.fixture(scope="module")
def fitted(rows: Any) -> Any:
    return pair("XGBClassifier")[0].fit(frame_of(rows), words_of(rows))


def test_predictions_of_arrays_are_lazy_and_aligned(rows: Any, fitted: Any) -> None:
    X = blocks(rows.X, (100, 0, 320))
    with dask.config.set(scheduler=refuse_to_run):
        lazy = {
            "predict": fitted.predict(X), "predict_proba": fitted.predict_proba(X), "apply": fitted.apply(X),
        }  # fmt: skip
    for method, collection in lazy.items():
        want = getattr(fitted, method)(frame_of(rows))
        assert collection.shape == want.shape
        assert collection.chunks[0] == (100, 0, 320)
        got = collection.compute(scheduler="threads")
        assert got.dtype == collection.dtype
        np.testing.assert_array_equal(got, want)


def test_predictions_of_frames_have_their_index_and_partitions(rows: Any, fitted: Any) -> None:
    pdf = frame_of(rows).set_index(np.arange(420) * 2 + 1)
    df = dd.from_pandas(pdf, npartitions=4)
    with dask.config.set(scheduler=refuse_to_run):
        labels, shares, leaves = fitted.predict(df), fitted.predict_proba(df), fitted.apply(df)
    with dask.config.set(scheduler="threads"):
        pd.testing.assert_series_equal(labels.compute(), pd.Series(fitted.predict(pdf), index=pdf.index))
        want = pd.DataFrame(fitted.predict_proba(pdf), index=pdf.index, columns=["early", "late", "never"])
        pd.testing.assert_frame_equal(shares.compute(), want)
        np.testing.assert_array_equal(leaves.compute(), fitted.apply(pdf))
        assert labels.get_partition(1).compute().index.equals(df.get_partition(1).compute().index)
    assert labels.divisions == shares.divisions == df.divisions


def test_margins_are_no_labels(rows: Any, fitted: Any) -> None:
    margins = fitted.predict(blocks(rows.X), output_margin=True)
    np.testing.assert_array_equal(margins.compute(scheduler="threads"), fitted.predict(rows.X, output_margin=True,
                                  validate_features=False))  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize("kind", ["XGBClassifier", "XGBRegressor"])
def test_scores_of_collections_are_those_of_scikit_learn(rows: Any, kind: str, weighted: bool) -> None:
    classes = kind == "XGBClassifier"
    y = words_of(rows) if classes else 1e3 + labels_of(kind, rows).astype("float64")
    model = pair(kind)[0].fit(rows.X, y)
    weight = rows.weight.astype("float64") if weighted else None
    want = (accuracy_score if classes else r2_score)(y, model.predict(rows.X), sample_weight=weight)
    frame = dd.from_pandas(frame_of(rows, y=y, w=rows.weight.astype("float64")), npartitions=3)
    with dask.config.set(scheduler="threads"):
        got = model.score(blocks(rows.X), blocks(y, 90), None if weight is None else blocks(weight))
        model.get_booster().feature_names = COLUMNS
        framed = model.score(frame[COLUMNS], frame.y, frame.w if weighted else None)
    assert got == pytest.approx(want, abs=1e-9)
    assert framed == pytest.approx(want, abs=1e-9)


# The client, clones, pickles and files


@cluster
def test_a_client_is_no_hyper_parameter(bridges_client: Client, rows: Any) -> None:
    given = dask_xgboost.XGBRegressor(client=bridges_client, **FEW)
    later = dask_xgboost.XGBRegressor(**FEW)
    later.client = bridges_client
    for model in (given, later, dask_xgboost.XGBRegressor(**FEW).set_params(client=bridges_client)):
        assert model.client is bridges_client
        assert "client" not in model.get_params()
        for copied in (clone(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert copied.client is None
            assert params_of(copied) == params_of(model)
        assert model.fit(blocks(rows.X), blocks(rows.weight)) is model
        assert pickle.loads(pickle.dumps(model)).client is None
        assert "_client" not in vars(pickle.loads(pickle.dumps(model)))
    with pytest.raises(TypeError, match="Dask client"):
        given.client = "tcp://nowhere"


@pytest.mark.parametrize("kind", [*KINDS, "XGBRanker"])
def test_an_estimator_becomes_xgboosts_own_and_comes_back(rows: Any, kind: str) -> None:
    ours, plain = pair(kind)
    codes = labels_of("XGBClassifier", rows)
    y: Any = WORDS[codes] if "Classifier" in kind else codes
    groups = {"qid": rows.qid} if kind == "XGBRanker" else {}
    plain.fit(rows.X, codes, **groups)
    ours.fit(rows.X, y, **groups)
    own = pickle.loads(pickle.dumps(ours.to_xgboost()))
    assert type(own) is getattr(xgb, kind)
    assert params_of(own) == params_of(plain)
    assert b"dask_" not in pickle.dumps(own).replace(b"dask_xgboost_classes", b"")
    np.testing.assert_array_equal(own.predict(rows.X), plain.predict(rows.X))
    back = type(ours).from_xgboost(own)
    assert type(back) is type(ours)
    assert vars(back).keys() == vars(ours).keys() | ({"_classes"} if "Classifier" in kind else set())
    np.testing.assert_array_equal(back.predict(rows.X), ours.predict(rows.X))
    other = type(ours).from_xgboost(pickle.loads(pickle.dumps(plain)))
    np.testing.assert_array_equal(values_of(other, rows.X), values_of(plain, rows.X))
    assert type(ours).from_xgboost(plain).get_booster() is not plain.get_booster()
    assert type(clone(ours.to_xgboost())) is type(plain)
    with pytest.raises(TypeError, match=rf"takes an xgboost.{kind}"):
        type(ours).from_xgboost(StandardScaler())


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_models_are_those_of_xgboost(rows: Any, kind: str, tmp_path: Path) -> None:
    ours, plain = pair(kind)
    y = labels_of(kind, rows)
    ours.fit(rows.X, y).save_model(tmp_path / "ours.json")
    plain.fit(rows.X, y).save_model(tmp_path / "plain.json")
    assert (tmp_path / "ours.json").read_bytes() == (tmp_path / "plain.json").read_bytes()
    loaded, own = pair(kind)
    loaded.load_model(tmp_path / "plain.json")
    own.load_model(tmp_path / "ours.json")
    np.testing.assert_array_equal(values_of(loaded, rows.X), values_of(plain, rows.X))
    np.testing.assert_array_equal(values_of(own, rows.X), values_of(plain, rows.X))


# scikit-learn's searches and pipelines


GRID = {"max_depth": [1, 3], "learning_rate": [0.3, 0.9]}


def search_with(model: Any, X: Any, y: Any, **keywords: Any) -> Any:
    return GridSearchCV(model, GRID, cv=2, error_score="raise", **keywords).fit(X, y)


@cluster
@pytest.mark.parametrize("behind", ["one after the other", "threads", "joblib on Dask"])
def test_a_search_on_data_in_memory_has_the_cluster_behind_it(bridges_client: Client, rows: Any, behind: str) -> None:
    ours, plain = pair("XGBClassifier", n_estimators=2)
    codes = labels_of("XGBClassifier", rows)
    want = search_with(plain, rows.X, codes)
    backend = {"threads": ("threading", 3), "joblib on Dask": ("dask", 3)}.get(behind)
    if backend is None:
        found = search_with(ours, rows.X, WORDS[codes])
    else:
        with joblib.parallel_config(backend[0], n_jobs=backend[1]):
            found = search_with(ours, rows.X, WORDS[codes])
    assert found.best_params_ == want.best_params_
    np.testing.assert_array_equal(found.cv_results_["mean_test_score"], want.cv_results_["mean_test_score"])
    assert found.predict(rows.X).tolist() == WORDS[want.predict(rows.X)].tolist()


@cluster
def test_a_pipeline_ends_in_an_estimator(bridges_client: Client, rows: Any) -> None:
    ours, plain = pair("XGBRegressor")
    y = labels_of("XGBRegressor", rows)
    got = make_pipeline(StandardScaler(), ours).fit(rows.X, y, xgbregressor__sample_weight=rows.weight)
    want = make_pipeline(StandardScaler(), plain).fit(rows.X, y, xgbregressor__sample_weight=rows.weight)
    np.testing.assert_array_equal(got.predict(rows.X), want.predict(rows.X))


@cluster
def test_several_targets_may_be_columns(bridges_client: Client, rows: Any) -> None:
    ours, plain = pair("XGBRegressor")
    y = np.stack([rows.X[:, 0] * rows.X[:, 1], rows.labels["reg:squarederror"]], axis=1)
    df = dd.from_pandas(frame_of(rows, a=y[:, 0], b=y[:, 1]), npartitions=3)
    ours.fit(df[COLUMNS], df[["a", "b"]])
    plain.fit(frame_of(rows), y)
    predicted = ours.predict(df[COLUMNS])
    np.testing.assert_allclose(predicted.compute().to_numpy(), plain.predict(frame_of(rows)), rtol=1e-5, atol=1e-5)
    assert ours.score(df[COLUMNS], df[["a", "b"]]) == pytest.approx(plain.score(frame_of(rows), y), abs=1e-6)


# Asynchronous clients, and tasks


@cluster
def test_with_an_asynchronous_client_a_fit_is_awaited(bridges_client: Client, rows: Any) -> None:
    words = words_of(rows)

    async def work() -> Any:
        async with Client(bridges_client.scheduler.address, asynchronous=True) as client:
            model = dask_xgboost.XGBClassifier(client=client, **FEW)
            assert await model.fit(blocks(rows.X), blocks(words), eval_set=[(rows.X, words)], verbose=False) is model
            score = await model.score(blocks(rows.X), blocks(words))
            with pytest.raises(DataError, match="fractions"):
                await model.fit(blocks(rows.X), blocks(rows.weight))
            return model, score

    model, score = asyncio.run(work())
    assert model.predict(rows.X).tolist() == pair("XGBClassifier")[0].fit(rows.X, words).predict(rows.X).tolist()
    assert score == accuracy_score(words, model.predict(rows.X))


@cluster
def test_inside_a_task_collections_are_trained_on_by_all_and_rows_in_memory_there(
    bridges_client: Client, rows: Any
) -> None:
    X, y = rows.X, rows.labels["binary:logistic"]

    class Where(xgb.callback.TrainingCallback):
        def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
            self.world, self.thread = xgb.collective.get_world_size(), (os.getpid(), threading.get_ident())
            return False

    def fit(lazy: bool) -> Any:
        where, make = Where(), blocks if lazy else np.asarray
        model = dask_xgboost.XGBClassifier(n_estimators=2, callbacks=[where]).fit(make(X), make(y))
        return where.world, where.thread == (os.getpid(), threading.get_ident()), model.predict_proba(X)

    (*spread, there), (*alone, here) = (bridges_client.submit(fit, lazy).result() for lazy in (True, False))
    assert (spread, alone) == ([3, False], [1, True])
    np.testing.assert_allclose(there, here, atol=1e-5)


# Rankings


@cluster
@pytest.mark.usefixtures("two_partitions")
@pytest.mark.parametrize("form", ["collections", "frame with qid", "qid", later("group"), later("pandas with qid")])
def test_a_ranking_is_that_of_one_machine(bridges_client: Client, rows: Any, form: str) -> None:
    ours, plain = pair("XGBRanker", eval_metric="ndcg@5")
    y = rows.labels["rank:ndcg"].astype(int)
    plain.fit(rows.X, y, qid=rows.qid, eval_set=[(rows.X, y)], eval_qid=[rows.qid])
    pdf = frame_of(rows, qid=rows.qid)
    if form == "collections":
        X, label, qid = (blocks(values) for values in (rows.X, y, rows.qid))
        ours.fit(X, label, qid=qid, eval_set=[(X, label)], eval_qid=[qid])
    elif form == "frame with qid":
        df = dd.from_pandas(pdf.assign(y=y).set_index("qid", drop=False), npartitions=3)
        X, label = df[[*COLUMNS, "qid"]], df.y
        ours.fit(X, label, eval_set=[(X, label)])
    elif form == "pandas with qid":
        ours.fit(pdf, y, eval_set=[(pdf, y)])
    elif form == "group":
        sizes = np.full(30, 14)
        ours.fit(rows.X, y, group=sizes, eval_set=[(rows.X, y)], eval_group=[sizes])
    else:
        ours.fit(rows.X, y, qid=rows.qid, eval_set=[(rows.X, y)], eval_qid=[rows.qid])
    want = plain.predict(rows.X)
    X = pdf if "qid" in form and form != "qid" else rows.X
    np.testing.assert_allclose(ours.predict(X), want, atol=1e-5)
    lazy = dd.from_pandas(pdf, npartitions=3) if X is pdf else blocks(rows.X)
    np.testing.assert_allclose(ours.predict(lazy), want, atol=1e-5)
    np.testing.assert_array_equal(ours.apply(lazy), plain.apply(rows.X))
    got = ours.evals_result()["validation_0"]["ndcg@5"]
    assert got == pytest.approx(plain.evals_result()["validation_0"]["ndcg@5"], abs=1e-5)
    if X is pdf:
        assert ours.score(pdf, y) == pytest.approx(got[-1])


@cluster
@pytest.mark.usefixtures("two_partitions")
def test_groups_in_memory_stay_whole_wherever_a_half_ends(bridges_client: Client, rows: Any) -> None:
    ours, plain = pair("XGBRanker")
    X, y, qid = rows.X[:409], rows.labels["rank:ndcg"][:409].astype(int), rows.qid[:409]
    np.testing.assert_allclose(ours.fit(X, y, qid=qid).predict(X), plain.fit(X, y, qid=qid).predict(X), atol=1e-5)


@cluster
def test_weights_of_groups_in_memory_are_one_a_group(bridges_client: Client, rows: Any) -> None:
    ours, plain = pair("XGBRanker")
    weight = np.linspace(0.5, 2, 30)
    y = rows.labels["rank:ndcg"].astype(int)
    plain.fit(rows.X, y, qid=rows.qid, sample_weight=weight)
    ours.fit(rows.X, y, qid=rows.qid, sample_weight=weight)
    np.testing.assert_array_equal(ours.predict(rows.X), plain.predict(rows.X))
    with pytest.raises(DataError, match="sample_weight has 420 entries for 30 query groups"):
        ours.fit(rows.X, y, qid=rows.qid, sample_weight=rows.weight)


@cluster
def test_a_ranking_without_queries_is_refused(bridges_client: Client, rows: Any) -> None:
    model, y = dask_xgboost.XGBRanker(), rows.labels["rank:ndcg"]
    with pytest.raises(DataError, match="qid is missing"):
        model.fit(blocks(rows.X), blocks(y))
    with pytest.raises(DataError, match="X has 420 rows and qid has 419"):
        model.fit(rows.X, y, group=[400, 19])
    with pytest.raises(DataError, match="group is of no use for collections"):
        model.fit(blocks(rows.X), blocks(y), group=blocks(np.full(30, 14)))
    with pytest.raises(DataError, match="has a column 'qid', and qid is given too"):
        model.fit(frame_of(rows, qid=rows.qid), y, qid=rows.qid)
    with pytest.raises(TypeError, match="score of a ranker takes data in memory"):
        model.score(blocks(rows.X), blocks(y))
    with pytest.raises(ValueError, match="custom objective function not supported"):
        dask_xgboost.XGBRanker(objective=print)


# What is refused


@cluster
@pytest.mark.parametrize("make", [blocks, np.asarray], ids=["collections", "memory"])
def test_labels_that_training_does_not_see_are_refused(bridges_client: Client, rows: Any, make: Any) -> None:
    words = words_of(rows)
    train, other = words != "never", words != "early"
    with pytest.raises(DataError, match=r"y of eval_set\[1\] holds labels that y does not have: 'never'; its classes"):
        dask_xgboost.XGBClassifier().fit(
            make(rows.X[train]), make(words[train]),
            eval_set=[(make(rows.X[train]), make(words[train])), (make(rows.X[other]), make(words[other]))],
        )  # fmt: skip


@cluster
def test_y_of_another_length_is_refused(bridges_client: Client, rows: Any) -> None:
    for model in (dask_xgboost.XGBClassifier(), dask_xgboost.XGBRegressor()):
        with pytest.raises(DataError, match=r"X has 420 rows and y has 400: they must match row for row"):
            model.fit(rows.X, labels_of("XGBClassifier", rows)[:400])
        with pytest.raises(DataError, match=r"X has 420 rows and label has 400"):
            model.fit(blocks(rows.X), blocks(labels_of("XGBClassifier", rows)[:400]))
        with pytest.raises(DataError, match=r"sample_weight of eval_set\[0\]"):
            model.fit(rows.X, rows.qid, eval_set=[(rows.X, rows.qid)], sample_weight_eval_set=[[1.0, 2.0]])


def test_a_regressor_of_strings_is_refused_here(rows: Any) -> None:
    for words in (words_of(rows), words_of(rows).astype(object)):
        with pytest.raises(DataError, match="y holds what is no number: could not convert"):
            dask_xgboost.XGBRegressor().fit(rows.X, words)


@cluster
def test_a_regressor_of_strings_is_refused(bridges_client: Client, rows: Any) -> None:
    words, frame = words_of(rows), dd.from_pandas(frame_of(rows, y=words_of(rows)), npartitions=2)
    for X, y in ((rows.X, words), (blocks(rows.X), blocks(words)), (frame[COLUMNS], frame.y)):
        with pytest.raises(DataError, match=r"(y holds what is no number|y has dtype <U5|label has dtype)"):
            dask_xgboost.XGBRegressor().fit(X, y)


@cluster
def test_what_is_no_classes_is_refused(bridges_client: Client, rows: Any) -> None:
    model, X = dask_xgboost.XGBClassifier(), blocks(rows.X)
    missing = np.where(rows.qid == 3, np.nan, 1.0)
    for make in (blocks, np.asarray):
        with pytest.raises(DataError, match=r"Unknown label type: continuous\. y holds fractions"):
            model.fit(make(rows.X), make(rows.weight))
        with pytest.raises(DataError, match="y has 14 missing or infinite labels; drop those rows"):
            model.fit(make(rows.X), make(missing))
        with pytest.raises(DataError, match="several columns, which are read as indicators"):
            model.fit(make(rows.X), make(rows.X[:, :2]))
    with pytest.raises(DataError, match=r"several kinds \(int, str\)"):
        model.fit(rows.X, np.array(["a"] * 400 + [1] * 20, dtype=object))
    with pytest.raises(DataError, match=r"20000 different labels, and classes are 10000 at most"):
        model.fit(da.ones((20_000, 1), chunks=-1), da.arange(20_000, chunks=-1))
    with pytest.raises(DataError, match=r"y='late' is a name: pass the column, such as df\['late'\]"):
        model.fit(X, "late")
    assert not model.__sklearn_is_fitted__()


@cluster
def test_collections_and_memory_are_not_mixed_in_a_set(bridges_client: Client, rows: Any) -> None:
    with pytest.raises(DataError, match=r"Dask collections are X, and in memory y and sample_weight\. Give all"):
        dask_xgboost.XGBRegressor().fit(blocks(rows.X), rows.weight, sample_weight=rows.weight)
    with pytest.raises(DataError, match=r"sample_weight_eval_set has 2 entries, and eval_set 1"):
        dask_xgboost.XGBRegressor().fit(
            rows.X, rows.weight, eval_set=[(rows.X, rows.weight)], sample_weight_eval_set=[rows.weight] * 2
        )


@cluster
def test_what_cannot_be_trained_on_a_cluster_is_refused(bridges_client: Client, rows: Any) -> None:
    with pytest.raises(ValueError, match=r"booster='gblinear' cannot be trained on a cluster"):
        dask_xgboost.XGBRegressor(booster="gblinear").fit(rows.X, rows.weight)
    for kind in ("XGBRFClassifier", "XGBRFRegressor"):
        forest = getattr(dask_xgboost, kind)()
        with pytest.raises(NotImplementedError, match="not implemented for the sklearn random forest"):
            forest.set_params(early_stopping_rounds=2).fit(blocks(rows.X), blocks(rows.qid))
    with pytest.raises(ValueError, match="early_stopping_rounds needs rows to look at"):
        dask_xgboost.XGBRegressor(early_stopping_rounds=2).fit(blocks(rows.X), blocks(rows.weight))
