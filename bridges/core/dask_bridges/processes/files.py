"""Arrays and dataframes in files that can be mapped: raw values, and Arrow. Nothing is pickled."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dask_bridges.errors import DataError

__all__ = ["arrow_size", "arrow_table", "read_array", "read_frame", "write_array", "write_arrow", "write_whole"]

#: Largest piece that is written, and copied, at once.
SLICE = 8 * 2**20


def write_whole(path: Path, fill: Callable[[Path], None]) -> None:
    """Have a file written, private to the user: whole, or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
        try:
            os.fchmod(descriptor, 0o600)  # whatever the umask is
        finally:
            os.close(descriptor)
        fill(part)
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


# Arrays


def write_array(path: Path, array: np.ndarray) -> None:
    """Write the values of an array that holds no Python objects: raw, in C order, little-endian."""
    with path.open("wb", buffering=0) as out:
        for piece in _pieces(np.asarray(array)):
            while piece:
                piece = piece[out.write(piece[:SLICE]) :]


def read_array(path: str | Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """An array that was written with `Writer.array`: mapped, not read, and read-only.

    Raises
    ------
    DataError
        If the file holds another number of bytes.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    mapped = _mapped(path)
    wanted = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    if len(mapped) != wanted:
        raise DataError(f"{path} holds {len(mapped)} bytes, where shape {shape} of {kind} needs {wanted}")
    return np.ndarray(shape, kind, buffer=mapped)


def _pieces(array: np.ndarray) -> Iterator[memoryview]:
    """The bytes of an array, little-endian and in C order, with never more than a slice copied."""
    plain = array.dtype.newbyteorder("<")
    if not array.nbytes:
        return
    if array.flags.c_contiguous and array.dtype == plain:
        yield memoryview(array.reshape(-1).view(np.uint8))
    elif array.nbytes <= SLICE or not array.ndim:
        yield from _pieces(np.ascontiguousarray(array, plain))
    else:
        rows = SLICE * len(array) // array.nbytes
        for start in range(0, len(array), max(rows, 1)):
            yield from _pieces(array[start : start + rows] if rows else array[start, ...])


# Dataframes


def arrow_table(frame: Any) -> Any:
    """A pandas object as an Arrow table, of the memory of its columns where that can be."""
    import pandas as pd
    import pyarrow

    if isinstance(frame, pd.Index):
        frame = frame.to_frame(index=False)
    elif isinstance(frame, pd.Series):
        frame = frame.to_frame()
    table = pyarrow.Table.from_pandas(frame)
    for at, dtype in enumerate(frame.dtypes):
        if isinstance(dtype, np.dtype) and dtype.kind == "f":
            # NaN stays NaN: as nulls, they would be copied on reading.
            values = pyarrow.array(frame.iloc[:, at].to_numpy(), from_pandas=False)
            table = table.set_column(at, table.field(at), values)
    return table


def arrow_size(table: Any) -> int:
    """Bytes of the file that `write_arrow` makes."""
    import pyarrow

    counter = pyarrow.MockOutputStream()
    _write_table(counter, table)
    return int(counter.size())


def write_arrow(path: Path, table: Any) -> None:
    """Write an Arrow file."""
    import pyarrow

    with pyarrow.OSFile(str(path), "wb") as out:
        _write_table(out, table)


def _write_table(out: Any, table: Any) -> None:
    import pyarrow

    with pyarrow.ipc.new_file(out, table.schema) as file:
        if table.num_rows:
            file.write_table(table)
        else:  # of no rows it would write no batch, and so lose the categories
            columns = [c.chunk(0) if c.num_chunks else pyarrow.array([], c.type) for c in table.columns]
            file.write_batch(pyarrow.record_batch(columns, table.schema))


def read_frame(path: str | Path) -> Any:
    """The dataframe that was written with `Writer.frame`; a series or an index is one of its columns.

    Numbers without nulls are mapped, and read-only; the rest is built in memory.
    """
    import pyarrow

    table = pyarrow.ipc.open_file(pyarrow.py_buffer(_mapped(path))).read_all()
    return table.to_pandas(split_blocks=True)


def _mapped(path: str | Path) -> bytes | mmap.mmap:
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return b""
        if sys.version_info >= (3, 13):  # before, each map keeps a descriptor open
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ, trackfd=False)
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
