"""Checks on the client: what kind of collection each one is, and whether their partitions match."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dask import is_dask_collection

from dask_bridges.errors import DataError

__all__ = ["align", "is_array", "is_frame"]


def is_frame(collection: Any) -> bool:
    """Whether it is a dask dataframe or series."""
    return is_dask_collection(collection) and hasattr(collection, "divisions")


def is_array(collection: Any) -> bool:
    """Whether it is a dask array."""
    return is_dask_collection(collection) and hasattr(collection, "chunks")


def align(collections: Mapping[str, Any]) -> dict[str, Any]:
    """Collections whose partitions correspond, row for row, to those of the first.

    Chunks over columns are joined; an array with other chunk boundaries is cut at
    those of the first; a frame with other known divisions is repartitioned.

    Parameters
    ----------
    collections : mapping of str to dask array or dataframe
        By role, as error messages call them; the first one leads.

    Returns
    -------
    dict
        The same roles, with equal numbers of partitions.

    Raises
    ------
    DataError
        If one is no collection, if lengths differ where they are known, or if
        partitions cannot be matched without computing.
    """
    names = list(collections)
    checked = {name: _whole_rows(name, collection) for name, collection in collections.items()}
    lead_name, lead = names[0], checked[names[0]]
    return {
        name: collection if collection is lead else _like(lead_name, lead, name, collection)
        for name, collection in checked.items()
    }


def _whole_rows(name: str, collection: Any) -> Any:
    if is_frame(collection):
        return collection
    if not is_array(collection):
        raise DataError(
            f"{name} is a {type(collection).__module__.split('.')[0]} {type(collection).__name__}, not a Dask "
            "collection: make it one with dask.array.from_array or dask.dataframe.from_pandas."
        )
    if collection.ndim == 0:
        raise DataError(f"{name} is a scalar; rows are needed")
    return collection.rechunk(dict.fromkeys(range(1, collection.ndim), -1))


def _length(collection: Any) -> float:
    """Rows, or nan where only computing would tell."""
    return float(sum(collection.chunks[0])) if is_array(collection) else math.nan


def _like(lead_name: str, lead: Any, name: str, other: Any) -> Any:
    """`other`, cut like `lead`."""
    n_lead, n_other = _length(lead), _length(other)
    if n_lead != n_other and not math.isnan(n_lead) and not math.isnan(n_other):
        raise DataError(f"{lead_name} has {n_lead:.0f} rows and {name} has {n_other:.0f}: they must match row for row")
    if is_array(lead) and is_array(other) and not math.isnan(n_lead + n_other):
        return other.rechunk({0: lead.chunks[0]})
    if is_frame(lead) and is_frame(other) and lead.known_divisions and other.known_divisions:
        return _divided_like(lead_name, lead, name, other)
    if lead.npartitions != other.npartitions:
        raise DataError(
            f"{lead_name} has {lead.npartitions} partitions and {name} has {other.npartitions}, of unknown "
            "lengths, so their rows cannot be matched: give them the same partitions, or make lengths known "
            f"(array.compute_chunk_sizes(), or frame.to_dask_array(lengths=True))"
        )
    return other


def _divided_like(lead_name: str, lead: Any, name: str, other: Any) -> Any:
    """A frame cut at the divisions of another; where their indices have nothing in common, by position."""
    first, last = lead.divisions[0], lead.divisions[-1]
    if lead.divisions == other.divisions:
        return other
    if (first, last) == (other.divisions[0], other.divisions[-1]):
        return other.repartition(divisions=lead.divisions)
    if lead.npartitions == other.npartitions:
        return other
    raise DataError(
        f"the index of {lead_name} runs from {first} to {last} in {lead.npartitions} partitions and that of {name} "
        f"from {other.divisions[0]} to {other.divisions[-1]} in {other.npartitions}, so their rows cannot be "
        "matched: give them the same partitions, or the same index"
    )
