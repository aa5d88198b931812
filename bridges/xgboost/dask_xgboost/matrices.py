"""A rank's part of a matrix, built from one block at a time of its worker's store, or of files that its child reads."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import xgboost as xgb

from dask_bridges import partitions
from dask_bridges.member import Member
from dask_bridges.partitions.blocks import size_of
from dask_bridges.processes.inputs import Inputs
from dask_bridges.task import worker_of
from dask_xgboost import cuts
from dask_xgboost.blocks import as_array, recode, split
from dask_xgboost.external import ExternalMatrix, cache_folder
from dask_xgboost.gathering import all_gather
from dask_xgboost.matrixspec import MatrixSpec
from dask_xgboost.quantiles import Collected, compress_all, quantiles, summarise

__all__ = ["FOLDER", "Binning", "build", "common_cuts"]

#: The descriptor by which a rank in a child process knows the folder of its partitions, and where that is.
FOLDER = 250
FEEDS = f"/proc/self/fd/{FOLDER}"

#: Bytes of summaries: with more, ranks bring theirs down to as much as one block's.
_GATHERED = 1 << 26

#: Bytes of summaries that are gathered, and merged, at a time.
_PIECE = 1 << 24


@dataclass(frozen=True)
class Binning:
    """How columns are binned: `max_bin` bins, found by `nthread` threads of a rank."""

    max_bin: int
    nthread: int


def _block(member: Member, spec: MatrixSpec, key: Any) -> tuple[Any, dict[str, Any]]:
    """Features and fields as XGBoost takes them, groups together."""
    if isinstance(key, Inputs):
        (part,) = key.open(FEEDS)
    else:
        part = partitions.take(worker_of(member), key, aside=bool(spec.options.external_memory))
    X, fields = split(part, dict(spec.columns))
    X = recode(X, spec.categories)
    ready = {name: as_array(values) for name, values in fields.items() if name != "qid"}
    if "qid" in fields:
        qid = np.asarray(fields["qid"]).reshape(-1)
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


class _Blocks(xgb.DataIter):  # type: ignore[misc]
    """Feeds XGBoost the blocks of this rank.

    XGBoost reads them four times, and three with a reference; in external memory once less.
    """

    def __init__(self, member: Member, spec: MatrixSpec, empty: Any, cache: str | None) -> None:
        self.member = member
        self.spec = spec
        self.empty = empty
        self.seconds = 0.0
        self.prototype: Any = None
        self._position = 0
        super().__init__(cache_prefix=cache, release_data=True)

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
            X, fields = _block(self.member, self.spec, self.spec.keys[self._position])
            if self.prototype is None:
                self.prototype = X[:0].copy()  # a view of a received buffer may be misaligned
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


def build(member: Member, spec: MatrixSpec, binning: Binning, *, ref: Any = None, empty: Any = None) -> tuple[Any, Any]:
    """Bin the blocks of this rank.

    Parameters
    ----------
    member : Member
    spec : MatrixSpec
    binning : Binning
    ref : xgboost.DMatrix, optional
        Whose cuts are used. Without, ranks find them together, by XGBoost's sketch.
    empty : optional
        A block of no rows, used where this rank holds none.

    Returns
    -------
    matrix : xgboost.QuantileDMatrix, or ExternalMatrix where the options say so
    prototype
        A block of no rows of the same kind, None where there was no block.
    """
    options = spec.options
    folder = cache_folder(member, options.external_memory) if options.external_memory else None
    kind = xgb.QuantileDMatrix if folder is None else functools.partial(ExternalMatrix, folder)
    blocks = _Blocks(member, spec, empty, None if folder is None else str(folder.path / "bins"))
    member.tally.begin()
    with member.span("build"):
        matrix = kind(
            blocks,
            missing=options.missing,
            nthread=binning.nthread,
            max_bin=binning.max_bin,
            ref=ref,
            enable_categorical=options.enable_categorical,
        )
        member.tally.tell("build", now=True)
    member.emit_span("receive", blocks.seconds)
    if options.feature_weights is not None:
        matrix.set_info(feature_weights=np.asarray(options.feature_weights))
    return matrix, blocks.prototype


def common_cuts(member: Member, spec: MatrixSpec, binning: Binning) -> dict[int, Any]:
    """The left edges of bins, by column, at the quantiles of the rows of all ranks, which find them together.

    The rank of each is within a ``1 / (4 * max_bin)`` of the exact one. They do not depend on where blocks lie,
    unless there are so many that each rank summarises its own.
    """
    points = 6 * binning.max_bin  # a half of a part is lost on either side of a value, and in a bin
    found = Collected(points, _PIECE if spec.options.external_memory else _GATHERED)
    with member.span("build"):
        for key in spec.keys:
            member.check()
            X, fields = _block(member, spec, key)
            weight = _row_weight(fields)
            found.add(summarise(X, points=points, missing=spec.options.missing, weight=weight, nthread=binning.nthread))
        types = cuts.types(spec) or ()
        coded = {number for number, kind in enumerate(types) if kind == "c"}
        edges: dict[int, Any] = {}
        for summaries in _gathered(found.each(), spec.num_features, points):
            edges |= quantiles(summaries, binning.max_bin, coded)
    return edges


def _row_weight(fields: dict[str, Any]) -> Any:
    """Weights by row, also where groups have them."""
    weight = fields.get("weight")
    if weight is None or "qid" not in fields:
        return weight
    return np.repeat(weight, np.unique(fields["qid"], return_counts=True)[1])


def _gathered(found: list[Any], columns: int, points: int) -> Iterator[Any]:
    """The summaries of all ranks, of some columns at a time."""
    total = all_gather(np.array([sum(each.nbytes for each in found)])).sum()
    own = compress_all(found, points) if total > _GATHERED else np.concatenate(found)
    if total > _GATHERED:
        total = all_gather(np.array([own.nbytes])).sum()
    for some in np.array_split(np.arange(columns), max(1, -(-total // _PIECE))):
        mine = own[(own["column"] >= some[0]) & (own["column"] <= some[-1])] if len(some) < columns else own
        yield all_gather(mine.view("int64")).view(own.dtype)
