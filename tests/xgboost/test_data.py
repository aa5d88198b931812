"""What data is taken, and what is refused, naming collection, partition and column."""

import itertools
import re
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import xgboost as xgb
from distributed import Client

import dask_xgboost
from dask_bridges import DataError

pytestmark = pytest.mark.cluster

LOGISTIC = {"objective": "binary:logistic", "max_depth": 3, "eta": 0.5}
N = 240


def small(label: Any = None, **columns: Any) -> pd.DataFrame:
    """Two plain features, a label that follows them, and the given columns."""
    rng = np.random.default_rng(5)
    frame = pd.DataFrame({"a": rng.integers(0, 20, N).astype("float64"), "b": rng.integers(0, 9, N)})
    frame["label"] = (frame.a + frame.b > 14).astype("float64") if label is None else label
    return frame.assign(**columns)


def in_partitions(*frames: pd.DataFrame, meta: Any = None) -> Any:
    """A dask dataframe of exactly these partitions, described by the first one (or `meta`)."""
    meta = frames[0][:0] if meta is None else meta
    return dd.from_map(lambda frame: frame, list(frames), meta=meta, enforce_metadata=False)


def train(client: Client, df: Any, y: Any = "label", params: Any = None, **keywords: Any) -> xgb.Booster:
    return dask_xgboost.train(client, LOGISTIC if params is None else params, df, y, num_boost_round=4, **keywords)


def assert_same(booster: xgb.Booster, frame: pd.DataFrame) -> None:
    """The model is that of one machine, which saw all rows at once."""
    X = frame.drop(columns="label")
    oracle = xgb.train(LOGISTIC, xgb.QuantileDMatrix(X, frame.label, enable_categorical=True), 4)
    data = xgb.DMatrix(X, enable_categorical=True)
    np.testing.assert_allclose(booster.predict(data), oracle.predict(data), atol=1e-5)


def refused(client: Client, message: str, *args: Any, **keywords: Any) -> None:
    with pytest.raises(DataError, match=message):
        train(client, *args, **keywords)


# Labels


def test_the_call_of_the_retired_package_still_works(bridges_client: Client) -> None:
    frame = small()
    df = dd.from_pandas(frame, npartitions=3)
    booster = dask_xgboost.train(bridges_client, LOGISTIC, df[["a", "b"]], df.label, num_boost_round=4)
    assert_same(booster, frame)
    assert dask_xgboost.predict(bridges_client, booster, df[["a", "b"]]).compute().shape == (N,)


def test_a_number_in_the_place_of_labels_is_taken_for_rounds(bridges_client: Client) -> None:
    refused(bridges_client, r"pass num_boost_round=50", dd.from_pandas(small(), npartitions=2), 50)


def test_missing_labels_are_asked_for(bridges_client: Client) -> None:
    refused(bridges_client, r"X has no labels: pass y", dd.from_pandas(small(), npartitions=2), None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"y": "target"}, r"label='target' is not a column of X; it has \['a', 'b', 'label'\]"),
        ({"y": "label", "weight": "w"}, r"weight='w' is not a column of X"),
        ({"y": "label", "label": "label"}, r"y and label are the same thing"),
    ],
)
def test_a_column_that_is_not_there_is_named(bridges_client: Client, given: Any, message: str) -> None:
    refused(bridges_client, message, dd.from_pandas(small(), npartitions=2), **given)


def test_an_array_has_no_columns_to_name(bridges_client: Client) -> None:
    refused(bridges_client, "X is not a dataframe", da.ones((10, 2), chunks=5), "label")


@pytest.mark.parametrize("X", [small(), small().to_numpy(), dd.from_pandas(small(), npartitions=2).a, da.ones(9)])
def test_what_is_no_matrix_of_dask_is_refused_with_the_remedy(bridges_client: Client, X: Any) -> None:
    refused(bridges_client, r"dask.dataframe.from_pandas|X.to_frame\(\)|two, are wanted", X, da.ones(9))


@pytest.mark.parametrize(
    ("objective", "label", "wanted"),
    [
        ("binary:logistic", 2, "between 0 and 1"),
        ("reg:logistic", -0.5, "between 0 and 1"),
        ("count:poisson", -1, "0 or more"),
        ("reg:tweedie", -1, "0 or more"),
        ("reg:gamma", 0, "greater than 0"),
        ("reg:squaredlogerror", -1, "greater than -1"),
        ("rank:ndcg", -1, "0 or more"),
        ("multi:softmax", 3, r"num_class - 1 = 2"),
        ("multi:softprob", 0.5, r"whole numbers"),
    ],
)
def test_labels_out_of_range_are_refused_with_their_partition(
    bridges_client: Client, objective: str, label: float, wanted: str
) -> None:
    frame = small(label=1.0)
    frame.loc[N - 1, "label"] = label
    params = {"objective": objective, "num_class": 3} if objective.startswith("multi") else {"objective": objective}
    keywords = {"qid": "b"} if objective.startswith("rank") else {}
    if keywords:
        frame["b"] = np.arange(N) // 10
    refused(
        bridges_client, f"partition 2 of X: label holds values from .*{objective} takes .*{wanted}",
        dd.from_pandas(frame, npartitions=3), params=params, **keywords,
    )  # fmt: skip


def test_the_number_of_classes_is_asked_for(bridges_client: Client) -> None:
    refused(
        bridges_client, "multi:softmax needs num_class", dd.from_pandas(small(), npartitions=2),
        params={"objective": "multi:softmax"},
    )  # fmt: skip


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("field", ["label", "weight"])
def test_fields_with_missing_values_are_refused_with_their_partition(
    bridges_client: Client, field: str, bad: float
) -> None:
    frame = small(weight=1.0)
    frame.loc[100, field] = bad
    refused(
        bridges_client, f"partition 1 of X: {field} has 1 missing or infinite values",
        dd.from_pandas(frame, npartitions=3), weight="weight",
    )  # fmt: skip


def test_a_missing_label_of_a_nullable_type_is_refused(bridges_client: Client) -> None:
    frame = small()
    frame["label"] = frame.label.astype("Int64")
    frame.loc[[0, 1], "label"] = pd.NA
    df = dd.from_pandas(frame, npartitions=3)
    refused(bridges_client, "partition 0 of X: label has 2 missing or infinite values", df)


def test_negative_weights_are_refused(bridges_client: Client) -> None:
    df = dd.from_pandas(small(weight=-1.0), npartitions=3)
    refused(bridges_client, "partition 0 of X: weight goes down to -1", df, weight="weight")


@pytest.mark.parametrize("field", ["weight", "qid", "label_lower_bound", "label_upper_bound"])
@pytest.mark.parametrize("kind", ["array", "frame"])
def test_a_table_where_each_row_has_one_value_is_refused(bridges_client: Client, field: str, kind: str) -> None:
    X, y, table = da.ones((20, 3), chunks=10), da.ones(20, chunks=10), da.ones((20, 2), chunks=10)
    if kind == "frame":
        X, y, table = dd.from_dask_array(X, columns=list("abc")), dd.from_dask_array(y), dd.from_dask_array(table)
    with pytest.raises(DataError, match=f"{field} has 2 columns; one value a row is wanted"):
        dask_xgboost.train(bridges_client, {}, X, y, **{field: table})


def test_data_without_rows_is_refused(bridges_client: Client) -> None:
    frame = small()[:0]
    refused(bridges_client, "X has no rows in any of its 2 partitions", in_partitions(frame, frame))


def test_an_evaluation_set_is_checked_by_its_name(bridges_client: Client) -> None:
    df = dd.from_pandas(small(), npartitions=2)
    bad = dd.from_pandas(small(label=7.0), npartitions=2)
    refused(bridges_client, r"partition 0 of evals 'valid': label holds values from 7", df, evals=[(bad, "valid")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": {"a": "c"}}, r"evals 'valid' has other features .* missing \['a'\], unknown \['c'\]"),
        ({"columns": {"a": "b", "b": "a"}}, r"evals 'valid' has other features .* order \['b', 'a'\]"),
    ],
)
def test_features_of_an_evaluation_set_that_differ_are_named(bridges_client: Client, change: Any, message: str) -> None:
    frame = small()
    other = dd.from_pandas(frame.rename(**change), npartitions=2)
    refused(bridges_client, message, dd.from_pandas(frame, npartitions=2), evals=[(other, "valid")])


def test_an_evaluation_array_of_another_width_is_refused(bridges_client: Client) -> None:
    X, y = da.ones((20, 3), chunks=10), da.ones(20, chunks=10)
    refused(bridges_client, "'valid' has 2 features and the training set 3", X, y, evals=[((X[:, :2], y), "valid")])


@pytest.mark.parametrize("evals", [["valid"], [("valid", 3)], [(da.ones(3),)]])
def test_evals_of_another_form_are_refused(bridges_client: Client, evals: Any) -> None:
    refused(
        bridges_client, r"evals is a sequence of \(what, name\)", dd.from_pandas(small(), npartitions=2), evals=evals
    )


@pytest.mark.parametrize("name", ["feature_names", "feature_types", "feature_weights"])
def test_what_belongs_to_features_has_one_entry_each(bridges_client: Client, name: str) -> None:
    message = f"{name} has 1 entries for the 2 features of X"
    refused(bridges_client, message, da.ones((20, 2)), da.ones(20), **{name: [1]})


def test_early_stopping_asks_for_rows_to_look_at(bridges_client: Client) -> None:
    refused(bridges_client, r"pass evals=", dd.from_pandas(small(), npartitions=2), early_stopping_rounds=3)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", ["frame", "tuple"])
def test_an_evaluation_set_takes_the_weights_it_has(bridges_client: Client, form: str, weighted: bool) -> None:
    frame = small(weight=np.linspace(0.1, 3, N))
    valid = frame if weighted else frame.drop(columns="weight")
    df, vdf = dd.from_pandas(frame, npartitions=3), dd.from_pandas(valid, npartitions=2)
    what = vdf if form == "frame" else (vdf.drop(columns="label"), vdf.label)
    history: dict[str, Any] = {}
    booster = train(bridges_client, df, weight="weight", evals=[(what, "valid")], evals_result=history)
    right = np.abs(booster.predict(xgb.DMatrix(frame[["a", "b"]])) - (1 - frame.label))
    loss = np.average(-np.log(right), weights=valid.get("weight"))
    assert history["valid"]["logloss"][-1] == pytest.approx(loss, abs=1e-5)


# Types of columns


NULLABLE = ["Int64", "Float32", "boolean", "int64[pyarrow]", "double[pyarrow]"]


@pytest.mark.parametrize(
    ("dtype", "missing"), [("bool", False), ("int8", False), *itertools.product(NULLABLE, [False, True])]
)
def test_columns_train_and_predict_as_on_one_machine(bridges_client: Client, dtype: str, missing: bool) -> None:
    frame = small()
    frame["c"] = (frame.a > 9).astype(dtype) if "bool" in dtype else frame.a.astype(dtype)
    if missing:
        frame.loc[::7, "c"] = pd.NA
    df = dd.from_pandas(frame, npartitions=3)
    booster = train(bridges_client, df)
    assert_same(booster, frame)
    X = frame.drop(columns="label")
    found = dask_xgboost.predict(bridges_client, booster, df.drop(columns="label")).compute()
    np.testing.assert_allclose(found, booster.predict(xgb.DMatrix(X)), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["Int64", "Float32", "boolean", "int64[pyarrow]", "bool"])
def test_labels_may_be_nullable(bridges_client: Client, dtype: str) -> None:
    frame = small()
    df = dd.from_pandas(frame.assign(label=frame.label.astype(dtype)), npartitions=3)
    assert_same(train(bridges_client, df), frame)
    assert_same(train(bridges_client, df[["a", "b"]], df.label), frame)


REFUSED = {
    "str": (["x", "y"] * (N // 2), "str", r"frame.astype\({'c': 'category'}\)"),
    "string[pyarrow]": (["x", "y"] * (N // 2), "string[pyarrow]", r"frame.astype\({'c': 'category'}\)"),
    "object": ([1, "y"] * (N // 2), "object", r"frame.astype\({'c': 'category'}\)"),
    "datetime": (pd.date_range("2020", periods=N), None, r"frame\['c'\].dt.dayofyear"),
    "datetime with zone": (pd.date_range("2020", periods=N, tz="UTC"), None, r"frame\['c'\].dt.dayofyear"),
    "timestamp[pyarrow]": (pd.date_range("2020", periods=N), "timestamp[us][pyarrow]", r"frame\['c'\].dt.dayofyear"),
    "complex": (np.ones(N) * 1j, None, "spread it over columns of numbers"),
    "list[pyarrow]": (None, None, "spread it over columns of numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_columns_that_are_no_numbers_are_refused_with_the_remedy(bridges_client: Client, name: str) -> None:
    values, dtype, remedy = REFUSED[name]
    if name == "list[pyarrow]":
        import pyarrow as pa

        column = pd.Series(pd.arrays.ArrowExtensionArray(pa.array([[1, 2]] * N)))
    else:
        column = pd.Series(values, dtype=dtype)
    with dask.config.set({"dataframe.convert-string": False}):
        df = in_partitions(small(c=column))
    refused(
        bridges_client,
        f"column 'c' of X has dtype {re.escape(str(column.dtype))}, which XGBoost cannot train on: .*{remedy}",
        df,
    )


@pytest.mark.parametrize("kind", ["U3", "datetime64[s]", "complex64"])
def test_arrays_that_are_no_numbers_are_refused(bridges_client: Client, kind: str) -> None:
    refused(bridges_client, "X has dtype .*, which XGBoost cannot train on", da.zeros((9, 2), dtype=kind), da.ones(9))


@pytest.mark.parametrize("dtype", ["str", "category", "datetime64[ns]"])
@pytest.mark.parametrize("form", ["column", "series"])
def test_labels_that_are_no_numbers_are_refused_with_the_remedy(bridges_client: Client, dtype: str, form: str) -> None:
    df = dd.from_pandas(small(), npartitions=2)
    df = df.assign(label=df.label.astype(dtype))
    given = (df, "label") if form == "column" else (df[["a", "b"]], df.label)
    refused(bridges_client, rf"label\S* has dtype {dtype[:3]}.*, and numbers are wanted: .* codes", *given)


def test_bounds_may_be_infinite_but_not_missing(bridges_client: Client) -> None:
    df = dd.from_pandas(small(low=1.0, high=np.inf).drop(columns="label"), npartitions=2)
    bounds = {"label_lower_bound": "low", "label_upper_bound": "high", "params": {"objective": "survival:aft"}}
    assert train(bridges_client, df, None, **bounds).num_boosted_rounds() == 4
    refused(
        bridges_client, "partition 0 of X: label_upper_bound has 120 missing values",
        df.assign(high=np.nan), None, **bounds,
    )  # fmt: skip


# Categories


def cut_with_categories(*categories: list[str]) -> tuple[list[pd.DataFrame], pd.DataFrame]:
    """Partitions whose column c knows other categories, or in another order; and all rows together."""
    rng = np.random.default_rng(2)
    parts = []
    for part, known in zip(np.array_split(np.arange(N), len(categories)), categories):
        frame = small().loc[part]
        frame["c"] = pd.Categorical(rng.choice(known, len(part)), categories=known)
        frame["label"] = (frame.c.astype("str").isin(["red", "blue"]) ^ (frame.a > 12)).astype("float64")
        parts.append(frame)
    whole = pd.concat([part.astype({"c": "object"}) for part in parts]).astype({"c": "category"})
    return parts, whole


@pytest.mark.parametrize(
    "categories",
    [
        (["red", "blue", "green"], ["green", "blue", "red"], ["blue", "red", "green"]),
        (["red", "blue"], ["green", "blue"], ["white", "black", "red"]),
    ],
    ids=["other order", "other categories"],
)
def test_categories_that_differ_between_partitions_are_made_one(bridges_client: Client, categories: Any) -> None:
    parts, whole = cut_with_categories(*categories)
    booster = train(bridges_client, in_partitions(*parts))
    assert_same(booster, whole)
    X = in_partitions(*parts).drop(columns="label")
    found = dask_xgboost.predict(bridges_client, booster, X).compute()
    np.testing.assert_allclose(
        found, booster.predict(xgb.DMatrix(whole.drop(columns="label"), enable_categorical=True))
    )


def test_columns_may_be_called_by_numbers(bridges_client: Client) -> None:
    parts, whole = cut_with_categories(["red", "blue"], ["blue", "green", "red"])
    names = {"a": 0, "b": 1, "c": 2}
    booster = train(bridges_client, in_partitions(*(part.rename(columns=names) for part in parts)))
    assert_same(booster, whole.rename(columns=names))


def test_categories_unknown_to_dask_are_found(bridges_client: Client) -> None:
    parts, whole = cut_with_categories(["red", "blue"], ["green", "red"], ["blue", "green"])
    df = in_partitions(*(part.astype({"c": "object"}) for part in parts)).astype({"c": "category"})
    assert not df.c.cat.known
    booster = train(bridges_client, df)
    assert_same(booster, whole)
    found = dask_xgboost.predict(bridges_client, booster, df.drop(columns="label")).compute()
    np.testing.assert_allclose(
        found, booster.predict(xgb.DMatrix(whole.drop(columns="label"), enable_categorical=True))
    )


@pytest.mark.parametrize("known", [["red", "blue"], ["white", "blue"]])
def test_an_evaluation_set_may_know_other_categories(bridges_client: Client, known: Any) -> None:
    parts, _ = cut_with_categories(["red", "blue", "green"], ["green", "blue", "red"], known)
    history: dict[str, Any] = {}
    booster = train(
        bridges_client, in_partitions(*parts[:2]), evals=[(in_partitions(parts[2]), "valid")], evals_result=history
    )
    probability = booster.predict(xgb.DMatrix(parts[2].drop(columns="label"), enable_categorical=True))
    right = np.where(parts[2].label == 1, probability, 1 - probability)
    assert history["valid"]["logloss"][-1] == pytest.approx(-np.log(right).mean(), abs=1e-5)


def test_an_unknown_category_in_prediction_is_treated_as_xgboost_does(bridges_client: Client) -> None:
    parts, whole = cut_with_categories(["red", "blue", "green"], ["red", "blue", "green"])
    booster = train(bridges_client, in_partitions(*parts))
    unknown = whole.drop(columns="label").assign(c=pd.Categorical(["violet"] * N))
    with pytest.raises(xgb.core.XGBoostError) as theirs:
        booster.predict(xgb.DMatrix(unknown, enable_categorical=True))
    with pytest.raises(xgb.core.XGBoostError) as ours:
        dask_xgboost.predict(bridges_client, booster, dd.from_pandas(unknown, npartitions=2)).compute()
    assert "category" in str(theirs.value)
    assert str(ours.value).split("]")[1][:60] == str(theirs.value).split("]")[1][:60]


def test_categoricals_are_refused_where_they_are_not_wanted(bridges_client: Client) -> None:
    parts, _ = cut_with_categories(["red"], ["red"])
    refused(bridges_client, r"columns \['c'\] are categorical", in_partitions(*parts), enable_categorical=False)


# Partitions


def test_a_partition_with_other_columns_is_named(bridges_client: Client) -> None:
    df = in_partitions(small(), small().rename(columns={"a": "z"}), meta=small()[:0])
    refused(bridges_client, r"partition 1 of X has columns \['z', 'b'\], not \['a', 'b'\]", df)


@pytest.mark.parametrize("evals", [False, True], ids=["a training set", "with evaluation sets"])
def test_collections_of_one_source_read_it_once(bridges_client: Client, tmp_path: Path, evals: bool) -> None:
    def read(part: int) -> pd.DataFrame:
        with (tmp_path / "reads").open("a") as log:
            log.write("x")
        return small(weight=1.0)[part * 30 : part * 30 + 30]

    df = dd.from_map(read, range(8), meta=small(weight=1.0)[:0])
    sets = (
        [((some[["a", "b"]], some.label), name) for name, some in (("few", df[df.a > 2]), ("all", df))] if evals else []
    )
    booster = train(bridges_client, df[["a", "b"]], df.label, weight=df.weight, evals=sets)
    assert len((tmp_path / "reads").read_text()) == 8
    assert_same(booster, small())


def test_a_matrix_has_its_own_fields(bridges_client: Client) -> None:
    matrix = dask_xgboost.DMatrix(bridges_client, dd.from_pandas(small(), npartitions=2), "label")
    refused(bridges_client, r"X is a DMatrix, which has its own fields: pass \['label'\]", matrix, "label")
