"""Metric values of all rows, where XGBoost would average over shards.

XGBoost reduces most metrics as sums, which is exact. ``auc`` and ``aucpr`` it
averages over workers, and custom metrics too, unweighted. Here the area metrics
are computed from the scores of all ranks. Custom ones are averaged by weight, or
summed as numerators and denominators, or `gathered`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xgboost as xgb
from xgboost import collective

from dask_xgboost.gathering import all_gather

__all__ = [
    "AREAS",
    "AllRows",
    "Gathered",
    "GlobalMetrics",
    "gathered",
    "in_order",
    "metric_names",
    "on_one_machine",
    "pr_auc",
    "roc_auc",
    "without",
]

#: Built-in metrics computed here.
AREAS = ("auc", "aucpr")

#: Up to this many distinct scores over all ranks an area is exact; beyond, scores
#: are rounded to 11 bits of mantissa (2**20 bins).
EXACT_SCORES = 1 << 22

Metric = Callable[[Any, xgb.DMatrix], Any]


class Gathered:
    """A metric that wants the predictions of all rows; see `gathered`."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        functools.update_wrapper(self, metric)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """What the metric gives for what is here."""
        return self.metric(*args, **keywords)


def gathered(metric: Metric) -> Gathered:
    """A custom metric that is computed once, of the predictions and labels of all rows.

    For what no average over workers can tell, such as ranks, medians and thresholds. After each round the predictions,
    labels and weights of an evaluation set come together in the memory of each worker: 4 bytes each a row.

    Parameters
    ----------
    metric : callable
        ``metric(predictions, rows)`` as in `xgboost.train`, where `rows` is an `AllRows` with the labels of all
        workers, in any order; for an estimator's `eval_metric`, ``metric(y_true, y_pred)``.

    Returns
    -------
    callable
        For `custom_metric` of `train`, or `eval_metric` of an estimator; without a cluster, it is the metric itself.

    Examples
    --------
    >>> import numpy as np
    >>> @gathered
    ... def median_error(predictions, rows):
    ...     return "median", float(np.median(np.abs(predictions - rows.get_label())))
    >>> dask_xgboost.train(client, {}, X, y, evals=[(X, "train")], custom_metric=median_error)   # doctest: +SKIP
    """
    return Gathered(metric)


@dataclass(frozen=True)
class AllRows:
    """What a `gathered` metric is told of the rows of all workers: what `xgboost.DMatrix` tells, by the same names."""

    label: Any
    weight: Any
    base_margin: Any
    group: Any

    def num_row(self) -> int:
        """Number of rows."""
        return len(self.label)

    def get_label(self) -> Any:
        """Labels, shape (rows,) or (rows, targets)."""
        return self.label

    def get_weight(self) -> Any:
        """Weights of the rows, or of the groups; empty without."""
        return self.weight

    def get_base_margin(self) -> Any:
        """Margins; empty without."""
        return self.base_margin

    def get_group(self) -> Any:
        """Sizes of the query groups, in the order of the rows; empty without."""
        return self.group

    def get_uint_info(self, field: str) -> Any:
        """Where each query group begins, and where the last one ends, for ``"group_ptr"``; empty without."""
        if field != "group_ptr":
            raise ValueError(f"{field!r}: there is 'group_ptr' only")
        return np.concatenate([[0], np.cumsum(self.group)]).astype("uint32") if len(self.group) else self.group


def on_one_machine(metric: Metric | None) -> Metric | None:
    """The metric as XGBoost itself can use it: a pair, numerator and denominator, is divided."""
    if metric is None:
        return None
    return lambda predictions, matrix: _numbers(metric(predictions, matrix))


def _numbers(given: Any) -> list[tuple[str, float]]:
    return [(name, float(np.divide(*value) if isinstance(value, tuple) else value)) for name, value in _listed(given)]


def _listed(given: Any) -> list[tuple[str, Any]]:
    """Names and values; a metric gives one pair of them, or a list."""
    return list(given) if isinstance(given, list) else [given]


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


def _all_rows(predictions: Any, matrix: xgb.DMatrix) -> tuple[AllRows, Any]:
    """The rows of all ranks and their predictions, one rank after the other."""
    mine = {
        "label": matrix.get_label(),
        "weight": matrix.get_weight(),
        "base_margin": matrix.get_base_margin(),
        "group": np.diff(matrix.get_uint_info("group_ptr").astype("int64")),
    }
    total = int(collective.allreduce(np.array([matrix.num_row()], dtype="int64"), collective.Op.SUM)[0])
    everything = {name: all_gather(np.ascontiguousarray(values).ravel()) for name, values in mine.items()}
    everything["group"] = everything["group"][everything["group"] > 0]
    for name in ("label", "base_margin"):
        everything[name] = _in_rows(everything[name], total)
    return AllRows(**everything), _in_rows(all_gather(np.ascontiguousarray(predictions).ravel()), total)


def _in_rows(values: Any, rows: int) -> Any:
    return values.reshape(rows, -1) if values.size > rows > 0 else values


def _checked(pairs: Any) -> Any:
    """Numerators and denominators as numbers."""
    try:
        return np.array(pairs, dtype="float64").reshape(-1, 2)
    except (TypeError, ValueError):
        raise TypeError(
            f"a custom metric gave {pairs}: each value is a number, or a pair of numerator and denominator"
        ) from None


class GlobalMetrics:
    """The `custom_metric` given to XGBoost: areas over all rows, and the user's metric, brought together.

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
            values += self._of_user(predictions, matrix)
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

    def _of_user(self, predictions: Any, matrix: xgb.DMatrix) -> list[tuple[str, float]]:
        """The user's metric: of all rows, or of those of each rank and then brought together."""
        if isinstance(self.user, Gathered):
            return self._of_all(predictions, matrix)
        assert self.user is not None
        found = _listed(self.user(predictions, matrix)) if matrix.num_row() else []  # no rows: not asked
        weight = matrix.get_weight()
        total = float(weight.sum()) if weight.size else float(matrix.num_row())
        pairs = [value if isinstance(value, tuple) else (value * total, total) for _, value in found]
        names = self._names(matrix, [name for name, _ in found])
        sums = np.zeros((len(names), 2))
        if pairs:
            sums[:] = _checked(pairs)
        sums = collective.allreduce(sums.ravel(), collective.Op.SUM).reshape(sums.shape)
        with np.errstate(divide="ignore", invalid="ignore"):
            return list(zip(names, (float(value) for value in sums[:, 0] / sums[:, 1])))

    def _of_all(self, predictions: Any, matrix: xgb.DMatrix) -> list[tuple[str, float]]:
        """The metric of all rows, which rank 0 computes and tells."""
        assert isinstance(self.user, Gathered)
        rows, predictions = _all_rows(predictions, matrix)
        found: list[tuple[str, float]] = []
        if collective.get_rank() == 0:
            found = _numbers(self.user(predictions, rows))
        return list(collective.broadcast(found, 0))

    def _names(self, matrix: xgb.DMatrix, found: list[str]) -> list[str]:
        """What the metrics are called, told by the first rank that has rows."""
        if id(matrix) not in self._roots:
            world, rank = collective.get_world_size(), collective.get_rank()
            first = np.array([rank if matrix.num_row() else world], dtype="int64")
            root = int(collective.allreduce(first, collective.Op.MIN)[0])
            self._roots[id(matrix)] = (root, list(collective.broadcast(found, root)))
        return self._roots[id(matrix)][1]


def metric_names(params: dict[str, Any]) -> list[str]:
    """The metrics of ``eval_metric``, in the user's order."""
    given = params.get("eval_metric", [])
    return [given] if isinstance(given, str) else [str(name) for name in given]


def without(params: dict[str, Any], wanted: list[str], areas: list[str]) -> dict[str, Any]:
    """The parameters, less the metrics that `GlobalMetrics` computes."""
    if not areas:
        return params
    left = [name for name in wanted if name not in areas]
    changed = {**params, "eval_metric": left}
    return changed if left else {**changed, "disable_default_eval_metric": 1}


def in_order(wanted: Sequence[str], found: Sequence[str], areas: Sequence[str]) -> list[str]:
    """The metrics found, in the order of ``eval_metric``; then the user's own.

    >>> in_order(["auc", "error@0.5", "logloss"], ["error", "logloss", "auc", "mine"], ["auc"])
    ['auc', 'error', 'logloss', 'mine']
    """
    others = iter([name for name in found if name not in areas])  # XGBoost renames some: "error@0.5" is "error"
    ordered = [name if name in areas else next(others, "") for name in dict.fromkeys(wanted)]
    return [name for name in [*ordered, *others] if name in found]
