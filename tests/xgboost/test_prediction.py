"""`predict` is lazy, and gives what `Booster.predict` gives, in the form of its input."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import xgboost as xgb
from distributed import Client, LocalCluster

import dask_xgboost
from dask_bridges import DataError
from dask_xgboost.prediction import _Model, _threads

cluster = pytest.mark.cluster
COLUMNS = ["f0", "f1", "f2", "f3", "f4"]
KEYWORDS: dict[str, dict[str, Any]] = {
    "values": {},
    "margins": {"output_margin": True},
    "leaves": {"pred_leaf": True},
    "contributions": {"pred_contribs": True},
    "approximate contributions": {"pred_contribs": True, "approx_contribs": True},
    "interactions": {"pred_interactions": True},
    "some rounds": {"iteration_range": (0, 2)},
    "strict": {"strict_shape": True},
    "strict contributions": {"strict_shape": True, "pred_contribs": True},
    "unchecked names": {"validate_features": False},
}
OBJECTIVES = ["reg:squarederror", "binary:logistic", "multi:softprob", "multi:softmax"]
lazily = dask.config.set(scheduler="threads")


@pytest.fixture(scope="module")
def boosters(rows: Any) -> Any:
    def booster(objective: str, names: list[str] | None = None) -> xgb.Booster:
        params = {"objective": objective, "max_depth": 3, **({"num_class": 3} if objective[:5] == "multi" else {})}
        return xgb.train(params, xgb.DMatrix(rows.X, rows.labels[objective], feature_names=names), 4)

    return {(objective, named): booster(objective, COLUMNS if named else None)
            for objective in OBJECTIVES for named in (False, True)}  # fmt: skip


def expected(booster: xgb.Booster, X: Any, **keywords: Any) -> Any:
    margin = keywords.pop("base_margin", None)
    missing = keywords.pop("missing", np.nan)
    return booster.predict(xgb.DMatrix(X, base_margin=margin, missing=missing), **keywords)


def refuse_to_run(*_: Any, **__: Any) -> None:
    raise AssertionError("something was computed")


# What comes out is what was declared


@pytest.mark.parametrize("keywords", KEYWORDS.values(), ids=KEYWORDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_array_is_predicted_as_declared(rows: Any, boosters: Any, objective: str, keywords: Any) -> None:
    booster = boosters[objective, False]
    with dask.config.set(scheduler=refuse_to_run):
        found = dask_xgboost.predict(None, booster, da.from_array(rows.X, chunks=((100, 0, 320), (5,))), **keywords)
    values = expected(booster, rows.X, **keywords)
    assert found.shape == values.shape
    assert found.chunks[0] == (100, 0, 320)
    with lazily:
        blocks = [found.blocks[i].compute() for i in range(3)]
    assert [block.shape for block in blocks] == [(size, *found.shape[1:]) for size in (100, 0, 320)]
    assert {block.dtype for block in blocks} == {found.dtype} == {values.dtype}
    np.testing.assert_allclose(np.concatenate(blocks), values, rtol=1e-6)


@pytest.mark.parametrize("keywords", KEYWORDS.values(), ids=KEYWORDS)
@pytest.mark.parametrize("objective", ["binary:logistic", "multi:softprob"])
def test_a_frame_is_predicted_as_declared(rows: Any, boosters: Any, objective: str, keywords: Any) -> None:
    booster = boosters[objective, True]
    frame = pd.DataFrame(rows.X, columns=COLUMNS, index=np.arange(len(rows.X)) * 3)
    cuts = [slice(0, 100), slice(100, 100), slice(100, None)]
    ddf = dd.from_map(lambda cut: frame[cut], cuts, meta=frame[:0], divisions=(0, 300, 300, frame.index[-1]))
    with dask.config.set(scheduler=refuse_to_run):
        found = dask_xgboost.predict(None, booster, ddf, **keywords)
    values = expected(booster, frame, **keywords)
    with lazily:
        result = found.compute()
    np.testing.assert_allclose(result, values, rtol=1e-6)
    with lazily:
        empty = found.blocks[1].compute() if values.ndim > 2 else found.partitions[1].compute()
    assert empty.shape == (0, *values.shape[1:])
    if values.ndim > 2:
        assert isinstance(found, da.Array)
        assert found.shape[1:] == values.shape[1:]
        assert found.dtype == result.dtype == empty.dtype
        return
    assert type(found._meta) is type(result) is (pd.Series if values.ndim == 1 else pd.DataFrame)
    assert result.index.equals(frame.index)
    assert found.divisions == ddf.divisions
    if values.ndim == 1:
        assert found.dtype == result.dtype == values.dtype
    else:
        assert list(found.columns) == list(result.columns)
        assert list(found.dtypes) == list(result.dtypes)


@pytest.mark.parametrize("kind", ["unknown chunks", "columns in chunks", "sparse"])
def test_an_array_may_have(rows: Any, boosters: Any, kind: str) -> None:
    booster = boosters["multi:softprob", False]
    X, dense = da.from_array(rows.X, chunks=(70, 5)), rows.X
    if kind == "unknown chunks":
        X = dd.from_dask_array(X).to_dask_array()
    elif kind == "columns in chunks":
        X = X.rechunk((70, 2))
    else:
        X, dense = X.map_blocks(scipy.sparse.csr_matrix), scipy.sparse.csr_matrix(rows.X)
    with lazily:
        found = dask_xgboost.predict(None, booster, X).compute()
    np.testing.assert_allclose(found, expected(booster, dense), rtol=1e-6)


@pytest.mark.parametrize("form", ["arrays", "frames", "frame and array", "margins of classes"])
def test_margins_go_along_with_their_rows(rows: Any, boosters: Any, form: str) -> None:
    classes = form == "margins of classes"
    booster = boosters["multi:softprob" if classes else "binary:logistic", form.startswith("frame")]
    margin = rows.X[:, :3] / 10 if classes else rows.X[:, 0] / 10
    frame = pd.DataFrame(rows.X, columns=COLUMNS)
    X: Any = da.from_array(rows.X, chunks=(70, 5))
    lazy: Any = da.from_array(margin, chunks=(100, *margin.shape[1:]))
    if form.startswith("frame"):
        X, lazy = dd.from_pandas(frame, npartitions=6), da.from_array(margin, chunks=70)
    if form == "frames":
        lazy = dd.from_pandas(pd.Series(margin), npartitions=6)
    values = expected(booster, frame if form.startswith("frame") else rows.X, base_margin=margin)
    with lazily:
        found = dask_xgboost.predict(None, booster, X, base_margin=lazy).compute()
    np.testing.assert_allclose(found, values, rtol=1e-6)


def test_a_number_may_stand_for_a_missing_value(rows: Any, boosters: Any) -> None:
    booster = boosters["binary:logistic", False]
    with lazily:
        found = dask_xgboost.predict(None, booster, da.from_array(rows.X, chunks=(70, 5)), missing=7.0).compute()
    np.testing.assert_allclose(found, expected(booster, rows.X, missing=7.0), rtol=1e-6)


def test_rows_that_are_here_are_predicted_here(rows: Any, boosters: Any) -> None:
    frame = pd.DataFrame(rows.X, columns=COLUMNS, index=np.arange(len(rows.X)) * 2)
    found = dask_xgboost.predict(None, boosters["binary:logistic", True], frame)
    values = expected(boosters["binary:logistic", True], frame)
    pd.testing.assert_series_equal(found, pd.Series(values, index=frame.index))
    for X in (rows.X, scipy.sparse.csr_matrix(rows.X)):
        array = dask_xgboost.predict(None, boosters["binary:logistic", False], X)
        assert isinstance(array, np.ndarray)
        np.testing.assert_allclose(array, expected(boosters["binary:logistic", False], X))
    many = dask_xgboost.predict(None, boosters["multi:softprob", True], frame)
    assert isinstance(many, pd.DataFrame)
    assert many.shape == (len(frame), 3)


# The graph


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_a_small_booster_goes_with_the_tasks_and_a_large_one_is_one_node_of_the_graph(
    rows: Any, boosters: Any, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    unnamed, named = boosters["binary:logistic", False], boosters["binary:logistic", True]
    if large:
        monkeypatch.setattr("dask_xgboost.prediction._WITH_TASKS", len(unnamed.save_raw()))
    table = pd.DataFrame(rows.X, columns=COLUMNS)
    frame = dd.from_pandas(table, npartitions=6)
    for found, values in (
        (dask_xgboost.predict(None, unnamed, da.from_array(rows.X, chunks=(70, 5))), expected(unnamed, rows.X)),
        (dask_xgboost.predict(None, named, frame), expected(named, table)),
        (
            dask_xgboost.predict(None, named, frame, pred_interactions=True),
            expected(named, table, pred_interactions=True),
        ),
    ):
        (lazy,) = dask.optimize(found)
        assert sum("_Model" in str(key) for key in dict(lazy.__dask_graph__())) == large
        with lazily:
            np.testing.assert_allclose(found.compute(), values, rtol=1e-6, atol=1e-6)


@cluster
def test_any_client_may_compute_what_another_has_predicted(rows: Any, boosters: Any, bridges_client: Client) -> None:
    booster = boosters["binary:logistic", False]
    found = dask_xgboost.predict(bridges_client, booster, da.from_array(rows.X, chunks=(70, 5)))
    values = expected(booster, rows.X)
    with Client(bridges_client.cluster, set_as_default=False) as other:
        np.testing.assert_allclose(other.compute(found).result(), values, rtol=1e-6)
    np.testing.assert_allclose(found.compute(), values, rtol=1e-6)
    np.testing.assert_allclose(found.compute(scheduler="threads"), values, rtol=1e-6)


# Where and with what it is done


def test_a_booster_of_gpus_is_predicted_on_cpus(rows: Any, boosters: Any) -> None:
    booster = boosters["binary:logistic", False].copy()
    values = expected(booster, rows.X)
    booster.set_param({"device": "cuda"})
    with lazily:
        found = dask_xgboost.predict(None, booster, da.from_array(rows.X, chunks=(70, 5))).compute()
    np.testing.assert_array_equal(found, values)


_together = threading.Barrier(4)


def _threads_of_one_of_four() -> int:
    _together.wait(30)
    try:
        return _threads(10**6)
    finally:
        _together.wait(30)


def test_threads_that_have_nothing_to_do_help_with_large_partitions() -> None:
    with (
        LocalCluster(n_workers=1, threads_per_worker=4, processes=False, dashboard_address=None) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        assert client.submit(_threads, 10**6).result() == 4
        assert client.submit(_threads, 1000).result() == 1
        assert client.gather([client.submit(_threads_of_one_of_four, pure=False) for _ in range(4)]) == [1, 1, 1, 1]
    assert _threads(10**6) == 1


def test_a_worker_loads_a_booster_once_and_sends_on_its_bytes(boosters: Any) -> None:
    model = _Model(bytes(boosters["binary:logistic", False].save_raw("ubj")))
    with ThreadPoolExecutor(4) as pool:
        assert len({id(booster) for booster in pool.map(model.booster, [1] * 8)}) == 1
    sent = pickle.dumps(model)
    assert len(sent) < len(model.raw) + 200
    assert pickle.loads(sent).booster(2).num_boosted_rounds() == 4
    assert pickle.loads(sent) is pickle.loads(sent)


# What is refused


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["f0", "f1", "f2", "f3", "x"], r"missing \['f4'\], unknown \['x'\]"),
        (["f1", "f0", "f2", "f3", "f4"], r"order differs. Use data\[model.feature_names\]"),
        (["f0", "f1"], r"missing \['f2', 'f3', 'f4'\]"),
    ],
)
def test_features_that_are_not_the_models_are_named(rows: Any, boosters: Any, columns: Any, message: str) -> None:
    frame = pd.DataFrame(rows.X[:, : len(columns)], columns=columns)
    with pytest.raises(DataError, match=message):
        dask_xgboost.predict(None, boosters["binary:logistic", True], dd.from_pandas(frame, npartitions=2))


def test_an_array_of_another_width_is_refused(boosters: Any) -> None:
    with pytest.raises(DataError, match="data has 3 features, and the model 5"):
        dask_xgboost.predict(None, boosters["binary:logistic", False], da.ones((10, 3)))


def test_a_series_is_refused_with_the_remedy(boosters: Any) -> None:
    series = dd.from_pandas(pd.Series(np.ones(4)), npartitions=2)
    with pytest.raises(DataError, match=r"data.to_frame\(\)"):
        dask_xgboost.predict(None, boosters["binary:logistic", True], series)


def test_what_is_no_model_is_refused(rows: Any) -> None:
    with pytest.raises(TypeError, match=r"model is an xgboost.Booster, not dict"):
        dask_xgboost.predict(None, {}, rows.X)
