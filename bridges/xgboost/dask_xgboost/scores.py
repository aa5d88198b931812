"""Scores of collections: each partition is counted where it is, and only the counts travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import dask
import numpy as np
from distributed import Client

from dask_bridges import partitions
from dask_bridges.errors import DataError
from dask_bridges.shipping import sealed
from dask_xgboost.labels import flat
from dask_xgboost.steps import Steps, compute

__all__ = ["accuracy", "r2"]


@dataclass(frozen=True)
class Tally:
    """Weight, mean and squared deviations of the true values of one partition, and squared errors; or what is right."""

    weight: float
    mean: Any
    deviation: Any
    error: Any


def accuracy(client: Client | None, predicted: Any, y: Any, sample_weight: Any) -> Steps:
    """The weighted share of rows whose prediction is right."""
    tallies = yield compute(client, _delayed(_right, predicted, y, sample_weight))
    return float(sum(one.error for one in tallies) / _total(tallies))


def r2(client: Client | None, predicted: Any, y: Any, sample_weight: Any) -> Steps:
    """The coefficient of determination, as `sklearn.metrics.r2_score` has it; the mean over columns."""
    tallies = yield compute(client, _delayed(_deviations, predicted, y, sample_weight))
    total = _total(tallies)
    mean = sum(one.weight * one.mean for one in tallies) / total
    spread = np.atleast_1d(sum(one.deviation + one.weight * (one.mean - mean) ** 2 for one in tallies))
    error = np.atleast_1d(sum(one.error for one in tallies))
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = np.where(spread > 0, 1 - error / spread, np.where(error > 0, 0.0, 1.0))
    return float(scores.mean())


def _total(tallies: list[Tally]) -> float:
    total = sum(one.weight for one in tallies)
    if not total:
        raise DataError("there are no rows to score, or all weigh nothing")
    return total


def _delayed(function: Any, predicted: Any, y: Any, weight: Any) -> list[Any]:
    given = {"X": predicted, "y": y} | ({} if weight is None else {"sample_weight": weight})
    blocks = [_blocks(collection) for collection in partitions.align(given).values()]
    return [dask.delayed(sealed(_checked, function), pure=True)(*parts) for parts in zip(*blocks)]


def _blocks(collection: Any) -> list[Any]:
    blocks = collection.to_delayed()
    return list(blocks) if partitions.is_frame(collection) else list(blocks.ravel())


def _checked(function: Any, predicted: Any, y: Any, weight: Any = None) -> Tally:
    if len(predicted) != len(y):
        raise DataError(f"a partition of X has {len(predicted)} rows and of y {len(y)}: they must match row for row")
    weights = np.ones(len(y)) if weight is None else np.asarray(flat(weight), dtype="float64")
    result: Tally = function(flat(predicted), flat(y), weights)
    return result


def _right(predicted: Any, y: Any, weight: Any) -> Tally:
    right: Any = np.asarray(predicted == y)
    right = right.all(axis=1) if right.ndim == 2 else right
    return Tally(float(weight.sum()), 0.0, 0.0, float((right * weight).sum()))


def _deviations(predicted: Any, y: Any, weight: Any) -> Tally:
    y, total = np.asarray(y, dtype="float64"), float(weight.sum())
    if not total:
        return Tally(0.0, 0.0, 0.0, 0.0)
    w = weight.reshape(-1, *[1] * (y.ndim - 1))
    mean = (w * y).sum(axis=0) / total
    return Tally(total, mean, (w * (y - mean) ** 2).sum(axis=0), (w * (y - predicted) ** 2).sum(axis=0))
