"""What all workers of a feed agree on: the columns, their blocks, their vocabularies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

__all__ = ["CHUNK_BYTES", "Block", "Collection", "Column", "Schema", "itemsize"]

#: Size of a chunk, all blocks together. A window of shuffled rows holds several, so small ones mix better;
#: far below this the cost of opening files shows.
CHUNK_BYTES = 2**20


def itemsize(dtype: str) -> int:
    """Bytes of one value of a dtype, by its name."""
    # NumPy knows this name only where ml_dtypes has been imported.
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


@dataclass(frozen=True)
class Column:
    """A column of a frame, a series, or an array as a whole.

    Attributes
    ----------
    name : str
        Its name; of a series and an array the role of their collection.
    dtype : str
        Name of the dtype it arrives with, "int32" for text and categories.
    block : int
        The block it lies in.
    at : int
        Its place among the columns of that block.
    values : tuple or None
        What its indices stand for, where it is text or categorical.
    """

    name: str
    dtype: str
    block: int
    at: int = 0
    values: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Collection:
    """An array, a frame or a series of the feed.

    Attributes
    ----------
    role : str
        What messages call it: "X", "y", "sample_weight".
    kind : {"array", "frame", "series"}
    columns : tuple of Column
        One for an array or a series.
    shape : tuple of int
        Of one row of an array.
    """

    role: str
    kind: Literal["array", "frame", "series"]
    columns: tuple[Column, ...]
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Block:
    """What is written as one file a chunk: columns of one collection and one dtype, row after row."""

    role: str
    dtype: str
    width: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.width * itemsize(self.dtype)


@dataclass(frozen=True)
class Schema:
    """What a feed is made of, the same on every worker.

    Attributes
    ----------
    collections : tuple of Collection
        In the order in which elements hold them.
    blocks : tuple of Block
    chunk_rows : int
        Rows of a chunk at most; a power of two, so that batches of the usual sizes end where chunks end.
    """

    collections: tuple[Collection, ...]
    blocks: tuple[Block, ...]
    chunk_rows: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, all blocks together."""
        return sum(block.row_bytes for block in self.blocks)

    def columns_of(self, block: int) -> list[Column]:
        """The columns of a block, in their order."""
        return [column for held in self.collections for column in held.columns if column.block == block]

    def vocabulary(self, column: str, collection: str | None = None) -> list[str]:
        """What the indices of a text or categorical column stand for; -1 stands for a missing value.

        Parameters
        ----------
        column : str
            Its name; of a series the role of its collection.
        collection : str, optional
            The role of its collection, needed where several have a column of that name.

        Raises
        ------
        KeyError
            If there is no such column with a vocabulary, or more than one.

        Examples
        --------
        >>> city = Column("city", "int32", block=0, values=("Bonn", "Oslo"))
        >>> Schema((Collection("X", "frame", (city,)),), (Block("X", "int32", 1),), 1024).vocabulary("city")
        ['Bonn', 'Oslo']
        """
        known = [
            (held.role, found.name, found.values)
            for held in self.collections
            for found in held.columns
            if found.values is not None
        ]
        wanted = [values for role, name, values in known if name == column and collection in (None, role)]
        if len(wanted) == 1:
            return [str(value) for value in wanted[0]]
        having = ", ".join(f"{name!r} of {role}" for role, name, _ in known) or "no column"
        several = "several columns" if wanted else "no text or categorical column"
        raise KeyError(f"{several} {column!r} in this feed; with a vocabulary there is: {having}")
