"""Quantiles of every column, found block by block: exact ranks of a few values a block, merged over all blocks.

A summary of a block holds, for each column, so many of its values that no two of
them, one after the other, have more than a ``1 / points`` of the rows between them,
the least and the greatest included; and exactly how many rows are equal to each and
lie between them. Of large blocks values are counted in narrow bins, and the edges of
bins stand for values; at most a ``1 / (2 * points)`` of the rows is in one of them.
Merged, the rows between two values count half before and half behind what another
block has there, so that ranks are off by a ``1 / (2 * points)`` of all rows at most, or
by twice that where values were counted in bins.
Sums of whole numbers and halves are exact: the quantiles do not depend on where
blocks lie.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

__all__ = ["SUMMARY", "Collected", "compress", "compress_all", "quantiles", "summarise"]

#: A value of a column in a summary: the rows (or weight) equal to it, and those between it and the next one.
SUMMARY = np.dtype([("column", "int32"), ("value", "float32"), ("equal", "float64"), ("gap", "float64")])

#: Columns that are turned into rows, and sorted, at a time.
_TILE = 8

#: So many summaries of blocks at least become one, which is as large as four of them; and so many of those.
_AT_LEAST, _AGAIN = 12, 4

#: Bins in which the values of large blocks are counted.
_BINS = 1 << 15

_INF = np.array([-np.inf, np.inf], dtype="float32")


def summarise(X: Any, *, points: int, missing: float = np.nan, weight: Any = None, nthread: int = 1) -> Any:
    """Summarise the columns of a block as XGBoost sees them: float32, without missing and infinite values.

    Parameters
    ----------
    X : ndarray, scipy.sparse matrix or DataFrame
        Shape (rows, columns). Of a categorical column only the greatest code is of interest, and kept.
    points : int
        Values a column, about.
    missing : float
    weight : ndarray, optional
        Shape (rows,).
    nthread : int
        Columns are sorted by so many threads.

    Returns
    -------
    ndarray
        Of dtype `SUMMARY`, ordered by column and value.
    """

    def of_tile(tile: tuple[int, list[Any]]) -> list[Any]:
        first, columns = tile
        # What a worker frees it gives back, and page after page of new memory would take longer than the counting.
        room = np.empty(X.shape[0], "float32"), np.empty(X.shape[0], "int64")
        weigh = (
            functools.partial(_counted, room=room) if weight is None else functools.partial(_weighted, weight=weight)
        )
        return [weigh(first + number, column, rows, points) for number, (column, rows) in enumerate(columns)]

    tiles = _tiles(X, missing, with_rows=weight is not None, reuse=nthread == 1)
    if nthread == 1:
        found = [summary for tile in tiles for summary in of_tile(tile)]
    else:
        with ThreadPoolExecutor(nthread) as pool:
            found = [summary for summaries in pool.map(of_tile, tiles) for summary in summaries]
    return np.concatenate([np.empty(0, SUMMARY), *found])


def _tiles(X: Any, missing: float, *, with_rows: bool, reuse: bool) -> Iterator[tuple[int, list[Any]]]:
    """Some columns at a time, as pairs of what is not missing and, `with_rows`, the rows it is in.

    With `reuse`, those of an array are in the same memory each time.
    """
    if hasattr(X, "tocsc"):
        by_column = X.tocsc()
        for number in range(X.shape[1]):
            inside = slice(by_column.indptr[number], by_column.indptr[number + 1])
            values = by_column.data[inside].astype("float32")
            yield number, [_present(values, missing, by_column.indices[inside] if with_rows else None)]
        return
    rows = np.arange(X.shape[0]) if with_rows else None
    turned = np.empty((_TILE, X.shape[0]), "float32") if reuse and not hasattr(X, "iloc") else None
    for first in range(0, X.shape[1], _TILE):
        tile = X.iloc[:, first : first + _TILE] if hasattr(X, "iloc") else X[:, first : first + _TILE]
        yield first, [_present(column, missing, rows) for column in _turned(tile, turned)]


def _turned(tile: Any, room: Any) -> Any:
    """The columns of a tile as rows of a matrix of its own, or in what there is room."""
    if not hasattr(tile, "iloc"):
        if room is None:
            return np.array(tile.T, dtype="float32", order="C")
        np.copyto(room[: tile.shape[1]], tile.T, casting="unsafe")
        return room[: tile.shape[1]]
    columns = []
    for name in range(tile.shape[1]):
        column = tile.iloc[:, name]
        if column.dtype == "category":
            codes = column.cat.codes.to_numpy()
            columns.append(codes[codes == codes.max(initial=0)][:1].astype("float32"))
        else:
            columns.append(column.to_numpy(dtype="float32", na_value=np.nan, copy=True))
    return columns


def _present(values: Any, missing: float, rows: Any) -> tuple[Any, Any]:
    if not np.isnan(missing):
        values[values == np.float32(missing)] = np.nan
    if rows is None or len(rows) != len(values):
        return values, None
    there = np.isfinite(values)
    return values[there], rows[there]


def _counted(number: int, values: Any, rows: Any, points: int, *, room: tuple[Any, Any] | None = None) -> Any:
    """The summary of a column whose rows count one each."""
    del rows
    if room and len(values) > _BINS and (found := _in_bins(number, values, points, *room)) is not None:
        return found
    values.sort()  # missing ones to the end
    values = values[np.searchsorted(values, _INF[0], "right") : np.searchsorted(values, _INF[1])]
    steps = np.flatnonzero(values[1:] != values[:-1]) + 1 if len(values) else np.empty(0, "int64")
    if len(steps) < points:
        start = np.concatenate([[0], steps]) if len(values) else steps
        stop = np.concatenate([steps, [len(values)]]) if len(values) else steps
    else:
        taken = np.append(np.arange(points) * len(values) // points, len(values) - 1)
        which = np.unique(np.searchsorted(steps, taken, "right"))  # of the runs of equal values
        edges = np.concatenate([[0], steps, [len(values)]])
        start, stop = edges[which], edges[which + 1]
    return _summary(number, values[start], start, stop)


def _in_bins(number: int, values: Any, points: int, floats: Any, places: Any) -> Any:
    """The summary of a column from counts of its values in bins of equal width, which takes a fifth of sorting them.

    None where so many are in one bin that ranks would not be near enough: outliers, many equal ones.
    """
    low, high = values.min(), values.max()
    if not np.isfinite(high - low):
        values = values[np.isfinite(values)]
        low, high = (values.min(), values.max()) if len(values) else (0, 0)
    width = (float(high) - float(low)) / _BINS
    if not np.finfo("float32").tiny < width < np.finfo("float32").max / _BINS:
        return None
    floats, places = floats[: len(values)], places[: len(values)]
    np.subtract(values, low, out=floats)
    np.multiply(floats, np.float32(1 / width), out=floats)
    np.minimum(floats, np.float32(_BINS - 1), out=floats)
    np.copyto(places, floats, casting="unsafe")
    counts = np.bincount(places, minlength=_BINS)
    if counts.max() * 2 * points > len(values):
        return None
    upto = np.concatenate([[0], np.cumsum(counts)])
    which = np.unique(np.searchsorted(upto, np.arange(points) * (len(values) / points), "right") - 1)
    edges = np.append((float(low) + which * width).astype("float32"), high)
    edges[0] = low
    start = np.append(upto[which], len(values))
    kept = np.append(np.diff(edges) > 0, True)
    return _summary(number, edges[kept], start[kept], start[kept])


def _weighted(number: int, values: Any, rows: Any, points: int, *, weight: Any) -> Any:
    if rows is None:  # the code of a category, which has no rank
        return _counted(number, values, None, points)
    order = np.argsort(values)
    values, upto = values[order], np.concatenate([[0], np.cumsum(weight[rows[order]], dtype="float64")])
    steps = np.flatnonzero(values[1:] != values[:-1]) + 1 if len(values) else np.empty(0, "int64")
    edges = np.concatenate([[0], steps, [len(values)]]) if len(values) else np.zeros(1, "int64")
    which = np.arange(len(edges) - 1)
    if len(which) > points:
        wanted = np.searchsorted(upto[edges], np.arange(points) * (upto[-1] / points), "right") - 1
        which = np.unique(np.append(wanted, len(which) - 1).clip(0, len(which) - 1))
    return _summary(number, values[edges[which]], upto[edges[which]], upto[edges[which + 1]])


def _summary(number: int, values: Any, start: Any, stop: Any) -> Any:
    """From the values, and how much lies before each and up to it."""
    summary = np.zeros(len(values), SUMMARY)
    summary["column"], summary["value"], summary["equal"] = number, values, stop - start
    summary["gap"][:-1] = start[1:] - stop[:-1]
    return summary


def _merged(summaries: Any) -> tuple[Any, Any, Any, Any]:
    """Columns, distinct values, and how much lies before each and up to it."""
    half = summaries["gap"] / 2
    before = np.concatenate([[0], half[:-1]])  # the last value of a column has no gap behind it
    bits = summaries["value"].view("int32")
    rising = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype("int64")  # whole numbers in the order of the values
    order = np.argsort((summaries["column"].astype("int64") << 32) + rising)
    column, value = summaries["column"][order], summaries["value"][order]
    new = np.append(True, (column[1:] != column[:-1]) | (value[1:] != value[:-1]))
    starts = np.flatnonzero(new)
    before, equal, behind = (np.add.reduceat(each[order], starts) for each in (before, summaries["equal"], half))
    column, value = column[starts], value[starts]
    total = np.cumsum(before + equal + behind)
    firsts = np.flatnonzero(np.append(True, column[1:] != column[:-1]))
    earlier = np.concatenate([[0], total])[firsts].repeat(np.diff(np.append(firsts, len(column))))
    upto = total - behind - earlier
    return column, value, upto - equal, upto


def compress(summaries: Any, points: int) -> Any:
    """One summary of about so many values a column for all of some, one after the other."""
    if not len(summaries):
        return summaries
    column, value, start, stop = _merged(summaries)
    parts = []
    for number, inside in _by_column(column):
        which = np.arange(inside.start, inside.stop)
        if len(which) > points:
            wanted = np.arange(points) * (stop[inside][-1] / points)
            which = np.unique(np.append(np.searchsorted(stop[inside], wanted, "right"), len(which) - 1))
            which = which.clip(0, inside.stop - inside.start - 1) + inside.start
        parts.append(_summary(number, value[which], start[which], stop[which]))
    return np.concatenate(parts)


def compress_all(summaries: Sequence[Any], points: int) -> Any:
    """`compress` several, some columns at a time: sorting takes several times the memory of what is sorted."""
    columns = 1 + max(int(each["column"].max(initial=-1)) for each in summaries)
    firsts = range(0, columns + _TILE, _TILE)
    bounds = [np.searchsorted(each["column"], firsts) for each in summaries]  # they are ordered by column
    tiles = [
        compress(np.concatenate([each[at[tile] : at[tile + 1]] for each, at in zip(summaries, bounds)]), points)
        for tile in range(len(firsts) - 1)
    ]
    return np.concatenate([np.empty(0, SUMMARY), *tiles])


class Collected:
    """Summaries of many blocks, which are to take no more memory than they must.

    Where those of blocks take more than so many bytes, they become one with four times as many values, and so do
    those, in turn: ranks are off by another ``1 / (8 * points)`` each time.

    Parameters
    ----------
    points : int
        See `summarise`.
    limit : int
        Bytes.

    Examples
    --------
    >>> found = Collected(points=8, limit=200)
    >>> for start in range(100):
    ...     found.add(summarise(np.arange(start, start + 900, 9.0).reshape(-1, 1), points=8))
    >>> len(found.each()) < 50
    True
    >>> {column: edges.round(-1).tolist() for column, edges in quantiles(np.concatenate(found.each()), 2).items()}
    {0: [0.0, 500.0]}
    """

    def __init__(self, points: int, limit: int) -> None:
        self._points, self._limit = points, limit
        self._levels: list[list[Any]] = [[]]

    def add(self, summary: Any, level: int = 0) -> None:
        """Take one more, of which `level` says how often it has become of others."""
        if level == len(self._levels):
            self._levels.append([])
        these = self._levels[level]
        these.append(summary)
        if len(these) >= (_AGAIN if level else _AT_LEAST) and sum(each.nbytes for each in these) > self._limit:
            self._levels[level] = []
            self.add(compress_all(these, 4 * self._points), level + 1)

    def each(self) -> list[Any]:
        """All of them."""
        return [np.empty(0, SUMMARY), *(each for level in self._levels for each in level)]


def quantiles(summaries: Any, max_bin: int, coded: Collection[int] = ()) -> dict[int, Any]:
    """The left edges of at most `max_bin` bins that hold like numbers of rows, for each column that has values.

    Parameters
    ----------
    summaries : ndarray
        Of dtype `SUMMARY`: those of all blocks, one after the other.
    max_bin : int
    coded : collection of int
        Columns of codes, of which the greatest is all that counts.

    Returns
    -------
    dict of ndarray
        By column: float32, rising; the first is the least value.

    Examples
    --------
    >>> block = np.array([[1.0, 7], [1, 8], [2, 9], [3, np.nan]])
    >>> {column: edges.tolist() for column, edges in quantiles(summarise(block, points=8), 2).items()}
    {0: [1.0, 2.0], 1: [7.0, 8.0]}
    """
    if not len(summaries):
        return {}
    column, value, start, stop = _merged(summaries)
    return {
        number: value[inside][-1:] if number in coded else _edges(value[inside], start[inside], stop[inside], max_bin)
        for number, inside in _by_column(column)
    }


def _edges(value: Any, start: Any, stop: Any, max_bin: int) -> Any:
    if len(value) <= max_bin:
        return value
    wanted = np.arange(max_bin) * (stop[-1] / max_bin)
    at = np.searchsorted(stop, wanted, "right").clip(0, len(value) - 1)
    before = (at - 1).clip(0)
    # How far the rank of the value is from what is wanted; 0 where that lies among the equal ones.
    at = np.where((wanted - stop[before] < start[at] - wanted) & (at > 0), before, at)
    at[0] = 0
    return value[np.unique(at)]


def _by_column(column: Any) -> Iterator[tuple[int, slice]]:
    firsts = np.flatnonzero(np.append(True, column[1:] != column[:-1]))
    for start, stop in zip(firsts, np.append(firsts[1:], len(column))):
        yield int(column[start]), slice(int(start), int(stop))
