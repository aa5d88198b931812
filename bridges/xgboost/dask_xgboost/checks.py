"""What is refused before anything starts, each with its remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dask_bridges.errors import DataError
from dask_xgboost.blocks import BlockInfo

__all__ = [
    "check_array",
    "check_columns",
    "check_cuts",
    "check_field",
    "check_labels",
    "check_params",
    "check_ranks",
    "check_width",
]

_GLOBAL_ONLY = {
    "booster": {"gblinear": "it updates one weight vector in place; use gbtree or dart"},
    "tree_method": {
        "exact": "it needs all rows in one process; use hist",
        "approx": "the partitions are binned once, which is hist's way; use hist",
    },
    "objective": {"survival:cox": "its risk sets span all rows; use survival:aft"},
}


def check_params(params: Mapping[str, Any]) -> None:
    """Refuse what cannot be trained by several workers.

    Raises
    ------
    ValueError
        Naming the parameter and what to use.
    """
    for name, refused in _GLOBAL_ONLY.items():
        value = params.get(name)
        if value in refused:
            raise ValueError(f"{name}={value!r} cannot be trained on a cluster: {refused[value]}")
    updaters = str(params.get("updater", "")).split(",")
    for updater in ("shotgun", "coord_descent", "grow_colmaker"):
        if updater in updaters:
            raise ValueError(f"updater={updater!r} cannot be trained on a cluster; leave updater out")
    if "refresh" in updaters:
        raise ValueError(
            "updater='refresh' cannot be trained on a cluster: XGBoost takes the largest of the workers' sums for each "
            "node, not the sum of all, and wants features as they are, not binned. Use xgboost.train on one machine"
        )


def check_ranks(params: Mapping[str, Any], ranks: int) -> None:
    """Refuse what XGBoost does in one process only, where there are several.

    Raises
    ------
    ValueError
        Naming the parameter and what to use.
    """
    if params.get("process_type") == "update" and ranks > 1:
        raise ValueError(
            f"process_type='update' on {ranks} workers: XGBoost fails to send updated trees to other processes. Use "
            "n_workers=1"
        )


def check_cuts(cuts: str) -> None:
    """Refuse what is no way to find cuts.

    Raises
    ------
    ValueError
    """
    if cuts not in ("auto", "quantiles", "sketch"):
        raise ValueError(f"cuts={cuts!r}: give 'auto', 'quantiles' or 'sketch'")


def check_columns(role: str, meta: Any) -> None:
    """Refuse columns that XGBoost has no numbers for, by the dtypes Dask declares.

    Raises
    ------
    DataError
        Naming column, dtype and remedy.
    """
    import pandas as pd

    for name, dtype in meta.dtypes.items():
        if isinstance(dtype, pd.CategoricalDtype) or pd.api.types.is_bool_dtype(dtype):
            continue
        if pd.api.types.is_datetime64_any_dtype(dtype) or pd.api.types.is_timedelta64_dtype(dtype):
            remedy = f"take numbers from it, such as frame[{name!r}].dt.dayofyear, or drop it"
        elif pd.api.types.is_complex_dtype(dtype) or _is_nested(dtype):
            remedy = "spread it over columns of numbers, or drop it"
        elif pd.api.types.is_numeric_dtype(dtype):
            continue
        else:
            remedy = f"convert it, frame.astype({{{name!r}: 'category'}}), or drop it"
        raise DataError(f"column {name!r} of {role} has dtype {dtype}, which XGBoost cannot train on: {remedy}")


def check_array(role: str, dtype: Any) -> None:
    """Refuse arrays of text, dates and the like.

    Raises
    ------
    DataError
        Naming dtype and remedy.
    """
    if dtype is not None and np.dtype(dtype).kind not in "biufO":
        raise DataError(f"{role} has dtype {dtype}, which XGBoost cannot train on: make numbers of it, or drop it")


def check_field(name: str, meta: Any) -> None:
    """Refuse labels, weights and so on that are no numbers, by the dtypes Dask declares.

    Raises
    ------
    DataError
        Naming field, dtype and remedy.
    """
    import pandas as pd

    dtypes = [meta.dtype] if hasattr(meta, "dtype") else list(getattr(meta, "dtypes", []))
    for dtype in dtypes:
        if isinstance(dtype, pd.CategoricalDtype) or not pd.api.types.is_numeric_dtype(dtype):
            raise DataError(
                f"{name} has dtype {dtype}, and numbers are wanted: for classes, their codes, such as "
                "frame.astype({'the column': 'category'}).categorize() and then .cat.codes of it"
            )


def check_width(name: str, collection: Any) -> None:
    """Refuse several columns where each row has one value: a table of weights, of query ids, of bounds.

    Raises
    ------
    DataError
        Naming the field and its columns.
    """
    columns = collection.shape[1] if getattr(collection, "ndim", 1) == 2 else 1
    if name not in ("label", "base_margin") and columns != 1:
        raise DataError(f"{name} has {columns} columns; one value a row is wanted")


def _is_nested(dtype: Any) -> bool:
    import pandas as pd

    if not isinstance(dtype, pd.ArrowDtype):
        return False
    import pyarrow as pa

    return bool(pa.types.is_nested(dtype.pyarrow_dtype))


#: objective prefix -> (test of one value range, what labels must be)
_LABEL_RULES: Sequence[tuple[tuple[str, ...], Any, str]] = (
    (("binary:", "reg:logistic"), lambda f: f.low >= 0 and f.high <= 1, "between 0 and 1"),
    (("count:poisson", "reg:tweedie"), lambda f: f.low >= 0, "0 or more"),
    (("reg:gamma",), lambda f: f.low > 0, "greater than 0"),
    (("reg:squaredlogerror",), lambda f: f.low > -1, "greater than -1"),
    (("rank:",), lambda f: f.low >= 0, "relevance degrees of 0 or more"),
)


def check_labels(role: str, params: Mapping[str, Any], infos: Sequence[BlockInfo]) -> None:
    """Hold the labels of every partition against the objective.

    Raises
    ------
    DataError
        Naming the partition, what was found and what the objective takes.
    """
    objective = str(params.get("objective", "reg:squarederror"))
    for index, info in enumerate(infos):
        for name, found in info.fields.items():
            where = f"partition {index} of {role}: {name}"
            if found.bad and name != "base_margin" and not name.startswith("label_"):
                raise DataError(f"{where} has {found.bad} missing or infinite values; drop those rows")
            if found.missing and name.startswith("label_"):
                raise DataError(
                    f"{where} has {found.missing} missing values; drop those rows (a bound may be infinite)"
                )
            if name == "weight" and found.low < 0:
                raise DataError(f"{where} goes down to {found.low:g}; weights are 0 or more")
            if name == "label" and found.low <= found.high:
                _check_label(where, objective, params, found)


def _check_label(where: str, objective: str, params: Mapping[str, Any], found: Any) -> None:
    seen = f"{where} holds values from {found.low:g} to {found.high:g}, but {objective} takes"
    for prefixes, holds, text in _LABEL_RULES:
        if objective.startswith(prefixes) and not holds(found):
            raise DataError(f"{seen} labels {text}")
    if objective.startswith("multi:"):
        classes = params.get("num_class")
        if classes is None:
            raise DataError(f"{objective} needs num_class in params: the number of classes")
        if not found.whole or found.low < 0 or found.high >= int(classes):
            raise DataError(f"{seen} whole numbers from 0 to num_class - 1 = {int(classes) - 1}")
