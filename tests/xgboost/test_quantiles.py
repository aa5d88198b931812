"""Cut points at the quantiles of all rows: exact where they can be, near where not, and the same wherever rows lie."""

from types import SimpleNamespace
from typing import Any

import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import xgboost as xgb
from distributed import Client
from hypothesis import given, settings
from hypothesis import strategies as st

import dask_xgboost
from dask_xgboost import cuts
from dask_xgboost.datasets import Datasets
from dask_xgboost.quantiles import Collected, compress, quantiles, summarise

MAX_BIN = 64
ROWS = 20_000


def hard(rows: int = ROWS) -> dict[str, Any]:
    rng = np.random.default_rng(7)
    normal = rng.normal(size=rows)
    return {
        "normal": normal,
        "constant": np.full(rows, 3.5),
        "two values": rng.integers(0, 2, rows),
        "nine of ten alike": np.where(rng.random(rows) < 0.9, 0, normal),
        "few values": rng.integers(0, MAX_BIN, rows),
        "somewhat more": rng.integers(0, 3 * MAX_BIN, rows),
        "outliers": np.where(rng.random(rows) < 0.001, 1e6, 1) * normal,
        "powers": rng.zipf(1.3, rows).astype("float64"),
        "above 2**24": rng.integers(2**24, 2**33, rows),
        "infinities": np.select([rng.random(rows) < 0.1, rng.random(rows) < 0.1], [np.inf, -np.inf], normal),
        "half missing": np.where(rng.random(rows) < 0.5, np.nan, normal),
        "all missing": np.full(rows, np.nan),
        "sorted": np.sort(normal),
    }


def edges_of(X: Any, blocks: Any, weight: Any = None, **options: Any) -> dict[int, Any]:
    """The edges found from blocks of rows, given as slices."""
    found = [
        summarise(X[rows], points=4 * MAX_BIN, weight=None if weight is None else weight[rows], **options)
        for rows in blocks
    ]
    return quantiles(np.concatenate(found), MAX_BIN)


def worst(values: Any, edges: Any, weight: Any) -> float:
    """The greatest distance of a rank that is wanted from that of the edge nearest to it, as a part of all."""
    values = np.asarray(values, dtype="float32")
    there = np.isfinite(values)
    order = np.argsort(values[there])
    ordered, upto = values[there][order], np.concatenate([[0], np.cumsum(weight[there][order])])
    low, high = (upto[np.searchsorted(ordered, edges, side)] for side in ("left", "right"))
    wanted = np.arange(MAX_BIN)[:, None] * upto[-1] / MAX_BIN
    return float(np.maximum(np.maximum(low - wanted, wanted - high), 0).min(axis=1).max() / upto[-1])


def slices(*bounds: int) -> list[slice]:
    return [slice(start, stop) for start, stop in zip((0, *bounds), (*bounds, ROWS))]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("blocks", [slices(), slices(5000, 10_000, 15_000), slices(1, 30, 12_000)])
@pytest.mark.parametrize("kind", hard())
def test_ranks_of_edges_are_near_the_exact_ones(kind: str, blocks: Any, weighted: bool) -> None:
    values = hard()[kind]
    weight = np.random.default_rng(1).exponential(size=ROWS) ** 3 if weighted else None
    edges = edges_of(values.reshape(-1, 1), blocks, weight)
    seen = np.unique(np.float32(values)[np.isfinite(np.float32(values))])
    if not len(seen):
        assert edges == {}
    elif len(seen) <= MAX_BIN:
        np.testing.assert_array_equal(edges[0], seen)
    else:
        assert len(edges[0]) <= MAX_BIN
        assert edges[0][0] == seen[0]
        assert np.isin(edges[0], seen).all()
        assert (np.diff(edges[0]) > 0).all()
        assert worst(values, edges[0], np.ones(ROWS) if weight is None else weight) <= 1 / (4 * MAX_BIN)


@pytest.mark.parametrize("kind", [*hard(2), "huge", "tiny"])
def test_ranks_are_near_where_values_of_large_blocks_are_counted(kind: str) -> None:
    values = {**hard(200_000), "huge": np.float32([-3e38, 3e38]).repeat(100_000), "tiny": np.arange(200_000) * 1e-44}[
        kind
    ]
    found = [summarise(block.reshape(-1, 1), points=4 * MAX_BIN) for block in np.array_split(values, 2)]
    edges = quantiles(np.concatenate(found), MAX_BIN)
    seen = np.unique(np.float32(values)[np.isfinite(np.float32(values))])
    if len(seen) <= MAX_BIN:
        np.testing.assert_array_equal(edges.get(0, seen[:0]), seen)
    else:
        assert edges[0][0] == seen[0]
        assert (np.diff(edges[0]) > 0).all()
        assert worst(values, edges[0], np.ones(len(values))) <= 1 / (4 * MAX_BIN)


def test_summaries_of_many_blocks_are_brought_down_to_one_at_little_loss() -> None:
    values = hard()["outliers"].reshape(-1, 1)
    found = [summarise(block, points=4 * MAX_BIN) for block in np.array_split(values, 40)]
    less = compress(np.concatenate(found), 4 * MAX_BIN)
    assert len(less) <= 4 * MAX_BIN + 1 < sum(map(len, found)) / 10
    assert worst(values[:, 0], quantiles(less, MAX_BIN)[0], np.ones(ROWS)) <= 2 / (4 * MAX_BIN)


def test_summaries_of_very_many_blocks_take_little_memory_at_little_loss() -> None:
    points, rng = 6 * MAX_BIN, np.random.default_rng(0)
    values = rng.permutation(np.arange(400 * 1000, dtype="float64"))
    found, most, one = Collected(points, limit=1), 0, 0
    for block in values.reshape(400, 1000, 1):
        found.add(summary := summarise(block, points=points))
        one = max(one, summary.nbytes)
        most = max(most, sum(each.nbytes for each in found.each()))
    assert most <= 45 * one  # 11 of blocks; then 3, 3 and 2 that are four times as large
    loss = worst(values, quantiles(np.concatenate(found.each()), MAX_BIN)[0], np.ones(len(values)))
    assert loss <= 1 / (2 * points) + 3 / (8 * points)


@settings(deadline=None, max_examples=25)
@given(bounds=st.lists(st.integers(0, ROWS), max_size=6), seed=st.integers(0, 99))
def test_edges_do_not_depend_on_the_order_of_blocks(bounds: list[int], seed: int) -> None:
    X = np.stack([np.asarray(values, dtype="float64") for values in hard().values()], axis=1)
    blocks = slices(*sorted(bounds))
    shuffled = list(np.random.default_rng(seed).permutation(np.array(blocks, dtype=object)))
    ours, theirs = edges_of(X, blocks), edges_of(X, shuffled)
    for column in ours:
        np.testing.assert_array_equal(ours[column], theirs[column])


def test_the_form_of_a_block_makes_no_difference() -> None:
    rng = np.random.default_rng(3)
    dense = np.where(rng.random((3000, 11)) < 0.8, np.nan, rng.normal(size=(3000, 11))).astype("float32")
    weight = rng.random(3000)
    there = ~np.isnan(dense)
    sparse = sp.csr_matrix((dense[there], np.nonzero(there)), shape=dense.shape)
    frame = pd.DataFrame(dense).astype({4: "Float32"})
    absent = np.where(there, dense, -1e9)
    for given_weight in (None, weight):
        expected = summarise(dense, points=200, weight=given_weight)
        for other, options in ((sparse, {}), (frame, {}), (absent, {"missing": -1e9}), (dense, {"nthread": 3})):
            found = summarise(other, points=200, weight=given_weight, **options)
            np.testing.assert_array_equal(found, expected)


def test_xgboost_takes_the_edges_as_they_are() -> None:
    columns = {name: values for name, values in hard().items() if name != "infinities"}
    X = np.stack([np.asarray(values, dtype="float64") for values in columns.values()], axis=1)
    edges = edges_of(X, slices(9000))
    matrix = cuts.reference_of(edges, X.shape[1], MAX_BIN, None)
    binned = xgb.QuantileDMatrix(X, ref=matrix, max_bin=MAX_BIN)
    pointers, values = binned.get_quantile_cut()
    for number in range(X.shape[1]):
        between = values[pointers[number] : pointers[number + 1]][1:-1]
        np.testing.assert_array_equal(between, edges.get(number, np.empty(0, "float32"))[1:])


@pytest.mark.parametrize(
    ("given", "rows", "sparse", "gpus", "wanted"),
    [
        ("auto", 99_999, False, False, False),
        ("auto", 100_000, False, False, True),
        ("auto", 100_000, False, True, False),
        ("auto", 100_000, True, False, False),
        ("quantiles", 10, True, True, True),
        ("sketch", 100_000, False, False, False),
    ],
)
def test_few_rows_and_sparse_ones_are_cut_by_xgboosts_sketch_unless_told_otherwise(
    given: str, rows: int, sparse: bool, gpus: bool, wanted: bool
) -> None:
    matrix: Any = SimpleNamespace(rows=rows, sparse=sparse)
    assert Datasets(matrix, [], 256, given, gpus).by_quantiles() is wanted


# On a cluster

PARAMS = {"objective": "binary:logistic", "max_depth": 4, "eta": 0.5, "max_bin": 32}


def frame(rows: int = 4000) -> Any:
    rng = np.random.default_rng(11)
    data = pd.DataFrame(rng.normal(size=(rows, 4)), columns=list("abcd"))
    data["colour"] = pd.Categorical.from_codes(rng.integers(0, 5, rows), ["red", "green", "blue", "black", "white"])
    data.loc[rng.random(rows) < 0.1, "c"] = np.nan
    data["label"] = (data.a * data.b + (data.colour == "red") + rng.normal(size=rows) > 0).astype("float32")
    return data


def trees(booster: xgb.Booster) -> Any:
    return booster.trees_to_dataframe().drop(columns=["Gain", "Cover"])


@pytest.mark.cluster
def test_the_model_is_that_of_one_machine_with_the_same_cuts(bridges_client: Client) -> None:
    data = frame()
    found: dict[str, Any] = {}
    collection = dd.from_pandas(data, npartitions=5, sort=False)
    booster = dask_xgboost.train(
        bridges_client, PARAMS | {"eval_metric": "logloss"}, collection, "label", num_boost_round=8,
        evals=[(collection, "train")], evals_result=found, cuts="quantiles", progress=False,
    )  # fmt: skip
    X, y = data.drop(columns="label"), data.label
    blocks = [collection.get_partition(number).compute().drop(columns="label") for number in range(5)]
    summaries = [summarise(block, points=6 * PARAMS["max_bin"]) for block in blocks]  # type: ignore[operator]
    edges = quantiles(np.concatenate(summaries), 32, coded={4})
    reference = cuts.reference_of(edges, 5, 32, ["float"] * 4 + ["c"])
    alone = xgb.train(PARAMS, xgb.QuantileDMatrix(X, y, ref=reference, max_bin=32, enable_categorical=True), 8)
    ours, theirs = (each.predict(xgb.DMatrix(X, enable_categorical=True)) for each in (booster, alone))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    loss = -np.mean(np.where(y == 1, np.log(ours), np.log(1 - ours)))
    np.testing.assert_allclose(found["train"]["logloss"][-1], loss, rtol=1e-5)


@pytest.mark.cluster
def test_any_placement_of_the_same_partitions_gives_the_same_model(bridges_client: Client) -> None:
    workers = list(bridges_client.scheduler_info()["workers"])
    data = frame().drop(columns="colour")
    models = []
    for layout in ([0, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]):
        parts = np.array_split(np.arange(len(data)), 4)
        held = [
            bridges_client.scatter(data.iloc[rows], workers=[workers[worker]], hash=False)
            for rows, worker in zip(parts, layout)
        ]
        collection = dd.from_delayed(held, meta=data.iloc[:0])
        models.append(
            dask_xgboost.train(
                bridges_client,
                PARAMS,
                collection,
                "label",
                num_boost_round=8,
                cuts="quantiles",
                progress=False,
                workers=[workers[worker] for worker in sorted(set(layout))],
            )
        )
    for other in models[1:]:
        pd.testing.assert_frame_equal(trees(other), trees(models[0]), rtol=1e-4, atol=1e-6)


@pytest.mark.cluster
def test_weights_of_groups_and_sparse_rows_are_cut_at_their_quantiles(bridges_client: Client) -> None:
    rng = np.random.default_rng(5)
    qid, y = np.repeat(np.arange(80), 10), rng.integers(0, 4, 800)
    X = np.where(rng.random((800, 3)) < 0.3, np.nan, rng.normal(size=(800, 3)) + y[:, None])
    whole = [da.from_array(each, chunks=(200, 3) if each.ndim == 2 else 200) for each in (X, y, qid)]
    booster = dask_xgboost.train(
        bridges_client, {"objective": "rank:ndcg", "max_bin": 16}, whole[0], whole[1], qid=whole[2],
        weight=da.from_array(np.repeat(rng.random(80), 10), chunks=200), num_boost_round=5, cuts="quantiles",
    )  # fmt: skip
    assert booster.num_boosted_rounds() == 5
    sparse = da.from_array(np.nan_to_num(X), chunks=(200, 3)).map_blocks(sp.csr_matrix)
    assert [dask_xgboost.DMatrix(bridges_client, each, whole[1]).sparse for each in (whole[0], sparse)] == [False, True]
    booster = dask_xgboost.train(bridges_client, {"max_bin": 16}, sparse, whole[1], num_boost_round=5, cuts="quantiles")
    alone = xgb.train({"max_bin": 16}, xgb.QuantileDMatrix(sp.csr_matrix(np.nan_to_num(X)), y, max_bin=16), 5)
    rows = xgb.DMatrix(sp.csr_matrix(np.nan_to_num(X)))
    assert np.corrcoef(booster.predict(rows), alone.predict(rows))[0, 1] > 0.95


@pytest.mark.cluster
def test_another_way_to_find_cuts_is_refused(bridges_client: Client) -> None:
    with pytest.raises(ValueError, match="cuts='exact': give 'auto', 'quantiles' or 'sketch'"):
        dask_xgboost.train(bridges_client, {}, da.ones((4, 2)), da.ones(4), cuts="exact")
