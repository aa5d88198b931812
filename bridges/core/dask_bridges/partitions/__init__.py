"""Collections to the parts each worker holds: aligned, read once, balanced, never gathered."""

from dask_bridges.partitions.balance import assign
from dask_bridges.partitions.blocks import Part, PartInfo, rows_of, size_of, take
from dask_bridges.partitions.collections import align, is_array, is_frame
from dask_bridges.partitions.load import Partitions, load, load_all
from dask_bridges.partitions.mapping import map_rows
from dask_bridges.partitions.prepare import Prepared, prepare, prepare_all

__all__ = [
    "Part",
    "PartInfo",
    "Partitions",
    "Prepared",
    "align",
    "assign",
    "is_array",
    "is_frame",
    "load",
    "load_all",
    "map_rows",
    "prepare",
    "prepare_all",
    "rows_of",
    "size_of",
    "take",
]
