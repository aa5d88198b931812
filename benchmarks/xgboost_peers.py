"""Data and contenders of xgboost_train.py: dask_xgboost, xgboost.dask, and XGBoost in one process.

Every contender gets the same rows, where they lie already, and evaluates the training set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import scipy.sparse
import xgboost as xgb
from distributed import Client, wait
from xgboost import dask as dxgb

import dask_xgboost
from results import missing

PARAMS = {
    "objective": "binary:logistic", "eval_metric": "logloss", "max_depth": 6, "tree_method": "hist", "verbosity": 0,
}  # fmt: skip
OURS, QUANTILE, DMATRIX = "dask_xgboost", "xgboost.dask, DaskQuantileDMatrix", "xgboost.dask, DaskDMatrix"
POST_FIT, ALONE = "dask-ml, ParallelPostFit", "one process"

#: A training that gives the log-loss of its last round on the training set.
Training = Callable[[], float]


@dataclass(frozen=True)
class Rows:
    """Rows on the workers, and the same in this process."""

    client: Client
    features: Any
    labels: Any
    X: Any = None
    y: Any = None
    rounds: int = 30
    threads: int = 2
    params: dict[str, Any] = field(default_factory=lambda: PARAMS)

    @property
    def alone(self) -> str:
        """What one process with all the threads is called."""
        return f"{ALONE}, {self.threads} threads"


# Data


def dense_part(seed: int, rows: int, columns: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(rows, columns)).astype("float32")
    return X, _labels(X[:, :5].sum(axis=1), rng)


def sparse_part(seed: int, rows: int, columns: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    X = scipy.sparse.random(rows, columns, 0.01, format="csr", dtype="float32", random_state=rng)
    return X, _labels(np.asarray(X[:, :100].sum(axis=1)).ravel(), rng)


def _labels(score: Any, rng: Any) -> Any:
    return (score + rng.normal(size=len(score)) > 0).astype("float32")


def arrays(client: Client, part: Any, rows: int, columns: int, parts: int, *, here: bool = True) -> Rows:
    """Arrays of `parts` chunks, made on the workers; and once more `here`."""
    size = rows // parts
    made = [dask.delayed(part, nout=2)(seed, size, columns) for seed in range(parts)]
    meta = scipy.sparse.csr_matrix((0, columns), dtype="float32") if part is sparse_part else np.empty((0, 0), "f4")
    features = da.concatenate([da.from_delayed(X, (size, columns), "float32", meta=meta) for X, _ in made])
    labels = da.concatenate([da.from_delayed(y, (size,), "float32") for _, y in made])
    features, labels = client.persist([features, labels])
    wait([features, labels])
    if not here:
        return Rows(client, features, labels)
    X, y = zip(*(part(seed, size, columns) for seed in range(parts)))
    return Rows(
        client,
        features,
        labels,
        scipy.sparse.vstack(X) if part is sparse_part else np.concatenate(X),
        np.concatenate(y),
    )


def flights(client: Client, copies: int) -> Rows:
    """The flights out of New York so many times: three columns of categories, fourteen of numbers."""
    from dask_bridges.demo.flights import FEATURES, LABEL, load

    train = client.persist(load(client).train)
    frame = client.persist(dd.concat([train] * copies, interleave_partitions=False))
    wait(frame)
    here = pd.concat([train.compute()] * copies, ignore_index=True)
    return Rows(client, client.persist(frame[FEATURES]), client.persist(frame[LABEL]), here[FEATURES], here[LABEL])


# Contenders


def ours(rows: Rows, *, cold: bool = True) -> Training:
    """With nothing on the workers but the partitions; or, not `cold`, with what the training before has left."""

    def train() -> float:
        history: dict[str, Any] = {}
        features = rows.features.copy() if cold else rows.features
        dask_xgboost.train(
            rows.client, rows.params, features, rows.labels, num_boost_round=rows.rounds, evals=[(features, "train")],
            evals_result=history, progress=False,
        )  # fmt: skip
        return _last(history)

    return train


def theirs(rows: Rows, matrix: Any, *, cold: bool = True) -> Training:
    """A new matrix each time; or, not `cold`, the same, of which it keeps the partitions."""
    kept = None if cold else matrix(rows.client, rows.features, rows.labels, enable_categorical=True)

    def train() -> float:
        dtrain = matrix(rows.client, rows.features, rows.labels, enable_categorical=True) if kept is None else kept
        found = dxgb.train(rows.client, rows.params, dtrain, rows.rounds, evals=[(dtrain, "train")], verbose_eval=False)
        return _last(found["history"])

    return train


def alone(rows: Rows, *, cold: bool = True) -> Training:
    """On all rows in this process; not `cold`, the matrix is there."""

    def matrix() -> Any:
        return xgb.QuantileDMatrix(rows.X, rows.y, nthread=rows.threads, enable_categorical=True)

    kept = None if cold else matrix()

    def train() -> float:
        history: dict[str, Any] = {}
        dtrain = matrix() if kept is None else kept
        params = {**rows.params, "nthread": rows.threads}
        xgb.train(params, dtrain, rows.rounds, evals=[(dtrain, "train")], evals_result=history, verbose_eval=False)
        return _last(history)

    return train


def trainings(rows: Rows, *, cold: bool = True) -> dict[str, Training]:
    """All of them, by name."""
    return {
        OURS: ours(rows, cold=cold),
        QUANTILE: theirs(rows, dxgb.DaskQuantileDMatrix, cold=cold),
        DMATRIX: theirs(rows, dxgb.DaskDMatrix, cold=cold),
        rows.alone: alone(rows, cold=cold),
    }


def predictions(rows: Rows, case: str) -> dict[str, Callable[[], None]]:
    booster = dask_xgboost.train(
        rows.client, rows.params, rows.features, rows.labels, num_boost_round=rows.rounds, progress=False
    )
    booster.set_param({"nthread": rows.threads})

    def done(collection: Any) -> None:
        wait(rows.client.persist(collection))

    ways = {
        OURS: lambda: done(dask_xgboost.predict(rows.client, booster, rows.features)),
        "xgboost.dask, inplace_predict": lambda: done(dxgb.inplace_predict(rows.client, booster, rows.features)),
    }
    if (wrapped := post_fit(booster, rows, case)) is not None:
        ways[POST_FIT] = lambda: done(wrapped.predict_proba(rows.features))
    return {**ways, rows.alone: lambda: booster.inplace_predict(rows.X)}


def post_fit(booster: Any, rows: Rows, case: str) -> Any:
    """dask-ml's wrapper around an estimator of the booster; None where dask-ml is missing or does not run."""
    estimator = xgb.XGBClassifier(n_jobs=1)  # a thread a worker, as the others have
    estimator.load_model(bytearray(booster.save_raw()))
    try:
        from dask_ml.wrappers import ParallelPostFit

        wrapped = ParallelPostFit(estimator=estimator)
        wrapped.predict_proba(rows.features[:10]).compute()
    except ImportError as error:
        missing(case, POST_FIT, error)
    except Exception as error:  # whatever has changed under it
        missing(case, POST_FIT, f"it does not run with Dask {dask.__version__}: {type(error).__name__}: {error}")
    else:
        return wrapped
    return None


def validations(rows: Rows, nfold: int) -> dict[str, Training]:
    """Cross-validations; xgboost.dask has none, so it trains `nfold` times on all but some of the chunks."""
    folds = [[chunk for chunk in range(rows.features.numblocks[0]) if chunk % nfold == fold] for fold in range(nfold)]

    def here() -> float:
        matrix = xgb.DMatrix(rows.X, rows.y, nthread=rows.threads)
        params = {**rows.params, "nthread": rows.threads}
        return float(xgb.cv(params, matrix, rows.rounds, nfold=nfold)["test-logloss-mean"].iloc[-1])

    def ours() -> float:
        found = dask_xgboost.cv(
            rows.client,
            rows.params,
            rows.features.copy(),
            rows.labels,
            num_boost_round=rows.rounds,
            nfold=nfold,
            progress=False,
        )
        return float(found["test-logloss-mean"].iloc[-1])

    def theirs() -> float:
        return float(np.mean([_without(rows, fold) for fold in folds]))

    return {OURS: ours, f"xgboost.dask, {nfold} trainings": theirs, f"xgboost.cv, {rows.alone}": here}


def _without(rows: Rows, fold: list[int]) -> float:
    """The log-loss on the chunks of a fold of what was trained on the others."""

    def matrix(chunks: list[int], **ref: Any) -> Any:
        X, y = (da.concatenate([c.blocks[chunk] for chunk in chunks]) for c in (rows.features, rows.labels))
        return dxgb.DaskQuantileDMatrix(rows.client, X, y, **ref)

    train = matrix([chunk for chunk in range(rows.features.numblocks[0]) if chunk not in fold])
    sets = [(train, "train"), (matrix(fold, ref=train), "test")]
    found = dxgb.train(rows.client, rows.params, train, rows.rounds, evals=sets, verbose_eval=False)
    return _last(found["history"], "test")


def _last(history: Any, name: str = "train") -> float:
    return float(history[name]["logloss"][-1])
