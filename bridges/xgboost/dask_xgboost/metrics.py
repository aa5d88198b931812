"""Metric values of all rows, where XGBoost would average over shards.

XGBoost reduces most metrics as sums, which is exact. ``auc`` and ``aucpr`` it
averages over workers, and custom metrics too, unweighted. Here the area metrics
are computed from the scores of all ranks, and custom ones averaged by weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xgboost as xgb
from xgboost import collective

from dask_xgboost.gathering import all_gather

__all__ = ["AREAS", "GlobalMetrics", "pr_auc", "roc_auc"]

#: Built-in metrics computed here.
AREAS = ("auc", "aucpr")

#: Up to this many distinct scores over all ranks an area is exact; beyond, scores
#: are rounded to 11 bits of mantissa (2**20 bins).
EXACT_SCORES = 1 << 22

Metric = Callable[[Any, xgb.DMatrix], Any]


def roc_auc(tp: Any, fp: Any) -> float:
    """Area under the ROC curve from weights per distinct score, scores falling; nan for one class only."""
    positives, negatives = tp.sum(), fp.sum()
    if positives <= 0 or negatives <= 0:
        return float("nan")
    above = np.cumsum(tp) - tp / 2
    return float((above * fp).sum() / (positives * negatives))


def pr_auc(tp: Any, fp: Any) -> float:
    """Area under the precision-recall curve, interpolated as XGBoost does.

    The interpolation is that of Davis and Goadrich (ICML 2006): between two
    points, false positives grow linearly with true positives.
    """
    positives = tp.sum()
    if positives <= 0 or fp.sum() <= 0:
        return float("nan")
    above_tp, above_fp = np.cumsum(tp) - tp, np.cumsum(fp) - fp
    steps = tp > 0
    slope = fp[steps] / tp[steps]
    a = 1.0 + slope
    b = (above_fp[steps] - slope * above_tp[steps]) / positives
    low, high = above_tp[steps] / positives, (above_tp[steps] + tp[steps]) / positives
    with np.errstate(divide="ignore", invalid="ignore"):
        curved = (high - low - b / a * (np.log(a * high + b) - np.log(a * low + b))) / a
    area = np.where(b == 0, (high - low) / a, curved)
    return float(area.sum())


def _coarse(scores: Any) -> Any:
    """Scores rounded towards zero to 11 bits of mantissa, in the same order."""
    bits = np.asarray(scores, dtype="float32").view("int32")
    return (bits & np.int32(-(1 << 12))).view("float32")


def _merged(scores: Any, positive: Any, weight: Any) -> tuple[Any, Any]:
    """The curve over all ranks: weights of positives and negatives in the order of falling scores.

    Only the positives' scores travel to all ranks; each then places its own negatives
    between them. `positive` may be a fraction, as labels of logistic regression may.
    """
    scores = np.asarray(scores, dtype="float32")
    total = collective.allreduce(np.array([(positive > 0).sum()], dtype="int64"), collective.Op.SUM)[0]
    if total > EXACT_SCORES:
        scores = _coarse(scores)
    local = _sums(scores[positive > 0], (positive * weight)[positive > 0])
    thresholds, tp = _sums(*(all_gather(values) for values in local))
    fp = _between(scores[positive < 1], ((1 - positive) * weight)[positive < 1], thresholds)
    fp = collective.allreduce(fp, collective.Op.SUM)
    at_all = np.zeros(len(fp))
    at_all[1::2] = tp
    return at_all[::-1], fp[::-1]


def _sums(scores: Any, weight: Any) -> tuple[Any, Any]:
    """Distinct scores, rising, and the summed weight of each."""
    if not len(weight) or not np.ptp(weight):
        distinct, counts = np.unique(scores, return_counts=True)
        return distinct, counts * (weight[0] if len(weight) else 0.0)
    distinct, index = np.unique(scores, return_inverse=True)
    return distinct, np.bincount(index, weight, len(distinct))


def _between(scores: Any, weight: Any, thresholds: Any) -> Any:
    """Weight of `scores` below the first threshold, at it, between it and the second, at that, and so on."""
    if np.ptp(weight) if len(weight) else 0:
        order = np.argsort(scores)
        rising, below = scores[order], np.concatenate([[0.0], np.cumsum(weight[order])])
    else:  # all weigh the same: sorting without an index is several times faster
        rising, below = np.sort(scores), np.arange(len(scores) + 1) * (weight[0] if len(weight) else 0.0)
    cuts = np.empty(2 * len(thresholds) + 1)
    cuts[0:-1:2] = below[np.searchsorted(rising, thresholds, "left")]
    cuts[1::2] = below[np.searchsorted(rising, thresholds, "right")]
    cuts[-1] = below[-1]
    return np.diff(cuts, prepend=0.0)


_AREA = {"auc": roc_auc, "aucpr": pr_auc}


def area(name: str, predictions: Any, matrix: xgb.DMatrix) -> float:
    """`name` over the rows of all ranks: binary, or the mean over classes, each against the rest.

    As in XGBoost, classes count by their prevalence for ``auc``, and alike for ``aucpr``.
    """
    labels, weight = matrix.get_label(), matrix.get_weight()
    weight = np.asarray(weight if weight.size else np.ones(len(labels)), dtype="float64")
    if predictions.ndim == 1:
        return _AREA[name](*_merged(predictions, labels, weight))
    values, prevalence = [], []
    for index in range(predictions.shape[1]):
        tp, fp = _merged(predictions[:, index], (labels == index).astype("float64"), weight)
        values.append(_AREA[name](tp, fp))
        prevalence.append(tp.sum())
    return float(np.average(values, weights=prevalence if name == "auc" else None))


class GlobalMetrics:
    """The `custom_metric` given to XGBoost: areas over all rows, and the user's metric averaged by weight.

    Attributes
    ----------
    exact : dict
        (id of matrix, metric) -> value of this round; XGBoost itself rounds to six decimals.
    model : xgboost.Booster
        What is trained; set before the first round.
    """

    def __init__(self, areas: Sequence[str], user: Metric | None, classes: int = 0, from_margins: bool = False) -> None:
        self.areas = tuple(areas)
        self.user = user
        self.classes = classes
        self.from_margins = from_margins
        self.model: Any = None
        self.exact: dict[tuple[int, str], float] = {}
        self._roots: dict[int, tuple[int, list[str]]] = {}

    def __call__(self, predictions: Any, matrix: xgb.DMatrix) -> list[tuple[str, float]]:
        """Values of all metrics, the same on every rank."""
        scores = self._scores(predictions, matrix) if self.areas else None
        values = [(name, area(name, scores, matrix)) for name in self.areas]
        if self.user is not None:
            values += self._average(predictions, matrix)
        self.exact.update({(id(matrix), name): value for name, value in values})
        return values

    def _scores(self, predictions: Any, matrix: xgb.DMatrix) -> Any:
        """What areas are computed from: with several classes their probabilities, a row each, also for no rows.

        ``multi:softmax`` predicts labels, and custom objectives margins.
        """
        if not self.classes:
            return predictions
        if self.from_margins:
            margins = self.model.predict(matrix, output_margin=True).reshape(-1, self.classes)
            powers = np.exp(margins - margins.max(axis=1, keepdims=True))
            predictions = powers / powers.sum(axis=1, keepdims=True)
        return predictions.reshape(-1, self.classes)

    def _average(self, predictions: Any, matrix: xgb.DMatrix) -> list[tuple[str, float]]:
        """The user's metric, by weight (or rows). A rank without rows is not asked."""
        assert self.user is not None
        found: list[tuple[str, float]] = []
        if matrix.num_row():
            given = self.user(predictions, matrix)
            found = list(given) if isinstance(given, list) else [given]
        names = self._names(matrix, [name for name, _ in found])
        weight = matrix.get_weight()
        total = float(weight.sum()) if weight.size else float(matrix.num_row())
        sums = np.zeros(len(names) + 1)
        sums[-1] = total
        if found:
            sums[:-1] = np.array([value for _, value in found], dtype="float64") * total
        sums = collective.allreduce(sums, collective.Op.SUM)
        return [(name, float(value / sums[-1])) for name, value in zip(names, sums[:-1])]

    def _names(self, matrix: xgb.DMatrix, found: list[str]) -> list[str]:
        """What the metrics are called, told by the first rank that has rows."""
        if id(matrix) not in self._roots:
            world, rank = collective.get_world_size(), collective.get_rank()
            first = np.array([rank if matrix.num_row() else world], dtype="int64")
            root = int(collective.allreduce(first, collective.Op.MIN)[0])
            self._roots[id(matrix)] = (root, list(collective.broadcast(found, root)))
        return self._roots[id(matrix)][1]
