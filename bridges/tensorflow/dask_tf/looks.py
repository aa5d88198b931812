"""What partitions hold, looked at on their workers, and what all of them agree on."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from dask_bridges.errors import DataError
from dask_bridges.partitions import Part, rows_of
from dask_tf.schema import CHUNK_BYTES, Block, Collection, Column, Schema

__all__ = ["MOST_WORDS", "NUMBERS", "CollectionLook", "ColumnLook", "Look", "look", "merge"]

#: A text column with more different strings than this is refused: all of them travel to the client and back.
MOST_WORDS = 2**20

#: What TensorFlow reads as raw bytes.
NUMBERS = {
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
}
#: What holds every value of a nullable dtype, and NaN; float64 for the rest, exact up to 2**53.
_WITH_NAN = {
    **dict.fromkeys(("bool", "int8", "int16", "uint8", "uint16", "float32"), "float32"),
    "float16": "float16",
}


@dataclass(frozen=True)
class ColumnLook:
    """A column in one partition.

    Attributes
    ----------
    name : object
        Its name; of a series and an array the role of their collection.
    kind : {"number", "text", "category"}
    dtype : str
        Name of a number's dtype.
    nulls : bool
        Whether a nullable column has nulls.
    values : tuple
        The different strings, or the categories in their order.
    problem : str
        Why it cannot be fed, and what to do; "" if it can.
    """

    name: Any
    kind: Literal["number", "text", "category"] = "number"
    dtype: str = ""
    nulls: bool = False
    values: tuple[Any, ...] = ()
    problem: str = ""

    def __str__(self) -> str:
        return {"number": self.dtype, "text": "text", "category": "categorical"}[self.kind]


@dataclass(frozen=True)
class CollectionLook:
    """A collection in one partition; `shape` is that of a row of an array."""

    kind: Literal["array", "frame", "series"]
    columns: tuple[ColumnLook, ...]
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Look:
    """A partition: its rows, and its collections by role."""

    rows: int
    collections: dict[str, CollectionLook] = field(default_factory=dict)


def look(part: Part) -> Look:
    """Describe a partition, on the worker that holds it.

    Parameters
    ----------
    part : dict
        Blocks by role: numpy arrays, pandas frames or series.

    Returns
    -------
    Look
        Small, but for the different strings of text columns. What cannot be fed is noted in it, and raised
        by `merge`, which knows the partition.
    """
    return Look(rows_of(next(iter(part.values()))), {role: _collection(role, block) for role, block in part.items()})


def _collection(role: str, block: Any) -> CollectionLook:
    if hasattr(block, "iloc"):
        if block.ndim == 1:
            return CollectionLook("series", (_column(role, block, f"{role}.astype"),))
        columns = (_column(name, block.iloc[:, at], f"{role}.astype") for at, name in enumerate(block.columns))
        return CollectionLook("frame", tuple(columns))
    if hasattr(block, "tocsr"):
        problem = f"is sparse: make it dense, {role}.map_blocks(lambda block: block.toarray())"
        return CollectionLook("array", (ColumnLook(role, problem=problem),))
    dtype = np.asarray(block).dtype.name
    if isinstance(block, np.ma.MaskedArray):
        problem = f"has a mask: fill it, dask.array.ma.filled({role}, ...)"
    elif dtype in NUMBERS:
        problem = ""
    elif np.asarray(block).dtype.kind in "mM":
        problem = f"has dtype {dtype}: make numbers of it, such as ({role} - t0) / numpy.timedelta64(1, 's')"
    else:
        problem = (
            f"has dtype {dtype}, which is no number: convert it, {role}.astype(...); text is taken from "
            "dataframes and series, such as dask.dataframe.from_dask_array makes"
        )
    return CollectionLook("array", (ColumnLook(role, dtype=dtype, problem=problem),), tuple(block.shape[1:]))


def _column(name: Any, values: Any, astype: str) -> ColumnLook:
    import pandas as pd

    dtype = values.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        return ColumnLook(name, "category", values=tuple(dtype.categories.tolist()))
    is_object = pd.api.types.is_object_dtype(dtype)
    if is_object or _is_text(dtype):
        holds = pd.api.types.infer_dtype(values, skipna=True) if is_object else "string"
        if holds not in ("string", "empty"):
            problem = f"holds Python objects ({holds}): give it a dtype, {astype}(...)"
            return ColumnLook(name, "text", problem=problem)
        return ColumnLook(name, "text", values=tuple(values.dropna().unique().tolist()))
    plain = np.dtype(getattr(dtype, "numpy_dtype", dtype if isinstance(dtype, np.dtype) else object))
    if plain.name in NUMBERS:
        nulls = not isinstance(dtype, np.dtype) and bool(values.isna().any())
        return ColumnLook(name, dtype=plain.name, nulls=nulls)
    return ColumnLook(name, dtype=str(dtype), problem=_no_number(dtype))


def _is_text(dtype: Any) -> bool:
    import pandas as pd

    if isinstance(dtype, pd.ArrowDtype):
        import pyarrow as pa

        return bool(pa.types.is_string(dtype.pyarrow_dtype) or pa.types.is_large_string(dtype.pyarrow_dtype))
    return isinstance(dtype, pd.StringDtype)


def _no_number(dtype: Any) -> str:
    import pandas as pd

    if pd.api.types.is_datetime64_any_dtype(dtype):
        return f"has dtype {dtype}: make numbers of it, such as (t - t0).dt.total_seconds(), or drop it"
    if pd.api.types.is_timedelta64_dtype(dtype):
        return f"has dtype {dtype}: make numbers of it, such as t.dt.total_seconds(), or drop it"
    return f"has dtype {dtype}, which is neither number, text nor category: convert it, or drop it"


def merge(looks: Sequence[Look], structure: Sequence[str]) -> Schema:
    """What all partitions agree on.

    Empty partitions have no say, unless all are empty. Text is numbered in sorted order; categories keep
    theirs, and those that only later partitions know follow. Nullable integers and booleans with nulls in
    any partition become floats with NaN in all: float32 for up to 16 bits, float64 (exact up to 2**53) for more.

    Parameters
    ----------
    looks : sequence of Look
        In the order of the partitions.
    structure : sequence of str
        The roles, in the order in which an element is to hold them.

    Raises
    ------
    DataError
        Naming collection, column and partition, and what to do.
    """
    filled = {index: found for index, found in enumerate(looks) if found.rows} or dict(enumerate(looks))
    if not filled:
        raise DataError(f"{', '.join(structure)}: there is no partition to feed")
    blocks: list[Block] = []
    collections = tuple(
        _merged(role, {index: found.collections[role] for index, found in filled.items()}, blocks) for role in structure
    )
    row_bytes = max(1, sum(block.row_bytes for block in blocks))
    return Schema(collections, tuple(blocks), 1 << max(0, (CHUNK_BYTES // row_bytes).bit_length() - 1))


def _merged(role: str, found: dict[int, CollectionLook], blocks: list[Block]) -> Collection:
    """One collection of all partitions; its blocks are added to those of the others."""
    first, lead = next(iter(found.items()))
    names = [column.name for column in lead.columns]
    _check_names(role, names)
    for index, other in found.items():
        for column in other.columns:
            if column.problem:
                raise DataError(f"{_called(role, lead, column)} {column.problem} (seen in partition {index})")
        there, here = (other.kind, [c.name for c in other.columns]), (lead.kind, names)
        if there != here:
            raise DataError(f"partition {index} of {role} has columns {there[1]}, and partition {first} {here[1]}")
        if other.shape != lead.shape:
            raise DataError(
                f"rows of {role} have shape {other.shape} in partition {index} and {lead.shape} in partition {first}: "
                "all must have one, pad or crop them"
            )
    merged = [_merged_column(role, lead, {i: c.columns[at] for i, c in found.items()}) for at in range(len(names))]
    return Collection(role, lead.kind, tuple(_placed(role, lead, merged, blocks)), lead.shape)


def _placed(
    role: str, lead: CollectionLook, merged: Sequence[tuple[str, str, Any]], blocks: list[Block]
) -> Iterator[Column]:
    """Give columns of one dtype a block, and each its place in it."""
    by_dtype: dict[str, int] = {}
    used: defaultdict[int, int] = defaultdict(int)
    for name, dtype, values in merged:
        if dtype not in by_dtype:
            by_dtype[dtype] = len(blocks)
            width = int(np.prod(lead.shape)) if lead.kind == "array" else sum(d == dtype for _, d, _ in merged)
            blocks.append(Block(role, dtype, width))
        number = by_dtype[dtype]
        yield Column(name, dtype, number, used[number], values)
        used[number] += 1


def _merged_column(role: str, lead: CollectionLook, found: dict[int, ColumnLook]) -> tuple[str, str, Any]:
    """Name, dtype and vocabulary of a column."""
    first, column = next(iter(found.items()))
    for index, other in found.items():
        if (other.kind, other.dtype) != (column.kind, column.dtype):
            raise DataError(
                f"{_called(role, lead, column)} is {other} in partition {index} and {column} in partition {first}: "
                f"give all partitions one dtype, with {role}.astype(...)"
            )
    if column.kind == "number":
        nulls = any(other.nulls for other in found.values())
        return column.name, _WITH_NAN.get(column.dtype, "float64") if nulls else column.dtype, None
    # A dict keeps the order in which values were first seen.
    values: list[Any] = list(dict.fromkeys(value for other in found.values() for value in other.values))
    if column.kind == "text":
        values.sort()
        if len(values) > MOST_WORDS:
            raise DataError(
                f"{_called(role, lead, column)} holds {len(values)} different strings, and a vocabulary {MOST_WORDS} "
                "at most: hash them to numbers, make them categories, or drop the column"
            )
    return column.name, "int32", tuple(values)


def _called(role: str, lead: CollectionLook, column: ColumnLook) -> str:
    return f"column {column.name!r} of {role}" if lead.kind == "frame" else role


def _check_names(role: str, names: Sequence[Any]) -> None:
    if not names:
        raise DataError(f"{role} has no columns")
    for name, times in Counter(names).items():
        if not isinstance(name, str):
            raise DataError(
                f"column {name!r} of {role} is not named by a string, as the inputs of a model are: "
                f"rename the columns, {role}.rename(columns=str)"
            )
        if times > 1:
            raise DataError(f"{role} has {times} columns of the name {name!r}: rename or drop some")
