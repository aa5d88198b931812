"""How rows are left out of a matrix: those that a booster does not see, and those that it is not evaluated on.

Rows are left out by a weight of 0, which takes them out of XGBoost's sums. So no row is copied, or binned twice.

Of query groups XGBoost scales the weights to a mean of 1, those of 0 too. So a group is left out by labels that are all
alike, in which there is nothing to rank, and has the mean weight of the others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import xgboost as xgb

from dask_bridges.member import Member
from dask_xgboost.communicator import apart
from dask_xgboost.folds import Folds
from dask_xgboost.gathering import all_gather

__all__ = ["Side", "sides_of"]

#: What a matrix knows of its rows beside their features and weights.
_FIELDS = ("label", "label_lower_bound", "label_upper_bound", "base_margin")


class Side:
    """The rows that a booster is evaluated on: those it has seen, or those it has not."""

    def __init__(self, matrix: Any, mask: Any) -> None:
        weight = matrix.get_weight()
        self.mask = mask
        self.weight = mask.astype("float32") if not weight.size else np.where(mask, weight, np.float32(0))
        #: For metrics that are functions: a matrix of these rows alone, without features.
        self.proxy: Any = None

    def to_boost(self) -> dict[str, Any]:
        """What the matrix is to hold where a booster sees these rows."""
        return {"weight": self.weight}

    def to_evaluate(self) -> dict[str, Any]:
        """What it is to hold where a booster is evaluated on them."""
        return {"weight": self.weight}

    def before_all(self) -> dict[str, Any]:
        """What the matrix is to hold when a booster is evaluated on it the first time, to no purpose but that."""
        return {}

    def true(self, metric: str, value: float) -> float:
        """What XGBoost would give, had it these rows alone."""
        return value

    def rows_of(self, matrix: Any) -> Any:
        """A matrix of these rows, without features."""
        proxy = xgb.DMatrix(np.zeros((int(self.mask.sum()), 1), dtype="float32"), nthread=1)
        for name in _FIELDS:
            values = matrix.get_float_info(name)
            if values.size:
                proxy.set_info(**{name: values.reshape(len(self.mask), -1)[self.mask].squeeze()})
        self._weigh(proxy, matrix)
        return proxy

    def _weigh(self, proxy: Any, matrix: Any) -> None:
        if matrix.get_weight().size:
            proxy.set_weight(self.weight[self.mask])


class _Groups(Side):
    """Query groups that a booster is evaluated on, of which there are some on each rank."""

    def __init__(self, matrix: Any, groups: Any) -> None:
        self.sizes, self.groups, self.labels = np.diff(matrix.get_uint_info("group_ptr")), groups, matrix.get_label()
        super().__init__(matrix, groups)
        self.mask = np.repeat(groups, self.sizes)
        self.given = matrix.get_weight() if matrix.get_weight().size else np.ones(len(groups), dtype="float32")
        numbers = np.repeat(np.arange(len(self.sizes)), self.sizes)
        self._relevant = np.bincount(numbers, self.labels != 0, len(self.sizes)) > 0
        #: Of all ranks: how many groups that are evaluated have no relevant rows, and what all evaluated ones weigh.
        self.idle, self.total = 0.0, 1.0

    def counts(self) -> tuple[float, float]:
        """`idle` and `total` of this rank."""
        return float((self.groups & ~self._relevant).sum()), float(self.weight.sum())

    def to_boost(self) -> dict[str, Any]:
        """Labels in which groups left out have nothing to rank, and the weights that XGBoost scales as without them."""
        mean = self.given[self.groups].mean() if self.groups.any() else 1
        weight = np.where(self.groups, self.given, mean).astype("float32")
        return {"label": np.where(self.mask, self.labels, np.float32(0)), "weight": weight}

    def to_evaluate(self) -> dict[str, Any]:
        """All labels: XGBoost keeps what it knows of them from the first evaluation."""
        return {"label": self.labels, "weight": self.weight}

    def before_all(self) -> dict[str, Any]:
        """Some rows of each group are relevant.

        XGBoost's ndcg of a group without any is 1, whatever it weighs, so that such a group would not be left out.
        Taken for one that has some it is 0.
        """
        return {
            "label": np.where(np.repeat(self._relevant, self.sizes), self.labels, np.float32(1)),
            "weight": self.given,
        }

    def true(self, metric: str, value: float) -> float:
        """With the 1 of each group without relevant rows; a name that ends in a minus has them as 0."""
        return value + self.idle / self.total if metric.startswith("ndcg") and not metric.endswith("-") else value

    def _weigh(self, proxy: Any, matrix: Any) -> None:
        if self.groups.any():
            proxy.set_group(self.sizes[self.groups])
        if matrix.get_weight().size:
            proxy.set_weight(self.weight[self.groups])


def sides_of(
    member: Member, matrix: Any, folds: Folds, pairs: Sequence[tuple[Any, Any]], *, proxied: bool
) -> list[dict[str, Side]]:
    """What each booster is evaluated on, by name; `proxied` where metrics are functions."""
    kind = _Groups if folds.grouped else Side
    sides = [{name: kind(matrix, mask) for name, mask in zip(("train", "test"), pair)} for pair in pairs]
    each = [side for both in sides for side in both.values()]
    if groups := [side for side in each if isinstance(side, _Groups)]:
        counts = np.array([side.counts() for side in groups]).ravel()
        of_all = all_gather(counts).reshape(-1, len(groups), 2).sum(axis=0)
        for one, (idle, total) in zip(groups, of_all):
            one.idle, one.total = idle, total
    if proxied:
        for side in each:
            side.proxy = apart(member, functools.partial(side.rows_of, matrix))
    return sides
