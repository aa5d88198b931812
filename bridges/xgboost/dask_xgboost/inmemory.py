"""Rows in memory as collections, their blocks laid on few workers."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import dask
import numpy as np
from distributed import Client

from dask_bridges import clients
from dask_bridges.errors import DataError
from dask_xgboost.blocks import as_array
from dask_xgboost.places import Places
from dask_xgboost.sets import Rows
from dask_xgboost.steps import Steps

__all__ = ["next_turn", "on_workers"]

#: Rows in memory make a partition of their own from this number on, up to one a worker.
ROWS_A_PARTITION = 25_000

_turns = itertools.count()


def on_workers(client: Client, rows: Rows, turn: int, places: Places) -> Steps:
    """The rows as collections; those in memory are cut in few blocks that are sent to a worker each.

    Parameters
    ----------
    client : distributed.Client
    rows : Rows
        With numbers for labels, and of equal lengths.
    turn : int
        Which worker is the first; see `next_turn`.
    places : Places
        Which workers.
    """
    if rows.lazy():
        return rows
    X, fields = _features(rows), {name: _numbers(as_array(value)) for name, value in rows.fields.items()}
    workers = yield clients.call(client, places.usable, client)
    edges = _edges(X.shape[0], places.n_workers or len(workers), fields.get("qid"))
    held: dict[str, list[Any]] = {"X": [], **{name: [] for name in fields}}
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        worker = workers[(turn + number) % len(workers)].address
        blocks = [X[start:stop], *(values[start:stop] for values in fields.values())]
        futures = yield client.scatter(blocks, workers=[worker], hash=False)
        for name, future in zip(held, futures):
            held[name].append(future)
    lazy = {name: _array(fields[name], held[name], edges) for name in fields}
    return dataclasses.replace(rows, X=_collection(X, held["X"], edges), **lazy)


def next_turn() -> int:
    """Trainings at the same time, those of a search, begin with different workers."""
    return next(_turns)


def _features(rows: Rows) -> Any:
    """A pandas dataframe, a CSR matrix or a numeric array."""
    import scipy.sparse

    X = rows.X
    if not hasattr(X, "iloc") and hasattr(X, "to_pandas"):
        X = X.to_pandas()
    if scipy.sparse.issparse(X):
        return X.tocsr()
    if not hasattr(X, "iloc"):
        X = _numbers(np.asarray(X))
    if X.ndim != 2:
        raise DataError(f"{rows.name('X')} has {X.ndim} dimensions; rows and features, so two, are wanted")
    return X


def _numbers(values: Any) -> Any:
    """Objects as numbers, which they are to be."""
    return values.astype("float64") if values.dtype == object else values


def _edges(rows: int, workers: int, qid: Any) -> list[int]:
    """Where blocks begin and end; query groups that are in order stay whole."""
    parts = max(1, min(workers, rows // ROWS_A_PARTITION))
    edges = [rows * part // parts for part in range(parts + 1)]
    if qid is not None and parts > 1 and not (qid[1:] < qid[:-1]).any():
        edges = sorted({0, rows, *(int(np.searchsorted(qid, qid[edge])) for edge in edges[1:-1])})
    return edges


def _collection(X: Any, futures: list[Any], edges: list[int]) -> Any:
    if not hasattr(X, "iloc"):
        return _array(X, futures, edges)
    import dask.dataframe as dd

    return dd.from_delayed(futures, meta=X.iloc[:0], verify_meta=False)


def _array(values: Any, futures: list[Any], edges: list[int]) -> Any:
    import dask.array as da

    shapes = [(stop - start, *values.shape[1:]) for start, stop in itertools.pairwise(edges)]
    blocks = [da.from_delayed(dask.delayed(future), shape, meta=values[:0]) for future, shape in zip(futures, shapes)]
    return da.concatenate(blocks) if len(blocks) > 1 else blocks[0]
