"""Rows that all XGBoost tests share: whole numbers of few values, so that any machine finds the same cuts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
from distributed import Client
from tests.xgboost.losses import doomed_client

ROWS, COLUMNS, GROUP = 420, 5, 14


@dataclass(frozen=True)
class Rows:
    """Features, and labels of every kind.

    Attributes
    ----------
    X : ndarray
        Shape (420, 5), float32, whole numbers from 0 to 29.
    labels : dict
        By objective.
    weight : ndarray
        Between 0.5 and 2.
    qid : ndarray
        Groups of 14 rows, in order.
    """

    X: Any
    labels: dict[str, Any]
    weight: Any
    qid: Any

    def frame(self, objective: str = "binary:logistic") -> pd.DataFrame:
        """Features f0 to f4, label, weight and qid as one frame."""
        frame = pd.DataFrame(self.X, columns=[f"f{i}" for i in range(COLUMNS)])
        return frame.assign(label=self.labels[objective], weight=self.weight, qid=self.qid)


@pytest.fixture(scope="session")
def rows() -> Rows:
    rng = np.random.default_rng(3)
    X = rng.integers(0, 30, (ROWS, COLUMNS)).astype("float32")
    signal = X[:, 0] / 15 - X[:, 1] * X[:, 2] / 400 + rng.normal(0, 0.5, ROWS)
    thirds = np.digitize(signal, np.quantile(signal, [1 / 3, 2 / 3])).astype("float32")
    labels = {
        "reg:squarederror": signal,
        "binary:logistic": (signal > 0.4).astype("float32"),
        "multi:softmax": thirds,
        "multi:softprob": thirds,
        "count:poisson": rng.poisson(np.exp(signal / 2)).astype("float32"),
        "reg:tweedie": np.where(rng.random(ROWS) < 0.3, 0, np.exp(signal)).astype("float32"),
        "rank:ndcg": thirds,
    }
    return Rows(X, labels, rng.uniform(0.5, 2, ROWS).astype("float32"), np.repeat(np.arange(ROWS // GROUP), GROUP))


@pytest.fixture
def doomed(request: pytest.FixtureRequest) -> Iterator[Client]:
    """A client of a cluster of its own, of as many workers as the module's `WORKERS` says: some are killed."""
    with doomed_client(getattr(request.module, "WORKERS", 3)) as client:
        yield client
