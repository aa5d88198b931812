"""A training that is interrupted between two segments gives the same model as one that is not."""

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xgboost as xgb

from dask_bridges import DataError
from dask_bridges.checkpoints import Checkpoints
from dask_xgboost import cuts, resuming
from dask_xgboost.boosting import Rounds
from dask_xgboost.resuming import Keeping, State

TOTAL, EVERY = 13, 4


class StopHereError(Exception):
    pass


class Kept:
    """Keeps states as a rank does, and may interrupt the training after so many rounds."""

    def __init__(self, callbacks: Any = (), stop: int = 0) -> None:
        self.callbacks, self.stop = callbacks, stop
        self.states: list[State] = []

    def keep(self, booster: Any, history: Any, done: int) -> None:
        remembered = tuple(resuming._remembered(callback) for callback in self.callbacks)
        model = bytes(booster.save_raw("ubj"))
        self.states.append(State(done, model, booster.save_config(), resuming.plain(history), remembered, (), ()))
        if done == self.stop:
            raise StopHereError


@pytest.fixture(scope="module")
def data() -> Any:
    rng = np.random.default_rng(4)
    X = rng.normal(size=(500, 6)).astype("float32")
    signal = X[:, 0] * X[:, 1] + rng.normal(0, 0.3, 500)
    return X, signal


def rounds(params: dict[str, Any], callbacks: Any = ()) -> Rounds:
    return Rounds({"max_depth": 4, "nthread": 1, "seed": 5} | params, TOTAL, EVERY, None, callbacks, callbacks)


PARAMS = {
    "plain": {"objective": "binary:logistic"},
    "rows": {"objective": "binary:logistic", "subsample": 0.5},
    "columns": {"objective": "binary:logistic", "colsample_bytree": 0.7, "colsample_bylevel": 0.7},
    "nodes": {"objective": "reg:squarederror", "colsample_bynode": 0.5, "subsample": 0.8},
    "gradients": {"objective": "reg:squarederror", "subsample": 0.5, "sampling_method": "gradient_based"},
    "forests": {"objective": "reg:squarederror", "num_parallel_tree": 3, "subsample": 0.5},
    "dart": {"objective": "binary:logistic", "booster": "dart", "rate_drop": 0.3, "subsample": 0.7},
    "classes": {"objective": "multi:softprob", "num_class": 3, "subsample": 0.5},
    "quantiles": {"objective": "reg:quantileerror", "quantile_alpha": [0.2, 0.8], "subsample": 0.5},
    "vectors": {"objective": "reg:squarederror", "multi_strategy": "multi_output_tree"},
    "seeded rounds": {"objective": "reg:squarederror", "seed_per_iteration": True, "colsample_bytree": 0.5},
}


@pytest.mark.parametrize("kind", PARAMS)
def test_an_interrupted_training_goes_on_to_the_same_model(data: Any, kind: str) -> None:
    X, signal = data
    label = signal > 0 if kind in ("plain", "rows", "columns", "dart") else signal
    label = np.digitize(signal, [-0.5, 0.5]) if kind == "classes" else label
    label = np.stack([signal, -signal], axis=1) if kind == "vectors" else label
    matrix = xgb.QuantileDMatrix(X, label)
    evals = [(matrix, "train")]
    model, history = rounds(PARAMS[kind]).boost(matrix, evals, None, None)
    for stop in (EVERY, 2 * EVERY):
        kept = Kept(stop=stop)
        with pytest.raises(StopHereError):
            rounds(PARAMS[kind]).boost(matrix, evals, kept, None)  # type: ignore[arg-type]
        assert kept.states[-1].round == stop
        resumed, whole = rounds(PARAMS[kind]).boost(xgb.QuantileDMatrix(X, label), [], None, kept.states[-1])
        assert resumed.save_raw("ubj") == model.save_raw("ubj")
        resumed, whole = rounds(PARAMS[kind]).boost(matrix, evals, None, kept.states[-1])
        assert whole == history
        assert [len(values) for log in whole.values() for values in log.values()] == [TOTAL]


RANKED = {"objective": "rank:ndcg", "lambdarank_pair_method": "mean"}


@pytest.mark.parametrize("kind", ["custom objective", "ranking", "categories"])
def test_what_else_goes_on_to_the_same_model(data: Any, kind: str) -> None:
    X, signal = data
    params: dict[str, Any] = {"subsample": 0.7, "colsample_bynode": 0.6}
    if kind == "ranking":
        matrix = xgb.QuantileDMatrix(X, np.digitize(signal, [-0.5, 0.5]), qid=np.repeat(np.arange(50), 10))
        params |= RANKED
    elif kind == "categories":
        frame = pd.DataFrame(X).assign(kind=pd.Categorical(np.digitize(signal, [-0.5, 0, 0.5]).astype(str)))
        matrix = xgb.QuantileDMatrix(frame, signal, enable_categorical=True)
    else:
        matrix = xgb.QuantileDMatrix(X, signal)
    plan = rounds(params)
    if kind == "custom objective":
        plan = replace(plan, obj=lambda margins, rows: (margins - rows.get_label(), np.ones(len(margins))))
    model, kept = plan.boost(matrix, [], None, None)[0], Kept(stop=2 * EVERY)
    with pytest.raises(StopHereError):
        plan.boost(matrix, [], kept, None)  # type: ignore[arg-type]
    assert plan.boost(matrix, [], None, kept.states[-1])[0].save_raw("ubj") == model.save_raw("ubj")


@pytest.mark.parametrize("kind", ["rows", "columns", "dart"])
def test_a_segment_draws_anew_and_the_first_one_as_ever(data: Any, kind: str) -> None:
    X, signal = data
    matrix = xgb.QuantileDMatrix(X, signal > 0)
    ours = rounds(PARAMS[kind]).boost(matrix, [], None, None)[0]
    alone = xgb.train({"max_depth": 4, "nthread": 1, "seed": 5} | PARAMS[kind], matrix, TOTAL)
    same = [a == b for a, b in zip(ours.get_dump(), alone.get_dump())]
    assert all(same[:EVERY])
    assert not any(same[EVERY + 1 :])


class Counts(xgb.callback.TrainingCallback):
    def __init__(self) -> None:
        self.seen: list[int] = []
        self.lock = threading.Lock()

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        self.seen.append(epoch)
        return False


def test_callbacks_and_early_stopping_go_on_with_what_they_remember(data: Any) -> None:
    X, noise = data[0], np.random.default_rng(0).normal(size=500)
    train, valid = xgb.QuantileDMatrix(X[:300], noise[:300]), xgb.DMatrix(X[300:], noise[300:])
    evals, params = [(train, "train"), (valid, "valid")], {"objective": "reg:squarederror", "eta": 1.0}

    def callbacks() -> Any:
        return [Counts(), xgb.callback.EarlyStopping(rounds=9, save_best=True)]

    whole = callbacks()
    model, history = rounds(params, whole).boost(train, evals, None, None)
    assert 2 * EVERY < len(history["valid"]["rmse"]) < TOTAL
    kept, last = Kept(first := callbacks(), stop=2 * EVERY), callbacks()
    with pytest.raises(StopHereError):
        rounds(params, first).boost(train, evals, kept, None)  # type: ignore[arg-type]
    resumed, resumed_history = rounds(params, last).boost(train, evals, None, kept.states[-1])
    assert resumed.save_raw("ubj") == model.save_raw("ubj")
    assert resumed.best_iteration == model.best_iteration
    assert resumed_history == history
    assert last[0].seen == whole[0].seen
    assert vars(last[1]) == vars(whole[1])


def test_a_store_gives_back_what_was_kept_and_refuses_another_training(data: Any, tmp_path: Any) -> None:
    X, signal = data
    matrix = xgb.QuantileDMatrix(X, signal)
    checkpoints, callbacks = Checkpoints(tmp_path / "kept"), [xgb.callback.EarlyStopping(rounds=3)]
    keeping = Keeping(checkpoints, {"params": {"eta": "1"}})
    model, history = rounds({}, callbacks).boost(matrix, [(matrix, "train")], None, None)
    remembered = tuple(map(resuming._remembered_plainly, callbacks))
    kept = State(
        8,
        bytes(model.save_raw("ubj")),
        model.save_config(),
        history,
        remembered,
        matrix.get_quantile_cut(),
        ((0, 1), (1,)),
    )
    assert resuming.load(checkpoints, keeping.training, TOTAL) is None
    resuming._save(checkpoints, kept, keeping.training)
    found = resuming.load(checkpoints, keeping.training, TOTAL)
    assert found is not None
    assert (found.round, found.model, found.history, found.placement) == (8, kept.model, history, ((0, 1), (1,)))
    assert all(map(np.array_equal, found.cuts, kept.cuts))
    fresh = xgb.callback.EarlyStopping(rounds=3)
    resuming.restore([fresh], found)
    assert vars(fresh) == vars(callbacks[0])
    with pytest.raises(DataError, match="is of another training, with other params"):
        resuming.load(checkpoints, {"params": {"eta": "2"}}, TOTAL)
    with pytest.raises(DataError, match="is of round 8, and num_boost_round is 8"):
        resuming.load(checkpoints, keeping.training, 8)


COLUMNS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "positive": lambda rng, n: rng.uniform(3, 900, n),
    "large": lambda rng, n: rng.uniform(1e6, 1e9, n),
    "negative": lambda rng, n: -rng.uniform(3, 900, n),
    "far below": lambda rng, n: -rng.uniform(1e6, 1e9, n),
    "whole": lambda rng, n: rng.integers(0, 50, n),
    "whole below": lambda rng, n: -rng.integers(1, 50, n),
    "constant": lambda rng, n: np.full(n, 3.5),
    "zero": lambda rng, n: np.zeros(n),
    "one below": lambda rng, n: np.full(n, -3.5),
    "two": lambda rng, n: rng.integers(0, 2, n),
    "tiny": lambda rng, n: rng.normal(size=n) * 1e-7,
    "outliers": lambda rng, n: np.where(rng.random(n) < 0.01, 1e6, 1.0) * rng.normal(size=n),
    "gaps": lambda rng, n: np.where(rng.random(n) < 0.3, np.nan, rng.normal(size=n)),
    "missing": lambda rng, n: np.full(n, np.nan),
}


@pytest.mark.parametrize("max_bin", [16, 256])
@pytest.mark.parametrize("kind", COLUMNS)
def test_cuts_are_had_again_from_a_reference(kind: str, max_bin: int) -> None:
    rng = np.random.default_rng(2)
    column = np.asarray(COLUMNS[kind](rng, 5000), dtype="float32")
    matrix = xgb.QuantileDMatrix(np.stack([column, rng.normal(size=5000)], axis=1), max_bin=max_bin)
    again = cuts.reference(matrix.get_quantile_cut(), max_bin, None)
    assert again is not None
    assert all(map(np.array_equal, again.get_quantile_cut(), matrix.get_quantile_cut()))


def test_what_upstream_does_not_save_is_still_not_saved(data: Any) -> None:
    """When this fails, `lambdarank_unbiased` may be kept as well (`dask_xgboost.training._unkept`)."""
    X, signal = data
    matrix = xgb.QuantileDMatrix(X, np.digitize(signal, [-0.5, 0.5]), qid=np.repeat(np.arange(50), 10))
    plan, kept = rounds(RANKED | {"lambdarank_unbiased": True}), Kept(stop=EVERY)
    with pytest.raises(StopHereError):
        plan.boost(matrix, [], kept, None)  # type: ignore[arg-type]
    with pytest.raises(xgb.core.XGBoostError, match="iter == 0"):
        plan.boost(matrix, [], None, kept.states[-1])
