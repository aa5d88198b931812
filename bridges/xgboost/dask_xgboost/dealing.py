"""The folds of a cross-validation, as they are asked for: held against the rows that there are, and dealt to ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from distributed import Client

from dask_bridges.errors import DataError
from dask_xgboost.dmatrix import DMatrix
from dask_xgboost.folds import Block, Folds
from dask_xgboost.metrics import metric_names

__all__ = ["Asked"]


@dataclass
class Asked:
    """The folds that were asked for.

    Attributes
    ----------
    params : sequence of dict
    number : int
    stratified : bool
    given
        Pairs of positions (or ids of query groups), or a splitter of scikit-learn; None to deal rows out.
    shuffle : bool
    seed : int
    """

    params: Sequence[dict[str, Any]]
    number: int
    stratified: bool
    given: Any
    shuffle: bool
    seed: int
    _pairs: list[tuple[Any, Any]] = field(default_factory=list)

    async def settle(self, client: Client, matrix: DMatrix) -> None:
        """Hold what was asked for against the rows that there are.

        Raises
        ------
        DataError
            If it does not fit.
        """
        units, what = matrix.rows, "rows"
        if matrix.has("qid"):
            _check_groups(self.params, self.stratified)
            units, what = len(ids := np.concatenate(_ids(matrix))), "query groups"
        if self.given is None:
            if isinstance(self.number, bool) or not 2 <= self.number <= units:
                raise DataError(f"nfold={self.number!r}: give a whole number from 2 to the {units} {what}")
            return
        if self._pairs:  # what was given may be an iterator, or draw anew: after a loss the folds are those of before
            return
        pairs = self.given
        if matrix.has("qid"):
            pairs = _split_groups(pairs, np.sort(ids)) if hasattr(pairs, "split") else pairs
            self._pairs = [(_among(train, ids), _among(test, ids)) for train, test in pairs]
        else:
            if hasattr(pairs, "split"):
                rows = np.zeros((matrix.rows, 1))
                pairs = pairs.split(rows, await client.gather(client.compute(matrix.labels())))
            self._pairs = [(_positions(train, matrix.rows), _positions(test, matrix.rows)) for train, test in pairs]
        if not self._pairs:
            raise DataError("folds is empty: give pairs (train, test), of positions of rows or ids of query groups")

    def on(self, matrix: DMatrix, worker: str) -> Folds:
        """What the rank on a worker is told."""
        grouped = matrix.has("qid")
        lengths = [len(ids) for ids in _ids(matrix)] if grouped else matrix.parts.rows
        starts = np.concatenate([[0], np.cumsum(lengths)])
        blocks = tuple(
            Block(part, int(starts[part]), int(starts[part + 1])) for part, _ in matrix.parts.rows_by_part(worker)
        )
        here = np.concatenate([np.arange(block.start, block.stop) for block in blocks])
        given = tuple(
            (np.packbits(train[here]).tobytes(), np.packbits(test[here]).tobytes()) for train, test in self._pairs
        )
        number = len(self._pairs) or self.number
        return Folds(
            tuple(self.params),
            number,
            int(starts[-1]),
            blocks,
            self.stratified,
            self.shuffle,
            self.seed,
            given,
            grouped,
        )


def _ids(matrix: DMatrix) -> list[Any]:
    """Of the query groups, by partition, in the order in which ranks have them."""
    return [np.empty(0, "int64") if info.groups is None else info.groups for info in matrix.infos]


def _check_groups(sets: Sequence[dict[str, Any]], stratified: bool) -> None:
    """Refuse what is not evaluated by query groups."""
    if stratified:
        raise DataError("stratified deals out the rows of each label, and X has query groups, which stay whole")
    for params in sets:
        if not str(params.get("objective", "")).startswith("rank:"):
            raise DataError(
                f"X has query groups, which are cross-validated with the objectives rank:ndcg, rank:map and "
                f"rank:pairwise, not with {params.get('objective')!r}"
            )
        others = [name for name in metric_names(params) if not name.startswith(("ndcg", "map", "pre"))]
        if others:
            raise DataError(
                f"X has query groups, of which XGBoost cannot leave any out of {', '.join(others)}: use ndcg, map or "
                "pre, or a function (custom_metric)"
            )


def _split_groups(splitter: Any, ids: Any) -> Any:
    """What a splitter of scikit-learn makes of the ids of groups, in order."""
    return [(ids[train], ids[test]) for train, test in splitter.split(np.zeros((len(ids), 1)))]


def _among(wanted: Any, ids: Any) -> Any:
    """Ids of groups as a mask."""
    wanted = np.asarray(wanted)
    unknown = np.setdiff1d(wanted, ids)
    if wanted.ndim != 1 or not len(wanted) or len(unknown):
        raise DataError(f"folds has ids of query groups that X has not, or none: {unknown.tolist()}")
    return np.isin(ids, wanted)


def _positions(rows: Any, total: int) -> Any:
    """Positions of rows as a mask."""
    rows = np.asarray(rows)
    if rows.dtype == bool and rows.shape == (total,):
        return rows
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or not len(rows) or rows.min() < 0 or rows.max() >= total:
        raise DataError(f"folds has positions of rows that are not between 0 and {total - 1}, or none: {rows!r}")
    mask = np.zeros(total, dtype=bool)
    mask[rows] = True
    return mask
