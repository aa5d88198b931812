"""What a bridge's tests say of their bridge, and the data of all contract tests."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
from distributed import Client

__all__ = ["Contract", "make_data", "train_in_task"]

ROWS, COLUMNS = 240, 3


def make_data(chunk: int | tuple[int, ...] = 30) -> tuple[Any, Any]:
    """Small whole numbers, so that sums and cut points are exact."""
    rng = np.random.default_rng(7)
    X = rng.integers(0, 20, size=(ROWS, COLUMNS)).astype("float32")
    y = (X[:, 0] > X[:, 1]).astype("float32")
    return da.from_array(X, chunks=(chunk, COLUMNS)), da.from_array(y, chunks=(chunk,))


def train_in_task(contract: Contract, X: Any, y: Any, **options: Any) -> Any:
    """Runs inside a task: the bridge finds the worker's client by itself."""
    return contract.train(None, X, y, **options)


class Contract:
    """What the tests need to know of a bridge.

    Attributes
    ----------
    ends_within : float
        Seconds in which members are gone when nobody wants them any more.
    """

    ends_within: float = 10

    def train(self, client: Client | None, X: Any, y: Any, **options: Any) -> Any:
        """Train for a few rounds.

        `options` are the bridge's own ``workers=``, ``exclusive=`` and ``timeout=``, and ``fault=``,
        to be called with (rank=, round=) on every rank after each round; ``rounds=`` is their number.
        """
        raise NotImplementedError

    def check(self, result: Any, X: Any, y: Any) -> None:
        """Assert that the result is what one process gives on all rows."""
        raise NotImplementedError

    def use(self, client: Client, result: Any, X: Any) -> None:
        """Compute on the cluster with a result, where the bridge has something for that."""
