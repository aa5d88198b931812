"""Partitions become blocks of rows of fixed width: looked at on their workers, agreed upon, written in chunks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from dask_bridges.errors import DataError
from dask_bridges.partitions import Part, rows_of
from dask_tf.looks import Look, look, merge
from dask_tf.schema import Collection, Column, Schema

__all__ = ["Look", "Schema", "Writer", "blocks", "look", "merge", "write"]

#: Rows `start` to `stop` of one column, encoded.
_Cut = Callable[[int, int], Any]


class Writer(Protocol):
    """Where the arrays of a feed go."""

    def array(self, file: str, array: Any) -> None:
        """Write an array, C-contiguous and little-endian, as a file of raw bytes."""


def write(parts: Iterable[Part], schema: Schema, writer: Writer) -> None:
    """Write partitions as a feed: block j of chunk i as file ``i.j``, and the rows of each chunk as ``rows``.

    Parameters
    ----------
    parts : iterable of dict
        The blocks of each partition by role; none is held once it is written.
    schema : Schema
        What `merge` found for all partitions of the feed.
    writer : Writer
        ``rows`` is written last, as int64.

    Examples
    --------
    >>> class Show:
    ...     def array(self, file, array):
    ...         print(file, array.dtype, array.ravel())
    >>> part = {"X": np.eye(2, dtype="float32"), "y": np.arange(2)}
    >>> write([part], merge([look(part)], ["X", "y"]), Show())
    0.0 float32 [1. 0. 0. 1.]
    0.1 int64 [0 1]
    rows int64 [2]
    """
    numbers = itertools.count()

    def written(part: Part) -> list[int]:
        counts = []
        for rows, arrays in blocks(part, schema):
            chunk = next(numbers)
            for number, array in enumerate(arrays):
                writer.array(f"{chunk}.{number}", array)
            counts.append(rows)
        return counts

    # Unlike a loop's variable, map does not keep the last part while the next is fetched.
    rows = list(itertools.chain.from_iterable(map(written, parts)))
    writer.array("rows", np.array(rows, dtype="<i8"))


def blocks(part: Part, schema: Schema) -> Iterator[tuple[int, list[Any]]]:
    """Cut a partition into chunks of bounded size.

    Parameters
    ----------
    part : dict
        Blocks by role.
    schema : Schema

    Yields
    ------
    tuple
        The rows of a chunk, and of every block of the schema an array of (rows, width), C-contiguous and
        little-endian: a view of the partition where it lies like that already.

    Raises
    ------
    DataError
        If an array is not of the schema's dtype and row shape.
    """
    cuts: list[_Cut] = []
    for collection in schema.collections:
        block = part[collection.role]
        if collection.kind == "array":
            cuts.append(_array(block, collection))
        else:
            numbers = dict.fromkeys(column.block for column in collection.columns)
            cuts += [_packed(block, schema.columns_of(number)) for number in numbers]
    rows = rows_of(next(iter(part.values())))
    for start in range(0, rows, schema.chunk_rows):
        stop = min(start + schema.chunk_rows, rows)
        yield stop - start, [cut(start, stop) for cut in cuts]


def _array(block: Any, collection: Collection) -> _Cut:
    block = np.asarray(block)
    wanted, (column,) = collection.shape, collection.columns
    if block.dtype.name != column.dtype or block.shape[1:] != wanted:
        raise DataError(
            f"a partition of {collection.role} is now {block.dtype} with rows of shape {block.shape[1:]}, and was "
            f"{column.dtype} with {wanted} when it was looked at: is it computed in the same way every time?"
        )
    width, dtype = int(np.prod(wanted)), block.dtype.newbyteorder("<")
    return lambda start, stop: np.ascontiguousarray(block[start:stop], dtype).reshape(stop - start, width)


def _packed(block: Any, columns: Sequence[Column]) -> _Cut:
    """Columns of one dtype side by side."""
    cuts = [_column(block[column.name] if block.ndim == 2 else block, column) for column in columns]
    if len(cuts) == 1:
        return lambda start, stop: np.ascontiguousarray(cuts[0](start, stop)).reshape(stop - start, 1)

    def packed(start: int, stop: int) -> Any:
        rows = np.empty((stop - start, len(cuts)), columns[0].dtype)
        for at, cut in enumerate(cuts):
            rows[:, at] = cut(start, stop)
        return rows

    return packed


def _column(values: Any, column: Column) -> _Cut:
    if column.values is not None:
        return _indices(values, column.values)
    if isinstance(values.dtype, np.dtype):
        plain = values.to_numpy()
        dtype = np.dtype(column.dtype).newbyteorder("<")
        return lambda start, stop: plain[start:stop].astype(dtype, copy=False)
    missing = {"na_value": np.nan} if column.dtype.startswith("float") else {}
    return lambda start, stop: values.iloc[start:stop].to_numpy(dtype=column.dtype, **missing)


def _indices(values: Any, vocabulary: tuple[Any, ...]) -> _Cut:
    """Text or categories as their place in the vocabulary, -1 where there is none."""
    import pandas as pd

    if isinstance(values.dtype, pd.CategoricalDtype):
        places = {value: place for place, value in enumerate(vocabulary)}
        # A missing value has the code -1, which finds the last one.
        table = np.array([*(places[value] for value in values.cat.categories), -1], dtype="<i4")
        codes = values.cat.codes.to_numpy()
        return lambda start, stop: table[codes[start:stop]]
    index = pd.Index(vocabulary, dtype="object")
    return lambda start, stop: index.get_indexer(values.iloc[start:stop].astype("object")).astype("<i4")
