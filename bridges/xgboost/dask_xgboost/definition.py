"""What a distributed matrix is made of, checked before anything is computed."""

from __future__ import annotations

from typing import Any

import numpy as np

from dask_bridges import partitions
from dask_bridges.errors import DataError
from dask_xgboost import checks
from dask_xgboost.matrixspec import MatrixOptions

__all__ = ["Definition", "label_of"]


class Definition:
    """The collections of a matrix, and what their columns are.

    Parameters
    ----------
    X : dask array or dataframe
    fields : dict
        Collections, or names of columns of `X`, by XGBoost's names; None stands for none.
    options : MatrixOptions
    role : str
        What error messages call it.

    Raises
    ------
    DataError
        If a column is of no use to XGBoost, or there are no labels.
    """

    def __init__(self, X: Any, fields: dict[str, Any], options: MatrixOptions, role: str) -> None:
        self.source, self.role, self.options = X, role, options
        given = {name: value for name, value in fields.items() if value is not None}
        self.columns = {name: value for name, value in given.items() if isinstance(value, str)}
        for name, column in self.columns.items():
            _check_column_name(X, role, name, column)
        self.features = _features_meta(X, role, list(self.columns.values()))
        if not {"label", "label_lower_bound"} & set(given):
            raise DataError(
                f"{role} has no labels: pass y (a collection, or the name of a column of the dataframe), "
                "or label=, or label_lower_bound= and label_upper_bound="
            )
        self.feature_names, self.feature_types = self._name_features(options)
        others = {name: value for name, value in given.items() if name not in self.columns}
        for name, column in self.columns.items():
            checks.check_field(f"{name}={column!r}", X._meta[column])
        for name, value in others.items():
            checks.check_width(name, value)
            if partitions.is_frame(value):
                checks.check_field(name, value._meta)
        self.collections = {"X": X, **others}

    def _name_features(self, options: MatrixOptions) -> tuple[list[str] | None, list[str] | None]:
        for name in ("feature_names", "feature_types", "feature_weights"):
            given = getattr(options, name)
            if given is not None and len(given) != self.num_features:
                raise DataError(f"{name} has {len(given)} entries for the {self.num_features} features of {self.role}")
        if not partitions.is_frame(self.source):
            checks.check_array(self.role, self.source.dtype)
            names, types = options.feature_names, options.feature_types
            return None if names is None else [str(name) for name in names], None if types is None else list(types)
        checks.check_columns(self.role, self.features)
        if self.role == "X" and (options.feature_names is not None or options.feature_types is not None):
            raise DataError("X is a dataframe, whose columns have names and types: rename or convert those")
        if not options.enable_categorical:
            _refuse_categoricals(self.features)
        return [str(name) for name in self.features.columns], None

    @property
    def num_features(self) -> int:
        """Number of feature columns."""
        return int(self.features.shape[1])

    def labels(self) -> Any:
        """The collection of the labels."""
        column = self.columns.get("label")
        return self.collections["label"] if column is None else self.collections["X"][column]


def label_of(y: Any, label: Any) -> Any:
    """The one of the two that is given.

    Raises
    ------
    DataError
        If both are, or a number.
    """
    if isinstance(y, (int, np.integer)) and not isinstance(y, bool):
        raise DataError(f"y={y} is a number, not labels; for the number of rounds pass num_boost_round={y}")
    if y is not None and label is not None:
        raise DataError("y and label are the same thing: pass one of them")
    return label if y is None else y


def _check_column_name(X: Any, role: str, name: str, column: str) -> None:
    if not hasattr(X, "columns"):
        raise DataError(
            f"{name}={column!r} names a column, but {role} is not a dataframe: pass the values as a collection"
        )
    if column not in list(X.columns):
        raise DataError(f"{name}={column!r} is not a column of {role}; it has {list(X.columns)}")


def _features_meta(X: Any, role: str, fields: list[str]) -> Any:
    """An empty frame with the feature columns, or the array itself."""
    if partitions.is_frame(X):
        if not hasattr(X, "columns") or X.ndim != 2:
            raise DataError(f"{role} is a series; for a single feature pass {role}.to_frame()")
        return X._meta.drop(columns=list(dict.fromkeys(fields)))
    if partitions.is_array(X) and X.ndim != 2:
        raise DataError(f"{role} has {X.ndim} dimensions; rows and features, so two, are wanted")
    if not partitions.is_array(X):
        raise DataError(
            f"{role} is a {type(X).__module__.split('.')[0]} {type(X).__name__}, not a Dask collection: make it one "
            "with dask.array.from_array or dask.dataframe.from_pandas"
        )
    return X


def _refuse_categoricals(meta: Any) -> None:
    names = [name for name, dtype in meta.dtypes.items() if str(dtype) == "category"]
    if names:
        raise DataError(f"columns {names} are categorical and enable_categorical is False; encode them, or allow it")
