"""The rank's side of a cross-validation: one matrix, of which each booster sees the rows of other folds.

Rows are left out by a weight of 0, which takes them out of XGBoost's sums; what a user's objective gives for them
is set to 0. So no row is copied, or binned twice, and a booster's predictions for the rows left out, which XGBoost
makes as it goes, are those that are evaluated.

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
from dask_xgboost.communicator import apart
from dask_xgboost.metrics import in_order

__all__ = ["Block", "Folds", "History", "Newest", "Run", "cross_validate", "masks", "sides_of"]

#: ``{"train-logloss-mean": [value, ...], ...}``, as of `xgboost.cv`.
History = dict[str, list[float]]

#: Mean and standard deviation after a round, by the name of the side and the metric.
Newest = dict[tuple[str, str], tuple[float, float]]

#: What a matrix knows of its rows beside their features and weights.
_FIELDS = ("label", "label_lower_bound", "label_upper_bound", "base_margin")


@dataclass(frozen=True)
class Block:
    """Where the rows of a partition are among all.

    Attributes
    ----------
    part : int
    start, stop : int
        Of its rows.
    """

    part: int
    start: int
    stop: int


@dataclass(frozen=True)
class Folds:
    """What a rank is told of the folds.

    Attributes
    ----------
    params : tuple of dict
        Sets of parameters, one after the other.
    number : int
    rows : int
        Of all ranks.
    blocks : tuple of Block
        Of this rank.
    stratified, shuffle : bool
    seed : int
    given : tuple of (bytes, bytes), optional
        The rows of this rank that each booster sees, and those it is evaluated on, as packed bits.
    """

    params: tuple[dict[str, Any], ...]
    number: int
    rows: int
    blocks: tuple[Block, ...]
    stratified: bool = False
    shuffle: bool = True
    seed: int = 0
    given: tuple[tuple[bytes, bytes], ...] = ()


def masks(folds: Folds, labels: Any) -> list[tuple[Any, Any]]:
    """For each booster, which rows of this rank it sees, and which it is evaluated on.

    They do not depend on where partitions lie.
    """
    total = sum(block.stop - block.start for block in folds.blocks)
    if folds.given:
        return [(_unpacked(train, total), _unpacked(test, total)) for train, test in folds.given]
    numbers, done = [np.empty(0, "int64")], 0
    for block in folds.blocks:
        rows = block.stop - block.start
        numbers.append(_numbers(folds, block, np.asarray(labels)[done : done + rows]))
        done += rows
    fold = np.concatenate(numbers)
    return [(fold != number, fold == number) for number in range(folds.number)]


def _unpacked(bits: bytes, rows: int) -> Any:
    return np.unpackbits(np.frombuffer(bits, dtype="uint8"), count=rows).astype(bool)


def _numbers(folds: Folds, block: Block, labels: Any) -> Any:
    """The fold of each row of a block."""
    positions = np.arange(block.start, block.stop)
    if not folds.shuffle and not folds.stratified:
        return positions * folds.number // folds.rows
    random = np.random.default_rng([folds.seed, block.part])
    order = random.permutation(len(positions)) if folds.shuffle else np.arange(len(positions))
    fold = np.empty(len(positions), dtype="int64")
    if not folds.stratified:
        fold[order] = positions % folds.number
        return fold
    first = random.integers(folds.number)  # a class of one row a block is not in the same fold everywhere
    for label in np.unique(labels):
        alike = order[labels[order] == label]
        fold[alike] = (first + np.arange(len(alike))) % folds.number
        first += len(alike)
    return fold


class _Side:
    """The rows that a booster is evaluated on: those it has seen, or those it has not."""

    def __init__(self, member: Member, matrix: Any, mask: Any, *, proxied: bool) -> None:
        weight = matrix.get_weight()
        self.mask = mask
        self.weight = mask.astype("float32") if not weight.size else np.where(mask, weight, np.float32(0))
        #: For metrics that are functions: a matrix of these rows alone, without features.
        self.proxy = apart(member, functools.partial(self._rows_of, matrix)) if proxied else None

    def _rows_of(self, matrix: Any) -> Any:
        proxy = xgb.DMatrix(np.empty((int(self.mask.sum()), 1), dtype="float32"), nthread=1)
        for name in _FIELDS:
            values = matrix.get_float_info(name)
            if values.size:
                proxy.set_info(**{name: values.reshape(len(self.mask), -1)[self.mask].squeeze()})
        if matrix.get_weight().size:
            proxy.set_weight(self.weight[self.mask])
        return proxy


def sides_of(member: Member, matrix: Any, pairs: Sequence[tuple[Any, Any]], *, proxied: bool) -> list[dict[str, _Side]]:
    """What each booster is evaluated on, by name; `proxied` where metrics are functions."""
    names = ("train", "test")
    return [{name: _Side(member, matrix, mask, proxied=proxied) for name, mask in zip(names, pair)} for pair in pairs]


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

    def __init__(self, run: Run, matrix: Any, sides: dict[str, _Side]) -> None:
        self.bst = xgb.Booster(run.params, [matrix])
        self._run, self._matrix, self._sides = run, matrix, sides
        self._side = sides["train"]

    def update(self, iteration: int, fobj: Any) -> None:
        """Boost once."""
        seen = self._sides["train"]
        self._matrix.set_info(weight=seen.weight)
        self.bst.update(self._matrix, iteration, fobj and functools.partial(_left_out, fobj, seen.mask))

    def values(self, iteration: int) -> dict[tuple[str, str], float]:
        """Those of all metrics, by the name of the side and their own, in the user's order."""
        metrics, found = self._run.metrics, {}
        for name, side in self._sides.items():
            self._matrix.set_info(weight=side.weight)
            line = self.bst.eval_set([(self._matrix, name)], iteration)
            values = dict(part.removeprefix(f"{name}-").rsplit(":", 1) for part in line.split("\t")[1:])
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
    sides: Sequence[dict[str, _Side]],
    run: Run,
    tell: Callable[[int, Newest], None],
) -> History:
    """Boost all folds of one set of parameters, round by round; their metrics, as of `xgboost.cv`."""
    before = matrix.get_weight()
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
        matrix.set_info(weight=before)
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
