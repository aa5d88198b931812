"""Class labels of any kind: found partition by partition, coded for XGBoost, and given back by predictions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dask
import numpy as np
import pandas as pd
import xgboost as xgb

from dask_bridges import partitions
from dask_bridges.errors import DataError
from dask_bridges.shipping import sealed

__all__ = [
    "Found",
    "check_seen",
    "decide",
    "decided",
    "encoded",
    "flat",
    "look",
    "look_lazily",
    "probabilities",
    "read",
    "union",
    "write",
]

#: More labels than this in a partition are no classes.
MOST = 10_000
#: The attribute of a booster that keeps classes other than 0, 1, 2, ...
ATTRIBUTE = "dask_xgboost_classes"


@dataclass(frozen=True)
class Found:
    """The labels of one partition.

    Attributes
    ----------
    values : ndarray
        Distinct, sorted; empty if they are no classes.
    missing : int
        Number of rows without a label.
    many : int
        Number of distinct labels.
    continuous : bool
        Whether there are fractions among them.
    columns : int
        More than one for indicators of several labels a row.
    """

    values: Any
    missing: int = 0
    many: int = 0
    continuous: bool = False
    columns: int = 1


def flat(block: Any) -> Any:
    """Labels as an array; a single column becomes flat."""
    values = block.to_numpy() if hasattr(block, "to_numpy") else np.asarray(block)
    return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values


def look(block: Any) -> Found:
    """The distinct labels of one partition.

    Examples
    --------
    >>> look(["b", "a", "b"]).values.tolist()
    ['a', 'b']
    """
    values = flat(block)
    columns = values.shape[1] if values.ndim == 2 else 1
    values = values.ravel()
    there = ~pd.isna(values)
    missing = int((~there).sum())
    values = values[there]
    if values.dtype.kind == "f":
        missing += int(np.isinf(values).sum())
        if (values != np.floor(values)).any():
            return Found(values[:0], missing, continuous=True, columns=columns)
    values = np.unique(values) if values.dtype.kind in "US" else pd.unique(_plain(values))
    if len(values) > MOST:
        return Found(values[:0], missing, len(values), columns=columns)
    try:
        return Found(np.sort(values), missing, len(values), columns=columns)
    except TypeError:
        return Found(values, missing, len(values), columns=columns)  # `union` tells of it


def _plain(values: Any) -> Any:
    """Objects that are all numbers or booleans, as such."""
    kinds = {"integer": "int64", "floating": "float64", "boolean": "bool"}
    kind = pd.api.types.infer_dtype(values, skipna=False) if values.dtype == object else ""
    return values.astype(kinds[kind]) if kind in kinds else values


def look_lazily(y: Any) -> list[Any]:
    """`look` at each partition of a collection, delayed."""
    blocks = y.to_delayed()
    blocks = blocks if partitions.is_frame(y) else y.rechunk(dict.fromkeys(range(1, y.ndim), -1)).to_delayed().ravel()
    return [dask.delayed(sealed(look), pure=True)(block) for block in blocks]


def union(role: str, found: Sequence[Found]) -> Any:
    """The sorted classes of all partitions.

    Raises
    ------
    DataError
        If labels are missing, of several kinds, or no classes.
    """
    if missing := sum(one.missing for one in found):
        raise DataError(f"{role} has {missing} missing or infinite labels; drop those rows")
    if any(one.continuous for one in found):
        raise DataError(f"Unknown label type: continuous. {role} holds fractions: use a regressor")
    most = max((one.many for one in found), default=0)
    if most > MOST:
        raise DataError(f"a partition of {role} holds {most} different labels, and classes are {MOST} at most")
    some = [one.values for one in found if len(one.values)]
    if not some:
        raise DataError(f"{role} has no rows")
    try:
        classes = np.unique(np.concatenate(some))
    except TypeError:
        kinds = sorted({type(value).__name__ for values in some for value in values})
        raise DataError(f"{role} holds labels of several kinds ({', '.join(kinds)}); make them one kind") from None
    if any(one.columns > 1 for one in found) and not set(classes.tolist()) <= {0, 1}:
        raise DataError(f"{role} has several columns, which are read as indicators, 0 or 1, of several labels a row")
    return np.arange(2) if any(one.columns > 1 for one in found) else classes


def encode(classes: Any, block: Any) -> Any:
    """The places of a block's labels in `classes`; pandas for pandas."""
    values = flat(block)
    if values.ndim == 2:
        return block
    codes = pd.Index(classes).get_indexer(pd.Index(values)).astype("int32")
    return pd.Series(codes, index=block.index) if hasattr(block, "index") and hasattr(block, "iloc") else codes


def encoded(classes: Any, y: Any) -> Any:
    """`encode` for a collection, lazily, or for what is in memory."""
    function = sealed(encode, classes)
    if partitions.is_frame(y):
        if y.ndim == 2 and len(y.columns) > 1:
            return y
        return y.map_partitions(function, meta=pd.Series([], dtype="int32"), enforce_metadata=False)
    if partitions.is_array(y):
        if y.ndim == 2 and y.shape[1] > 1:
            return y
        return y.map_blocks(function, dtype="int32", drop_axis=list(range(1, y.ndim)))
    return encode(classes, y)


def check_seen(role: str, classes: Any, found: Any) -> None:
    """Refuse labels that training does not see.

    Raises
    ------
    DataError
        Naming them.
    """
    unseen = [label for label in found.tolist() if label not in set(classes.tolist())]
    if unseen:
        some = ", ".join(repr(label) for label in unseen[:5]) + (", ..." if len(unseen) > 5 else "")
        raise DataError(f"{role} holds labels that y does not have: {some}; its classes are {classes.tolist()[:20]}")


def decide(classes: Any, softmax: bool, values: Any) -> Any:
    """The label of each row from what XGBoost gives for it; pandas for pandas.

    Parameters
    ----------
    classes : ndarray
    softmax : bool
        Whether XGBoost gives the class's number itself.
    values : ndarray, Series or DataFrame
        Probabilities: of the second class, or of each.
    """
    index = values.index if hasattr(values, "iloc") else None
    array = np.asarray(values)
    if array.ndim == 2 and len(classes) == 2:
        codes = (array > 0.5).astype("int64")
        return codes if index is None else pd.DataFrame(codes, index=index, columns=values.columns)
    if array.ndim == 2:
        codes = array.argmax(axis=1) if len(array) else np.zeros(0, dtype="int64")
    else:
        codes = array.astype("int64") if softmax else np.minimum(array > 0.5, len(classes) - 1).astype("int64")
    return classes[codes] if index is None else pd.Series(classes[codes], index=index, dtype=pd.Series(classes).dtype)


def probabilities(classes: Any, softmax: bool, values: Any) -> Any:
    """A column for each class; `softmax` for values that are margins."""
    from scipy.special import softmax as of_margins

    array = np.asarray(values)
    if softmax:
        array = of_margins(array, axis=1) if len(array) else array
    elif array.ndim == 1:
        array = np.stack([1.0 - array, array], axis=1)
    if not hasattr(values, "iloc"):
        return array
    names = classes if array.shape[1] == len(classes) else range(array.shape[1])
    return pd.DataFrame(array, index=values.index, columns=list(names))


def decided(function: Any, classes: Any, softmax: bool, values: Any, width: int) -> Any:
    """`decide` or `probabilities` for the values of a collection, lazily; `width` columns, 0 for none."""
    call = sealed(function, classes, softmax)
    if partitions.is_frame(values):
        return values.map_partitions(call, meta=function(classes, softmax, values._meta), enforce_metadata=False)
    sample = function(classes, softmax, np.zeros((1,) * values.ndim, dtype=values.dtype))
    if not width:
        return values.map_blocks(call, dtype=sample.dtype, drop_axis=list(range(1, values.ndim)))
    if values.ndim == 2:
        return values.map_blocks(call, dtype=sample.dtype)
    return values.map_blocks(call, dtype=sample.dtype, new_axis=1, chunks=(values.chunks[0], (width,)))


def write(booster: xgb.Booster, classes: Any) -> None:
    """Keep the classes with the booster, and so in files of the model, unless they are 0, 1, 2, ..."""
    if classes.dtype.kind in "iuf" and np.array_equal(classes, np.arange(len(classes))):
        kept = None
    elif classes.dtype.kind in "mM":
        kept = json.dumps([classes.dtype.str, classes.astype("int64").tolist()])
    elif classes.dtype.kind in "biufU" or all(isinstance(label, str) for label in classes):
        kept = json.dumps([classes.dtype.str, classes.tolist()])
    else:
        kept = None
    booster.set_attr(**{ATTRIBUTE: kept})


def read(booster: xgb.Booster) -> Any:
    """The classes kept with the booster, or None."""
    kept = booster.attr(ATTRIBUTE)
    if kept is None:
        return None
    dtype, values = json.loads(kept)
    if np.dtype(dtype).kind in "mM":
        return np.array(values, dtype="int64").astype(dtype)
    return np.array(values, dtype=dtype)
