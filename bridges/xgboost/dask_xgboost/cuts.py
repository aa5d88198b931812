"""The cut points of a histogram as a matrix of few rows, against which others bin as they did before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import xgboost as xgb

from dask_xgboost.matrixspec import MatrixSpec

__all__ = ["reference", "reference_of", "types"]

_MARGIN = float(np.float32(1e-5))  # XGBoost's, beyond the least and the greatest value


def reference(cuts: tuple[Any, Any], max_bin: int, feature_types: Sequence[str] | None) -> Any:
    """A matrix that has these cuts; None where there is none such.

    Parameters
    ----------
    cuts : tuple of ndarray
        Pointers and values, as of `xgboost.DMatrix.get_quantile_cut`.
    max_bin : int
    feature_types : sequence of str or None
    """
    pointers, values = cuts
    columns = [_column(values[start:stop]) for start, stop in pairwise(pointers)]
    matrix = reference_of(dict(enumerate(columns)), len(columns), max_bin, feature_types)
    same = all(np.array_equal(ours, theirs) for ours, theirs in zip(matrix.get_quantile_cut(), cuts))
    return matrix if same else None


def reference_of(edges: Mapping[int, Any], columns: int, max_bin: int, feature_types: Sequence[str] | None) -> Any:
    """A matrix whose bins have these left edges, by column; of a categorical one the greatest code is enough."""
    rows = np.full((max([1, *map(len, edges.values())]), columns), np.nan, dtype="float32")
    for number, column in edges.items():
        rows[: len(column), number] = column
    return xgb.QuantileDMatrix(rows, max_bin=max_bin, feature_types=feature_types, enable_categorical=True, nthread=1)


def types(spec: MatrixSpec) -> list[str] | None:
    """The types of a matrix's features, as far as binning goes by them; None where all are numbers."""
    if not spec.categories:
        return spec.feature_types
    coded = {str(name) for name in spec.categories}
    return ["c" if name in coded else "float" for name in spec.feature_names or ()]


def _column(cuts: Any) -> Any:
    """Values whose cuts these are: those in between, and a least and a greatest one that fit XGBoost's margins.

    >>> [float(value) for value in _column(np.array([-1e-5, 1, 2, 4.00001], dtype="float32"))]
    [0.0, 1.0, 2.0]
    """
    inner = np.asarray(cuts[1:-1], dtype="float32")
    if cuts[0] > 0:  # what XGBoost gives a column without values
        return inner[:0]
    lows = [*_near((float(cuts[0]) + _MARGIN) / 2), np.float32(0)]
    highs = [*inner[-1:], *_near((float(cuts[-1]) - _MARGIN) / 2)]
    if len(inner):
        lows = [low for low in (*lows, np.nextafter(inner[0], np.float32(-np.inf))) if low < inner[0]]
        highs = [high for high in highs if high >= inner[-1]]
    else:  # there is one value, which is both
        lows = highs = [each for each in (*lows, *highs) if _below(each) == cuts[0] and _above(each) == cuts[-1]]
    lows = [low for low in lows if _below(low) == cuts[0]]
    highs = [high for high in highs if _above(high) == cuts[-1]]
    return np.unique(np.array([*lows[:1], *inner, *highs[:1]], dtype="float32"))


def _below(least: Any) -> Any:
    return np.float32(float(least) - (abs(float(least)) + _MARGIN))


def _above(greatest: Any) -> Any:
    return np.float32(float(greatest) + (abs(float(greatest)) + _MARGIN))


def _near(value: float) -> list[Any]:
    number = np.float32(value)
    return [number, *(np.nextafter(number, np.float32(end)) for end in (np.inf, -np.inf))]
