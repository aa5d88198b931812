"""A rank's part of a matrix, built from one block at a time of its worker's store."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import xgboost as xgb

from dask_bridges import partitions
from dask_bridges.partitions.blocks import size_of
from dask_bridges.task import WorkerMember
from dask_xgboost.blocks import as_array, recode, split
from dask_xgboost.dmatrix import MatrixSpec

__all__ = ["build"]


class _Blocks(xgb.DataIter):  # type: ignore[misc]
    """Feeds XGBoost the blocks of this rank. XGBoost reads them four times."""

    def __init__(self, member: WorkerMember, spec: MatrixSpec, empty: Any) -> None:
        self.member = member
        self.spec = spec
        self.empty = empty
        self.seconds = 0.0
        self.prototype: Any = None
        self._position = 0
        super().__init__(release_data=True)

    def reset(self) -> None:
        """Start over."""
        self._position = 0

    def next(self, input_data: Callable[..., Any]) -> bool:
        """Hand over the next block; an empty one where this rank has no rows."""
        self.member.check()
        if self._position >= max(1, len(self.spec.keys)):
            return False
        start = time.perf_counter()
        if self.spec.keys:
            X, fields = self._block(self.spec.keys[self._position])
        else:
            X, fields = self.empty, {}
        took = time.perf_counter() - start
        self.seconds += took
        self._position += 1
        self._count(X, took)
        input_data(data=X, feature_names=self.spec.feature_names, feature_types=self.spec.feature_types, **fields)
        return True

    def _count(self, X: Any, took: float) -> None:
        """Tell what is read, where somebody wants to know."""
        tally = self.member.tally
        if tally.wanted:
            tally.tell("build")
            tally.add("receive", took)
            tally.fed(partitions.rows_of(X), size_of(X))

    def _block(self, key: Any) -> tuple[Any, dict[str, Any]]:
        X, fields = split(partitions.take(self.member.worker, key), dict(self.spec.columns))
        X = recode(X, self.spec.categories)
        if self.prototype is None:
            self.prototype = X[:0].copy()  # a view of a received buffer may be misaligned
        ready = {name: as_array(values) for name, values in fields.items() if name != "qid"}
        if "qid" in fields:
            qid = np.asarray(fields["qid"])
            order = np.argsort(qid, kind="stable")
            if not (order[1:] > order[:-1]).all():
                X = X.iloc[order] if hasattr(X, "iloc") else X[order]
                ready = {name: values[order] for name, values in ready.items()}
            # A weight counts for its whole group, and XGBoost wants one a group.
            if "weight" in ready:
                _, first = np.unique(qid[order], return_index=True)
                ready["weight"] = ready["weight"][first]
            ready["qid"] = qid[order]
        return X, ready


def build(
    member: WorkerMember, spec: MatrixSpec, *, max_bin: int, nthread: int, ref: Any = None, empty: Any = None
) -> tuple[Any, Any]:
    """Bin the blocks of this rank.

    Parameters
    ----------
    member : Member
    spec : MatrixSpec
    max_bin, nthread : int
        As in `xgboost.QuantileDMatrix`.
    ref : xgboost.QuantileDMatrix, optional
        The training matrix, whose cuts an evaluation matrix shares.
    empty : optional
        A block of no rows, used where this rank holds none.

    Returns
    -------
    matrix : xgboost.QuantileDMatrix
    prototype
        A block of no rows of the same kind, None where there was no block.
    """
    options = spec.options
    blocks = _Blocks(member, spec, empty)
    member.tally.begin()
    with member.span("build"):
        matrix = xgb.QuantileDMatrix(
            blocks,
            missing=options.missing,
            nthread=nthread,
            max_bin=max_bin,
            ref=ref,
            enable_categorical=options.enable_categorical,
        )
        member.tally.tell("build", now=True)
    member.emit_span("receive", blocks.seconds)
    if options.feature_weights is not None:
        matrix.set_info(feature_weights=np.asarray(options.feature_weights))
    return matrix, blocks.prototype
