"""The same XGBoost training twice: by the workers of a cluster, and in one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import xgboost as xgb
from dask.base import compute
from dask.system import CPU_COUNT
from distributed import Client

import dask_xgboost
from dask_bridges.demo.flights import FEATURES, LABEL, Flights

__all__ = [
    "PARAMS",
    "ROUNDS",
    "Trained",
    "predict_on_cluster",
    "threads_here",
    "train_here",
    "train_on_cluster",
]

History = dict[str, dict[str, list[float]]]
Scores = npt.NDArray[np.float32]

ROUNDS = 300
_PATIENCE = 20
PARAMS: dict[str, Any] = {
    "objective": "binary:logistic",
    "eval_metric": "logloss",
    "learning_rate": 0.1,
    "max_depth": 6,
    "min_child_weight": 20,
    "subsample": 0.8,
    "colsample_bytree": 0.6,
}


@dataclass(frozen=True)
class Trained:
    """A booster and how it came about."""

    booster: xgb.Booster
    """Cut back to its best round, so that who predicts with it needs no `iteration_range`."""
    history: History
    """Metrics by evaluation set, metric and round; early stopping's last rounds included."""

    @property
    def rounds(self) -> int:
        """Number of rounds trained."""
        return len(self.history["valid"]["logloss"])

    @property
    def best(self) -> int:
        """Number of rounds up to the best, which the booster has."""
        return int(self.booster.num_boosted_rounds())


def train_on_cluster(client: Client, data: Flights, rounds: int | None) -> Trained:
    """Train on the workers, each on the partitions it holds."""
    history: History = {}
    booster = dask_xgboost.train(
        client,
        PARAMS,
        data.train,
        LABEL,
        num_boost_round=rounds or ROUNDS,
        evals=[(data.train, "train"), (data.valid, "valid")],
        evals_result=history,
        early_stopping_rounds=_PATIENCE,
        progress=None,
    )
    return Trained(_up_to_best(booster), history)


def predict_on_cluster(client: Client, trained: Trained, data: Flights) -> tuple[pd.Series, pd.Series]:
    """Labels and predicted probabilities of the test flights; their features stay on the workers."""
    predicted = dask_xgboost.predict(client, trained.booster, data.test[FEATURES])
    late, scores = compute(data.test[LABEL], predicted)
    return late, scores


def train_here(
    train: pd.DataFrame, valid: pd.DataFrame, test: pd.DataFrame, rounds: int | None, threads: int
) -> tuple[Trained, Scores]:
    """Train in this process, as the XGBoost tutorial does, and predict the rows of `test`."""
    options: dict[str, Any] = {"enable_categorical": True, "nthread": threads}
    dtrain = xgb.QuantileDMatrix(train[FEATURES], train[LABEL], **options)
    dvalid = xgb.QuantileDMatrix(valid[FEATURES], valid[LABEL], ref=dtrain, **options)
    history: Any = {}
    booster = xgb.train(
        {**PARAMS, "nthread": threads},
        dtrain,
        num_boost_round=rounds or ROUNDS,
        evals=[(dtrain, "train"), (dvalid, "valid")],
        evals_result=history,
        early_stopping_rounds=_PATIENCE,
        verbose_eval=False,
    )
    trained = Trained(_up_to_best(booster), history)
    return trained, trained.booster.predict(xgb.DMatrix(test[FEATURES], **options))


def threads_here(client: Client) -> int:
    """As many threads as the workers have together, where this machine has them: a fair race."""
    return int(max(min(sum(client.nthreads().values()), CPU_COUNT), 1))


def _up_to_best(booster: xgb.Booster) -> xgb.Booster:
    return booster[: booster.best_iteration + 1]
