"""The matrices of a rank: what is there from an earlier training, and what is built now, with the same cuts on all."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from xgboost import collective

from dask_bridges.member import Member
from dask_bridges.task import worker_of
from dask_xgboost import cuts
from dask_xgboost.communicator import apart
from dask_xgboost.gathering import all_gather
from dask_xgboost.matrices import Binning, build, common_cuts
from dask_xgboost.matrixspec import MatrixSpec
from dask_xgboost.resident import Built, offered

__all__ = ["Agreed", "MatricesSpec", "agree", "ready"]


@dataclass(frozen=True)
class MatricesSpec:
    """What a rank is told of its matrices.

    Attributes
    ----------
    each : tuple of MatrixSpec
        The training set, and the evaluation sets that are others.
    max_bin : int
    quantiles : bool
        Whether cuts are at the quantiles of all rows, and not where XGBoost's sketch says.
    cuts : tuple of ndarray or None
        Those of before, where rows are elsewhere now.
    resident : bool
        Whether some rank may have some of them.
    """

    each: tuple[MatrixSpec, ...]
    max_bin: int
    quantiles: bool
    cuts: tuple[Any, Any] | None = None
    resident: bool = False


@dataclass(frozen=True)
class Agreed:
    """What all ranks know of each other's matrices.

    Attributes
    ----------
    had : ndarray of bool
        Shape (ranks, matrices): what is there and does not have to be built.
    lacking : list of tuple of int
        Rank and matrix, of which there is neither what was built nor the partitions; then nothing can be trained.
    edges, cuts
        Of the training matrix where some rank has it and some has not: one of them, as far as they can be had.
    """

    had: Any
    lacking: list[tuple[int, int]]
    edges: dict[int, Any] | None = None
    cuts: tuple[Any, Any] | None = None


def agree(member: Member, spec: MatricesSpec, held: Sequence[Built | None]) -> Agreed:
    """Tell the other ranks what is held here, and hear what they hold."""
    number = len(spec.each)
    if not spec.resident:
        return Agreed(np.zeros((member.world_size, number), dtype=bool), [])
    train, *others = held
    code = 0 if train is None else train.checksum()
    mine = [code, *(other is not None and other.checksum() == code for other in others)]
    there = [each.there(worker_of(member)) for each in spec.each]
    of_all = all_gather(np.array([*mine, *there], dtype="int64")).reshape(member.world_size, -1)
    had, partitions = of_all[:, :number] != 0, of_all[:, number:] != 0
    had &= had[:, :1]  # evaluation sets are binned as the training set is
    if len(np.unique(of_all[had[:, 0], 0])) > 1:
        had[:] = False
    edges = before = None
    if had[:, 0].any() and not had[:, 0].all():
        root = int(had[:, 0].argmax())
        edges, before = collective.broadcast(_recipe(member, spec, train) if member.rank == root else None, root)
        if edges is None and before is None:
            had[:] = False
    lacking = [(int(rank), int(matrix)) for rank, matrix in np.argwhere(~had & ~partitions)]
    return Agreed(had, lacking, edges, before)


def _recipe(member: Member, spec: MatricesSpec, train: Built | None) -> tuple[Any, Any]:
    """The edges of a matrix, or else its cuts, if these can be had again."""
    assert train is not None
    if train.edges is not None:
        return train.edges, None
    found = train.matrix.get_quantile_cut()
    types = cuts.types(spec.each[0])
    again = apart(member, lambda: cuts.reference(found, spec.max_bin, types))
    return None, None if again is None else found


def ready(member: Member, spec: MatricesSpec, agreed: Agreed, held: Sequence[Built | None], nthread: int) -> list[Any]:
    """The matrices, of which those that are not there are built, and left to the client where it wants them."""
    binning = Binning(spec.max_bin, nthread)
    found = [built if there else None for built, there in zip(held, agreed.had[member.rank])]
    train = found[0]
    if train is None:
        reference, edges = _reference(member, spec, agreed, binning)
        one = functools.partial(build, member, spec.each[0], binning, ref=reference)
        matrix, prototype = one() if reference is None else apart(member, one)
        train = Built(matrix, prototype, edges)
        _leave(member, spec.each[0], train)
    matrices = [train.matrix]
    for each, other in zip(spec.each[1:], found[1:]):
        if other is None:
            one = functools.partial(build, member, each, binning, ref=train.matrix, empty=train.prototype)
            other = Built(*apart(member, one))
            _leave(member, each, other)
        matrices.append(other.matrix)
    return matrices


def _leave(member: Member, spec: MatrixSpec, built: Built) -> None:
    if spec.token is not None:
        offered(member, spec.token, built)


def _reference(
    member: Member, spec: MatricesSpec, agreed: Agreed, binning: Binning
) -> tuple[Any, dict[int, Any] | None]:
    """What to bin the training set against, and the edges of its bins; None where XGBoost's sketch finds cuts."""
    train = spec.each[0]
    types = cuts.types(train)
    edges, before = agreed.edges, spec.cuts if agreed.cuts is None else agreed.cuts
    if edges is None and before is not None:
        reference = apart(member, lambda: cuts.reference(before, binning.max_bin, types))
        if reference is not None:
            return reference, None
        if not member.rank:
            member.log("the cut points are found anew: those of before cannot be had from a reference", logging.WARNING)
    if edges is None and spec.quantiles:
        edges = common_cuts(member, train, binning)
    if edges is None:
        return None, None
    known = edges
    return apart(member, lambda: cuts.reference_of(known, train.num_features, binning.max_bin, types)), edges
