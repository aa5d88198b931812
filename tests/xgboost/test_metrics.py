"""Metrics are those of all rows, however skewed the shards."""

import threading
from collections.abc import Callable
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pytest
import xgboost as xgb
from distributed import Client
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from xgboost import collective

import dask_xgboost
from dask_bridges import MemberFailed
from dask_xgboost import metrics

cluster = pytest.mark.cluster
PARAMS = {"objective": "binary:logistic", "max_depth": 2, "eta": 0.3}
ROWS = 600


def skewed(classes: int = 2) -> tuple[Any, Any, Any]:
    """Rows sorted by label, so that shards differ as much as they can; ties among the scores."""
    rng = np.random.default_rng(1)
    y = np.sort(rng.choice(classes, ROWS, p=[0.8, 0.2] if classes == 2 else None)).astype("float32")
    X = np.round(rng.normal(size=(ROWS, 4)) * 3 + y[:, None]).astype("float32")
    return X, y, rng.uniform(0.1, 3, ROWS).astype("float32")


def histories(
    client: Client, params: Any, X: Any, y: Any, chunks: Any = 100, *, held_out: bool = False, **keywords: Any
) -> tuple[Any, Any]:
    """evals_result of a distributed training and of one in a single process."""
    fields = {name: keywords.pop(name) for name in ("weight",) if name in keywords}
    lazy = {name: da.from_array(values, chunks=chunks) for name, values in fields.items()}
    dX, dy = da.from_array(X, chunks=(chunks, X.shape[1])), da.from_array(y, chunks=chunks)
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    what = (dX[-2:], dy[-2:]) if held_out else dX
    with dask.config.set({"dask-bridges.balance-tolerance": 1e9}):
        dask_xgboost.train(
            client, params, dX, dy, **lazy, num_boost_round=5, evals=[(what, "e")], evals_result=ours, **keywords
        )
    matrix = xgb.QuantileDMatrix(X, y, **fields)
    valid = xgb.QuantileDMatrix(X[-2:], y[-2:], ref=matrix) if held_out else matrix
    xgb.train(params, matrix, 5, evals=[(valid, "e")], evals_result=theirs, verbose_eval=False, **keywords)
    return ours["e"], theirs["e"]


def assert_equal(ours: Any, theirs: Any) -> None:
    assert list(ours) == list(theirs)
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name], values, atol=2e-5, err_msg=name)


# Values over all rows


@cluster
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("metric", ["auc", "aucpr", "logloss", "error@0.3", "rmse"])
def test_metrics_on_skewed_shards_are_those_of_one_process(bridges_client: Client, metric: str, weighted: bool) -> None:
    X, y, weight = skewed()
    fields = {"weight": weight} if weighted else {}
    assert_equal(*histories(bridges_client, {**PARAMS, "eval_metric": metric}, X, y, (30, 470, 100), **fields))


@cluster
def test_areas_have_all_their_digits(bridges_client: Client) -> None:
    X, y, _ = skewed()
    dX, history = da.from_array(X, chunks=(100, 4)), {}
    booster = dask_xgboost.train(
        bridges_client, {**PARAMS, "eval_metric": "auc"}, dX, da.from_array(y, chunks=100), num_boost_round=3,
        evals=[(dX, "e")], evals_result=history,
    )  # fmt: skip
    assert history["e"]["auc"][-1] == pytest.approx(roc_auc_score(y, booster.predict(xgb.DMatrix(X))), abs=1e-12)


@cluster
@pytest.mark.parametrize("objective", ["multi:softprob", "multi:softmax"])
def test_areas_of_several_classes_are_those_of_one_process(bridges_client: Client, objective: str) -> None:
    X, y, weight = skewed(3)
    params = {"objective": objective, "num_class": 3, "max_depth": 2, "eval_metric": ["mlogloss", "auc", "aucpr"]}
    assert_equal(*histories(bridges_client, params, X, y, (30, 470, 100), weight=weight))


@cluster
@pytest.mark.filterwarnings("ignore:.*only positive or negative samples")
@pytest.mark.parametrize(
    ("objective", "classes"), [("binary:logistic", 2), ("multi:softprob", 3), ("multi:softmax", 3)]
)
def test_a_rank_without_rows_to_evaluate_takes_part(bridges_client: Client, objective: str, classes: int) -> None:
    X, y, _ = skewed(classes)
    y[-2:] = [classes - 1, 0]
    multi = {"num_class": classes} if classes > 2 else {}
    params = {"objective": objective, "max_depth": 2, "eval_metric": ["auc", "aucpr"], **multi}
    assert_equal(*histories(bridges_client, params, X, y, held_out=True))


@cluster
@pytest.mark.parametrize(
    "wanted", [["auc", "logloss"], ["logloss", "auc"], ["error@0.3", "aucpr", "auc"], ["aucpr", "error@0.5"], []]
)
def test_early_stopping_looks_at_the_last_metric_asked_for(bridges_client: Client, wanted: list[str]) -> None:
    X, y, _ = skewed()
    params = {**PARAMS, "eval_metric": wanted, "eta": 3}
    ours, theirs = histories(bridges_client, params, X, y, (30, 470, 100), early_stopping_rounds=2)
    assert_equal(ours, theirs)


@cluster
def test_the_booster_goes_on_with_the_metrics_asked_for(bridges_client: Client) -> None:
    X, y, _ = skewed()
    booster = dask_xgboost.train(
        bridges_client, {**PARAMS, "eval_metric": ["auc", "error"]}, da.from_array(X, chunks=(100, 4)),
        da.from_array(y, chunks=100),
    )  # fmt: skip
    assert sorted(part.partition(":")[0] for part in booster.eval(xgb.DMatrix(X, y)).split()[1:]) == [
        "eval-auc", "eval-error",
    ]  # fmt: skip


# The user's own metric


@cluster
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_a_metric_of_the_user_is_averaged_by_rows_or_weight(
    bridges_client: Client, weighted: bool, several: bool
) -> None:
    def metric(predictions: Any, matrix: xgb.DMatrix) -> Any:
        weight = matrix.get_weight()
        error = np.abs(predictions - matrix.get_label())
        value = float(np.average(error, weights=weight if weight.size else None))
        return [("mean", value), ("twice", 2 * value)] if several else ("mean", value)

    X, y, weight = skewed()
    fields = {"weight": weight} if weighted else {}
    params = {**PARAMS, "eval_metric": ["auc"]}
    ours, theirs = histories(bridges_client, params, X, y, (570, 30), custom_metric=metric, **fields)
    assert_equal(ours, theirs)
    assert list(ours) == ["auc", "mean", "twice"][: 3 if several else 2]


@cluster
def test_a_metric_of_the_user_is_not_asked_where_there_are_no_rows(bridges_client: Client) -> None:
    def metric(predictions: Any, matrix: xgb.DMatrix) -> tuple[str, float]:
        return "least", float(matrix.num_row() / matrix.num_row())

    X, y, _ = skewed()
    ours, _ = histories(bridges_client, PARAMS, X, y, held_out=True, custom_metric=metric)
    assert ours["least"] == [1.0] * 5


# Custom metrics of all rows


def precision(predictions: Any, matrix: xgb.DMatrix) -> tuple[str, Any]:
    """A quotient of sums, which no average of quotients gives; on one machine XGBoost wants the value."""
    found = predictions > 0.15
    right = float((matrix.get_label() * found).sum())
    return "precision", (right, float(found.sum()))


def median_error(predictions: Any, rows: Any) -> tuple[str, float]:
    if predictions.ndim == 2:
        predictions = predictions @ np.arange(predictions.shape[1])
    error = np.abs(predictions - rows.get_label())
    weight = rows.get_weight() if rows.get_weight().size else np.ones(rows.num_row())
    order = np.argsort(error, kind="stable")
    half = np.searchsorted(np.cumsum(weight[order]), weight.sum() / 2)
    return "median", float(error[order][half])


def oracle_of(metric: Any) -> Any:
    return metrics.on_one_machine(metric)


@cluster
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("metric", [precision, median_error])
def test_a_metric_of_all_rows_is_that_of_one_process(bridges_client: Client, metric: Any, workers: int) -> None:
    X, y, weight = skewed()
    chosen = sorted(bridges_client.scheduler_info(n_workers=-1)["workers"])[:workers]
    ours: dict[str, Any] = {}
    dX, dy, dw = (da.from_array(values, chunks=(30, *values.shape[1:])) for values in (X, y, weight))
    given = dask_xgboost.gathered(metric) if metric is median_error else metric
    booster = dask_xgboost.train(
        bridges_client, PARAMS, dX, dy, weight=dw, num_boost_round=30, evals=[(dX, "e")], evals_result=ours,
        custom_metric=given, early_stopping_rounds=2, maximize=metric is precision, workers=chosen,
    )  # fmt: skip
    theirs: dict[str, Any] = {}
    matrix = xgb.QuantileDMatrix(X, y, weight=weight)
    oracle = xgb.train(
        PARAMS, matrix, 30, evals=[(matrix, "e")], evals_result=theirs, verbose_eval=False,
        custom_metric=oracle_of(metric), early_stopping_rounds=2, maximize=metric is precision,
    )  # fmt: skip
    assert_equal(ours["e"], theirs["e"])
    assert len(ours["e"]["logloss"]) == oracle.best_iteration + 3 == booster.best_iteration + 3 < 30


@cluster
def test_a_gathered_metric_sees_classes_margins_and_rows_of_one_worker_alone(bridges_client: Client) -> None:
    X, y, _ = skewed(3)
    params = {"objective": "multi:softprob", "num_class": 3, "max_depth": 2, "eval_metric": ["mlogloss", "auc"]}
    ours, theirs = histories(
        bridges_client, params, X, y, held_out=True, custom_metric=dask_xgboost.gathered(median_error)
    )  # fmt: skip
    np.testing.assert_allclose(ours["median"], theirs["median"], atol=1e-5)


@cluster
def test_a_gathered_metric_sees_whole_query_groups(bridges_client: Client, rows: Any) -> None:
    @dask_xgboost.gathered
    def sizes(predictions: Any, seen: Any) -> list[tuple[str, float]]:
        assert seen.get_group().sum() == seen.num_row() == len(predictions) == seen.get_uint_info("group_ptr")[-1]
        return [("groups", float(len(seen.get_group()))), ("weight", float(seen.get_weight().sum()))]

    frame = rows.frame("rank:ndcg").assign(weight=np.where(rows.qid % 2, 0.5, 1.5))
    df = dd.from_pandas(frame, npartitions=6)
    history: dict[str, Any] = {}
    with pytest.warns(UserWarning, match="with weights on 3 workers"):
        dask_xgboost.train(
            bridges_client, {"objective": "rank:ndcg"}, df, "label", qid="qid", weight="weight", num_boost_round=1,
            evals=[(df, "e")], evals_result=history, custom_metric=sizes,
        )  # fmt: skip
    assert (history["e"]["groups"], history["e"]["weight"]) == ([30.0], [30.0])


def share(y_true: Any, y_pred: Any) -> tuple[float, float]:
    return float((y_true * y_pred).sum()), float(y_pred.sum())


@dask_xgboost.gathered
def median(y_true: Any, y_pred: Any) -> float:
    return float(np.median(np.abs(y_true - y_pred)))


def own(metric: Any) -> Any:
    """What XGBoost's own estimators are given for it."""
    if isinstance(metric, list):
        return [own(one) for one in metric]
    if metric is not share:
        return metric

    def value(y_true: Any, y_pred: Any) -> float:
        return float(np.divide(*share(y_true, y_pred)))

    value.__name__ = "share"
    return value


METRICS = [share, median, ["logloss", median]]


@cluster
@pytest.mark.parametrize("metric", METRICS)
def test_metrics_of_estimators_are_of_all_rows(bridges_client: Client, metric: Any) -> None:
    X, y, _ = skewed()
    lazy = da.from_array(X, chunks=(90, 4)), da.from_array(y, chunks=90)
    model = dask_xgboost.XGBClassifier(n_estimators=4, max_depth=2, eval_metric=metric)
    oracle = xgb.XGBClassifier(n_estimators=4, max_depth=2, eval_metric=own(metric))
    model.fit(*lazy, eval_set=[lazy], verbose=False)
    oracle.fit(X, y, eval_set=[(X, y)], verbose=False)
    assert_equal(model.evals_result()["validation_0"], oracle.evals_result()["validation_0"])
    assert model.get_params()["eval_metric"] is metric


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_of_all_rows_are_no_other_without_a_cluster(metric: Any) -> None:
    X, y, _ = skewed()
    models = [
        make(n_estimators=4, max_depth=2, eval_metric=given).fit(X, y, eval_set=[(X, y)], verbose=False)
        for make, given in ((dask_xgboost.XGBClassifier, metric), (xgb.XGBClassifier, own(metric)))
    ]
    assert_equal(*(model.evals_result()["validation_0"] for model in models))


@cluster
def test_what_is_no_value_of_a_metric_is_named(bridges_client: Client) -> None:
    X, y, _ = skewed()
    with pytest.raises(MemberFailed, match="each value is a number, or a pair of numerator and denominator"):
        histories(bridges_client, PARAMS, X, y, custom_metric=lambda p, m: ("three", (1.0, 2.0, 3.0)))


# The areas themselves


def on_ranks(shards: list[tuple[Any, ...]], function: Callable[..., Any]) -> list[Any]:
    """`function` of each shard, on as many ranks: threads, since a communicator belongs to one."""
    if len(shards) == 1:
        return [function(*shards[0])]
    tracker = xgb.tracker.RabitTracker(n_workers=len(shards), host_ip="127.0.0.1", sortby="task")
    tracker.start()
    found: list[Any] = [None] * len(shards)

    def run(rank: int) -> None:
        with collective.CommunicatorContext(**tracker.worker_args(), dmlc_task_id=f"{rank}"):
            found[rank] = function(*shards[rank])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(shards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def merged_area(name: str, shards: list[tuple[Any, Any, Any]]) -> float:
    function = {"auc": metrics.roc_auc, "aucpr": metrics.pr_auc}[name]
    values = on_ranks(shards, lambda *shard: function(*metrics._merged(*shard)))
    assert len({repr(value) for value in values}) == 1
    return values[0]


def of_xgboost(name: str, scores: Any, labels: Any, weight: Any) -> float:
    """XGBoost's own value in one process, where it prints five decimals: a model of base margins alone."""
    matrix = xgb.DMatrix(np.zeros((len(labels), 1)), labels, weight=weight, base_margin=scores)
    history: dict[str, Any] = {}
    params = {"objective": "binary:logitraw", "eval_metric": name, "max_depth": 1, "eta": 0.0}
    xgb.train(params, matrix, 1, evals=[(matrix, "e")], evals_result=history, verbose_eval=False)
    return history["e"][name][0]


samples = st.lists(
    st.tuples(st.integers(-6, 6), st.booleans(), st.sampled_from([1.0, 0.25, 3.0])), min_size=2, max_size=60
).filter(lambda rows: len({label for _, label, _ in rows}) == 2)


@pytest.mark.parametrize("name", ["auc", "aucpr"])
@settings(max_examples=25, deadline=None)
@given(rows=samples)
def test_an_area_is_that_of_one_process(name: str, rows: Any) -> None:
    scores, labels, weight = (np.array(values, dtype="float32") for values in zip(*rows))
    value = merged_area(name, [(scores, labels, weight)])
    assert value == pytest.approx(of_xgboost(name, scores, labels, weight), abs=1e-5)
    if name == "auc":
        assert value == pytest.approx(roc_auc_score(labels, scores, sample_weight=weight), abs=1e-9)


@pytest.mark.parametrize("name", ["auc", "aucpr"])
@settings(max_examples=6, deadline=None)
@given(rows=samples, cuts=st.lists(st.integers(0, 60), min_size=1, max_size=2))
def test_an_area_does_not_depend_on_the_shards(name: str, rows: Any, cuts: list[int]) -> None:
    columns = [np.array(values, dtype="float32") for values in zip(*rows)]
    shards = list(zip(*(np.split(column, sorted(cuts)) for column in columns)))
    assert merged_area(name, shards) == pytest.approx(merged_area(name, [tuple(columns)]), abs=1e-12)


@pytest.mark.parametrize("name", ["auc", "aucpr"])
def test_with_very_many_scores_an_area_is_still_true_to_four_decimals(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(20_000) < 0.1).astype("float32")
    scores = (1 / (1 + np.exp(-rng.normal(labels, 1)))).astype("float32")
    shard = (scores, labels, np.ones(20_000))
    exact = merged_area(name, [shard])
    monkeypatch.setattr(metrics, "EXACT_SCORES", 10)
    coarse = merged_area(name, [shard])
    assert coarse != exact
    assert coarse == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("function", [metrics.roc_auc, metrics.pr_auc])
@pytest.mark.parametrize("empty", [0, 1])
def test_an_area_of_one_class_only_is_not_a_number(function: Any, empty: int) -> None:
    curve = [np.array([1.0, 2.0]), np.array([1.0, 2.0])]
    curve[empty] = np.zeros(2)
    assert np.isnan(function(*curve))
