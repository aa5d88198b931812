"""The rank's side of a cross-validation: one matrix, of which each booster sees the rows of other folds.

A booster's predictions for the rows left out, which XGBoost makes as it goes, are those that are evaluated. What
a user's objective gives for rows left out is set to 0.

Of XGBoost these names that are not public are used: `xgboost.training._PackedBooster`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xgboost as xgb
from xgboost.training import _PackedBooster

from dask_bridges.member import Member
from dask_xgboost.metrics import in_order
from dask_xgboost.sides import Side

__all__ = ["History", "Newest", "Run", "cross_validate"]

#: ``{"train-logloss-mean": [value, ...], ...}``, as of `xgboost.cv`.
History = dict[str, list[float]]

#: Mean and standard deviation after a round, by the name of the side and the metric.
Newest = dict[tuple[str, str], tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """What `xgboost.cv` is told beside the folds.

    Attributes
    ----------
    rounds : int
    params : dict
    wanted : list of str
        The names of ``eval_metric``.
    callbacks : sequence of TrainingCallback
    obj : callable or None
    metrics : GlobalMetrics or None
        Those that are functions.
    agreed : callable
        Whether all ranks end, since one does.
    """

    rounds: int
    params: dict[str, Any]
    wanted: list[str]
    callbacks: Sequence[Any]
    obj: Any
    metrics: Any
    agreed: Callable[[bool], bool]


class _Fold:
    """One booster, as `_PackedBooster` wants it."""

    def __init__(self, run: Run, matrix: Any, sides: dict[str, Side]) -> None:
        self.bst = xgb.Booster(run.params, [matrix])
        self._run, self._matrix, self._sides = run, matrix, sides
        self._side = sides["train"]
        self._evaluated = False

    def update(self, iteration: int, fobj: Any) -> None:
        """Boost once."""
        seen = self._sides["train"]
        self._matrix.set_info(**seen.to_boost())
        self.bst.update(self._matrix, iteration, fobj and functools.partial(_left_out, fobj, seen.mask))

    def values(self, iteration: int) -> dict[tuple[str, str], float]:
        """Those of all metrics, by the name of the side and their own, in the user's order."""
        metrics, found = self._run.metrics, {}
        if not self._evaluated and (before := self._side.before_all()):
            self._matrix.set_info(**before)
            self.bst.eval_set([(self._matrix, "none")], iteration)
        self._evaluated = True
        for name, side in self._sides.items():
            self._matrix.set_info(**side.to_evaluate())
            line = self.bst.eval_set([(self._matrix, name)], iteration)
            parts = (part.removeprefix(f"{name}-").rsplit(":", 1) for part in line.split("\t")[1:])
            values = {metric: side.true(metric, float(value)) for metric, value in parts}
            if metrics is not None:
                self._side = side
                metrics.model = self  # may ask for margins, of these rows
                predictions = self.predict(None, output_margin=callable(self._run.obj))
                values |= dict(metrics(predictions, side.proxy))
            for metric in in_order(self._run.wanted, list(values), () if metrics is None else metrics.areas):
                found[name, metric] = float(values[metric])
        return found

    def predict(self, rows: Any, *, output_margin: bool) -> Any:
        """Of the rows that are evaluated now, whichever matrix stands for them."""
        return self.bst.predict(self._matrix, training=False, output_margin=output_margin)[self._side.mask]

    def num_boosted_rounds(self) -> int:
        """Rounds so far."""
        return int(self.bst.num_boosted_rounds())


def _left_out(obj: Callable[..., Any], mask: Any, predictions: Any, matrix: Any) -> tuple[Any, Any]:
    """What a user's objective says, and nothing of the rows left out, whether it heeds weights or not."""
    return tuple(np.where(mask.reshape(-1, *[1] * (np.ndim(each) - 1)), each, 0) for each in obj(predictions, matrix))  # type: ignore[return-value]


def cross_validate(
    member: Member,
    matrix: Any,
    sides: Sequence[dict[str, Side]],
    run: Run,
    tell: Callable[[int, Newest], None],
) -> History:
    """Boost all folds of one set of parameters, round by round; their metrics, as of `xgboost.cv`."""
    before = {name: matrix.get_float_info(name) for name in sides[0]["train"].to_evaluate()}
    packed = _PackedBooster([_Fold(run, matrix, each) for each in sides])
    callbacks = [copy.deepcopy(callback) for callback in run.callbacks]
    log: dict[str, dict[str, list[tuple[float, float]]]] = {}
    kept = run.rounds
    try:
        for callback in callbacks:
            callback.before_training(packed)
        for number in range(run.rounds):
            member.check()
            if run.agreed(any(callback.before_iteration(packed, number, log) for callback in callbacks)):
                break
            packed.update(number, run.obj)
            newest = _means([fold.values(number) for fold in packed.cvfolds])
            for (name, metric), both in newest.items():
                log.setdefault(name, {}).setdefault(metric, []).append(both)
            tell(number, newest)
            ended = run.agreed(any(callback.after_iteration(packed, number, log) for callback in callbacks))
            if ended and (best := packed.attr("best_iteration")) is not None:
                kept = int(best) + 1
            if ended or run.agreed(member.finishing):
                break
        for callback in callbacks:
            callback.after_training(packed)
    finally:
        matrix.set_info(**before)
    columns = [(name, metric, values[:kept]) for name, metrics in log.items() for metric, values in metrics.items()]
    return {
        f"{name}-{metric}-{what}": [both[index] for both in values]
        for name, metric, values in columns
        for index, what in enumerate(("mean", "std"))
    }


def _means(of_folds: Sequence[dict[tuple[str, str], float]]) -> Newest:
    """Mean and standard deviation over the folds."""
    return {
        key: (float(np.mean(values)), float(np.std(values)))
        for key, values in ((key, [found[key] for found in of_folds]) for key in of_folds[0])
    }
