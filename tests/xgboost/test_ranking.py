"""Rankings: query groups come together wherever their rows lie, and the model and its metrics are of whole groups."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from tests.xgboost.losses import DiesOnce

import dask_xgboost
from dask_xgboost import grouping

pytestmark = pytest.mark.cluster

METRICS = ["ndcg", "ndcg@3", "map@5", "pre@2", "auc"]
few_layouts = settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def params_of(objective: str = "rank:ndcg", **others: Any) -> dict[str, Any]:
    return {"objective": objective, "max_depth": 3, "eta": 0.5, "eval_metric": METRICS, **others}


def queries(rows: int = 420, seed: int = 5) -> pd.DataFrame:
    """Rows of queries of very different sizes, in any order; relevance 0 or 1."""
    rng = np.random.default_rng(seed)
    X = rng.integers(0, 30, (rows, 4)).astype("float32")
    relevant = (X[:, 0] + rng.normal(0, 6, rows) > 16).astype("float32")
    qid = np.minimum(rng.geometric(0.06, rows), 40) * 1_000_003
    return pd.DataFrame(X, columns=list("abcd")).assign(label=relevant, qid=qid, margin=X[:, 3] / 50)


def alone(frame: pd.DataFrame, params: Any, rounds: int = 4, **fields: Any) -> tuple[xgb.Booster, Any]:
    """The oracle: one process, the rows of each group in the order in which they come."""
    ordered = frame.sort_values("qid", kind="stable")
    matrix = xgb.QuantileDMatrix(
        ordered[list("abcd")], ordered.label, qid=ordered.qid, base_margin=ordered.margin, enable_categorical=True,
        **fields,
    )  # fmt: skip
    history: dict[str, Any] = {}
    booster = xgb.train(params, matrix, rounds, evals=[(matrix, "e")], evals_result=history, verbose_eval=False)
    return booster, history["e"]


def cut(frame: pd.DataFrame, edges: Sequence[int]) -> list[pd.DataFrame]:
    return [frame[start:stop] for start, stop in zip([0, *edges], [*edges, len(frame)])]


def in_partitions(*frames: pd.DataFrame) -> Any:
    return dd.from_map(lambda frame: frame, list(frames), meta=frames[0][:0], enforce_metadata=False)


def train(client: Client, df: Any, params: Any, **keywords: Any) -> tuple[xgb.Booster, Any]:
    history: dict[str, Any] = {}
    booster = dask_xgboost.train(
        client, params, df, "label", qid="qid", base_margin="margin", num_boost_round=4, evals=[(df, "e")],
        evals_result=history, **keywords,
    )  # fmt: skip
    return booster, history["e"]


def assert_same(ours: tuple[xgb.Booster, Any], theirs: tuple[xgb.Booster, Any], frame: pd.DataFrame) -> None:
    X = xgb.DMatrix(frame[list("abcd")], enable_categorical=True)
    np.testing.assert_allclose(ours[0].predict(X), theirs[0].predict(X), atol=1e-5)
    assert list(ours[1]) == list(theirs[1])
    for name, values in theirs[1].items():
        np.testing.assert_allclose(ours[1][name], values, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    "objective", ["rank:ndcg", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rank:pairwise", "rank:map"))]
)
def test_a_ranking_is_that_of_one_machine_however_groups_are_cut(bridges_client: Client, objective: str) -> None:
    frame, params = queries(), params_of(objective)
    oracle = alone(frame, params)

    @few_layouts
    @given(st.lists(st.integers(0, len(frame)), min_size=1, max_size=6).map(sorted))
    def check(edges: list[int]) -> None:
        assert_same(train(bridges_client, in_partitions(*cut(frame, edges)), params), oracle, frame)

    check()


@pytest.mark.parametrize(
    "kind",
    [
        "in order",
        "arrays",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("few pieces", "sparse", "one partition a group")),
    ],
)
def test_groups_come_together_of(bridges_client: Client, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frame, params = queries(), params_of()
    if kind == "in order":
        frame = frame.sort_values("qid", kind="stable")
    if kind == "few pieces":
        monkeypatch.setattr(grouping, "MOST_PIECES", 12)
    oracle = alone(frame, params)
    if kind in ("sparse", "arrays"):
        dense = frame[list("abcd")].to_numpy()
        X, label, margin = (
            da.from_array(values, chunks=(60, *values.shape[1:]))
            for values in (dense, frame.label.to_numpy(), frame.margin.to_numpy())
        )
        qid = da.from_array(frame.qid.to_numpy()[:, None], chunks=(60, 1))
        if kind == "sparse":
            dense = scipy.sparse.csr_matrix(dense)
            X = X.map_blocks(scipy.sparse.csr_matrix)
        booster = dask_xgboost.train(
            bridges_client, params, X, label, qid=qid, base_margin=margin, num_boost_round=4
        )  # fmt: skip
        if kind == "arrays":
            np.testing.assert_allclose(
                booster.predict(xgb.DMatrix(dense)), oracle[0].predict(xgb.DMatrix(frame[list("abcd")])), atol=1e-5
            )  # fmt: skip
        assert booster.num_boosted_rounds() == 4
        return
    parts = (
        [part for _, part in frame.groupby("qid")]
        if kind == "one partition a group"
        else cut(frame, range(60, 420, 60))
    )
    if kind == "one partition a group":
        oracle = alone(pd.concat(parts), params)
    assert_same(train(bridges_client, in_partitions(*parts), params), oracle, frame)


def test_categories_that_differ_between_partitions_come_together(bridges_client: Client) -> None:
    frame, params = queries(), params_of()
    colours = np.array(["red", "green", "blue", "black", "white"])[frame.b.astype(int) // 6]
    whole = frame.assign(b=pd.Categorical(colours, categories=sorted(set(colours))))
    parts = [part.assign(b=pd.Categorical(part.b.astype(str))) for part in cut(whole, [30, 60, 61, 300])]
    assert len({tuple(part.b.cat.categories) for part in parts}) > 1
    assert_same(train(bridges_client, in_partitions(*parts), params), alone(whole, params), whole)


def test_only_rows_of_cut_groups_travel(bridges_client: Client) -> None:
    frame = queries().sort_values("qid", kind="stable")
    parts = cut(frame, range(60, 420, 60))
    matrix = dask_xgboost.DMatrix(bridges_client, in_partitions(*parts), "label", qid="qid")
    rows = [len(part) for part in parts]
    groups = [set(part.qid) for part in parts]
    shared = [sum(part.qid.isin(set().union(*(g for g in groups if g is not own)))) for part, own in zip(parts, groups)]
    assert matrix.rows == len(frame)
    assert matrix.parts.rows != rows
    for now, before, common in zip(matrix.parts.rows, rows, shared):
        assert now >= before - common
    held = [set(info.groups) for info in matrix.infos]
    assert sum(map(len, held)) == len(set().union(*held)) == frame.qid.nunique()


def test_the_weight_of_a_group_is_that_of_its_first_row_wherever_it_lies(bridges_client: Client) -> None:
    frame = queries()
    frame["weight"] = np.where(frame.groupby("qid").cumcount() == 0, frame.qid % 7 + 1, 99.0)
    firsts = frame.sort_values("qid", kind="stable").groupby("qid").weight.first()
    one = sorted(bridges_client.scheduler_info(n_workers=-1)["workers"])[:1]
    df = in_partitions(*cut(frame, range(60, 420, 60)))
    ours = train(bridges_client, df, params_of(), weight="weight", workers=one)
    assert_same(ours, alone(frame, params_of(), weight=firsts), frame)


@pytest.mark.parametrize("weighted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_metrics_of_weighted_groups_are_those_of_one_process(bridges_client: Client, weighted: bool) -> None:
    """On skewed shards: a worker with one large group, and others with many small ones. The trees are constant."""
    frame = queries().sort_values("qid", kind="stable")
    frame["margin"] = frame.a / 30 + frame.b / 90
    params, edges = params_of(eta=0.0), [20, 40, 400]
    if not weighted:
        ours = train(bridges_client, in_partitions(*cut(frame, edges)), params)
        assert_same(ours, alone(frame, params), frame)
        return
    frame["weight"] = frame.qid % 7 + 1.0
    with pytest.warns(UserWarning, match=r"with weights on \d workers"):
        ours = train(bridges_client, in_partitions(*cut(frame, edges)), params, weight="weight")
    assert_same(ours, alone(frame, params, weight=frame.groupby("qid").weight.first()), frame)


@pytest.mark.slow
def test_groups_come_together_again_after_a_loss(doomed: Client, tmp_path: Path) -> None:
    frame, params = queries(), params_of()
    df = in_partitions(*cut(frame, range(60, 420, 60)))
    ours = train(doomed, df, params, callbacks=[DiesOnce(tmp_path / "died")], checkpoint_every=2)
    assert (tmp_path / "died").exists()
    assert_same(ours, alone(frame, params), frame)


def test_a_ranker_takes_groups_in_any_order(bridges_client: Client) -> None:
    frame = queries()
    df = dd.from_pandas(frame.drop(columns=["label", "margin"]), npartitions=5)
    y = dd.from_pandas(frame.label, npartitions=5)
    model = dask_xgboost.XGBRanker(n_estimators=4, max_depth=3).fit(df, y)
    ordered = frame.sort_values("qid", kind="stable")
    oracle = xgb.XGBRanker(n_estimators=4, max_depth=3).fit(ordered[list("abcd")], ordered.label, qid=ordered.qid)
    np.testing.assert_allclose(model.predict(df).compute(), oracle.predict(frame[list("abcd")]), atol=1e-5)
