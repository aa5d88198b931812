"""What happens to one partition on its worker: fields split off, described, made ready for XGBoost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dask_bridges.partitions import Part

__all__ = ["FIELDS", "BlockInfo", "groups_of", "inspect", "recode", "split", "union_of_categories"]

#: The fields of a matrix beside its features, by XGBoost's names.
FIELDS = ("label", "weight", "base_margin", "qid", "label_lower_bound", "label_upper_bound")


@dataclass(frozen=True)
class FieldInfo:
    """Range of a numeric field in one partition; `bad` counts NaN and infinite values, `missing` NaN."""

    low: float
    high: float
    whole: bool
    bad: int
    missing: int = 0


@dataclass(frozen=True)
class BlockInfo:
    """What the client wants to know of one partition.

    Attributes
    ----------
    columns : tuple
        Feature columns; their number only where the block has no names.
    categories : dict
        pandas Index of the categories of each categorical column.
    fields : dict
        `FieldInfo` of each numeric field.
    groups : ndarray or None
        The distinct query ids.
    sparse : bool
        Whether it is a sparse matrix.
    """

    columns: tuple[Any, ...]
    categories: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, FieldInfo] = field(default_factory=dict)
    groups: Any = None
    sparse: bool = False


def split(part: Part, columns: Mapping[str, str]) -> tuple[Any, dict[str, Any]]:
    """The features of a part, and its fields by name.

    Parameters
    ----------
    part : dict
        "X" and those fields that are collections of their own.
    columns : mapping of str to str
        Fields that are columns of X.
    """
    X = part["X"]
    fields = {name: block for name, block in part.items() if name != "X"}
    if columns:
        fields.update({name: X[column] for name, column in columns.items()})
        X = X.drop(columns=list(dict.fromkeys(columns.values())))
    return X, fields


def as_array(values: Any) -> Any:
    """A field as a float array: missing values of pandas become NaN, one column becomes flat."""
    if hasattr(values, "to_numpy"):
        # pandas: a nullable dtype needs the word float to turn its NA into NaN.
        values = values.to_numpy(dtype="float64", na_value=np.nan) if values.ndim == 1 else values.to_numpy()
    values = np.asarray(values)
    return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values


def groups_of(part: Part, columns: Mapping[str, str]) -> Any:
    """The query id of each row of a part, flat; `columns` as in `split`."""
    return np.asarray(part["X"][columns["qid"]] if "qid" in columns else part["qid"]).reshape(-1)


def inspect(part: Part, columns: tuple[tuple[str, str], ...] = ()) -> BlockInfo:
    """Describe a part; `columns` as pairs, see `split`."""
    X, fields = split(part, dict(columns))
    names = tuple(X.columns) if hasattr(X, "columns") else (X.shape[1],)
    return BlockInfo(
        names,
        categories=_categories(X),
        fields={name: _range(as_array(values)) for name, values in fields.items() if name != "qid"},
        groups=np.unique(groups_of(part, dict(columns))) if "qid" in fields else None,
        sparse=hasattr(X, "tocsr"),
    )


def _range(values: Any) -> FieldInfo:
    values = np.asarray(values, dtype="float64")
    finite = np.isfinite(values)
    missing = int(np.isnan(values).sum())
    if not finite.any():
        return FieldInfo(np.inf, -np.inf, True, int(values.size), missing)
    good = values[finite]
    whole = bool((good == np.floor(good)).all())
    return FieldInfo(float(good.min()), float(good.max()), whole, int((~finite).sum()), missing)


def _categories(X: Any) -> dict[str, Any]:
    if not hasattr(X, "dtypes") or not hasattr(X, "columns"):
        return {}
    return {name: X[name].cat.categories for name in X.columns if X[name].dtype == "category"}


def union_of_categories(infos: Iterable[BlockInfo]) -> dict[str, Any]:
    """The categories of each categorical column, over all partitions; sorted, where they do not agree."""
    union: dict[str, Any] = {}
    for info in infos:
        for name, found in info.categories.items():
            known = union.get(name)
            union[name] = found if known is None or known.equals(found) else known.union(found)
    return union


def recode(X: Any, categories: Mapping[str, Any]) -> Any:
    """Give categorical columns the categories all partitions agreed on, in their order."""
    changed = {
        name: X[name].cat.set_categories(wanted)
        for name, wanted in categories.items()
        if not X[name].cat.categories.equals(wanted)
    }
    if changed:
        X = X.copy(deep=False)
        for name, column in changed.items():
            X[name] = column
    return X
