"""The sets of rows that a `fit` is given: for training, and to evaluate on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dask
import numpy as np

from dask_bridges.errors import DataError

__all__ = ["Rows", "sets_of", "split_qid", "with_groups"]


@dataclass(frozen=True)
class Rows:
    """Features, labels and what else belongs to each row of one set, as a user gave them.

    Attributes
    ----------
    role : str
        What messages call it: "" for the training set.
    X, label, weight, base_margin, qid
    """

    role: str
    X: Any
    label: Any
    weight: Any = None
    base_margin: Any = None
    qid: Any = None

    @property
    def fields(self) -> dict[str, Any]:
        """The fields given, by XGBoost's names."""
        names = ("label", "weight", "base_margin", "qid")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def name(self, field: str) -> str:
        """What messages call a field."""
        own = {"X": "X", "label": "y", "weight": "sample_weight", "base_margin": "base_margin", "qid": "qid"}[field]
        return f"{own} of {self.role}" if self.role else own

    def lazy(self) -> bool:
        """Whether these are Dask collections.

        Raises
        ------
        DataError
            If some are and some are not.
        """
        kinds = {name: dask.is_dask_collection(value) for name, value in {"X": self.X, **self.fields}.items()}
        if len(set(kinds.values())) > 1:
            here = [self.name(name) for name, lazy in kinds.items() if not lazy]
            there = [self.name(name) for name, lazy in kinds.items() if lazy]
            raise DataError(
                f"Dask collections are {' and '.join(there)}, and in memory {' and '.join(here)}. Give all of a set as "
                "one or the other: dask.array.from_array and dask.dataframe.from_pandas make collections"
            )
        return bool(kinds["X"])

    def check_lengths(self) -> None:
        """Refuse fields in memory that do not match `X` row for row.

        Raises
        ------
        DataError
            Naming both lengths.
        """
        rows = _length(self.X)
        for name, values in self.fields.items():
            if _length(values) != rows:
                raise DataError(
                    f"{self.name('X')} has {rows} rows and {self.name(name)} has {_length(values)}: they must match "
                    "row for row"
                )


def _length(values: Any) -> int:
    return int((values if hasattr(values, "shape") else np.asarray(values)).shape[0])


def sets_of(X: Any, y: Any, given: Mapping[str, Any]) -> list[Rows]:
    """The training set and those of `eval_set`; one that is the training set is the same object."""
    first = Rows("", X, y, given["sample_weight"], given["base_margin"], _groups(given.get("qid"), given.get("group")))
    evals = given["eval_set"] or ()
    extra = [
        _one_each(name, given.get(name), given["eval_set"])
        for name in ("sample_weight_eval_set", "base_margin_eval_set", "eval_qid", "eval_group")
    ]
    sets = [first]
    for number, ((eval_X, eval_y), weight, margin, qid, group) in enumerate(zip(evals, *extra)):
        rows = Rows(f"eval_set[{number}]", eval_X, eval_y, weight, margin, _groups(qid, group))
        same = all(
            one is other
            for one, other in zip(
                (eval_X, eval_y, weight, margin, qid, group),
                (X, y, first.weight, first.base_margin, given.get("qid"), given.get("group")),
            )
        )
        sets.append(first if same else rows)
    return sets


def _one_each(name: str, values: Sequence[Any] | None, evals: Sequence[Any] | None) -> Sequence[Any]:
    if values is None:
        return [None] * len(evals or ())
    if len(values) != len(evals or ()):
        raise DataError(f"{name} has {len(values)} entries, and eval_set {len(evals or ())}")
    return values


def _groups(qid: Any, group: Any) -> Any:
    """Query ids; from the sizes of groups where these are given."""
    if group is None:
        return qid
    if dask.is_dask_collection(group):
        raise DataError("group is of no use for collections, whose rows come in partitions: pass qid")
    sizes = np.asarray(group)
    return np.repeat(np.arange(len(sizes)), sizes)


def split_qid(X: Any) -> tuple[Any, Any]:
    """A frame without its column of query ids, and that column."""
    if "qid" not in getattr(X, "columns", ()):
        return X, None
    return X.drop(columns="qid"), X["qid"]


def with_groups(rows: Rows) -> Rows:
    """The rows with their query ids; weights of groups in memory become those of their rows."""
    X, column = split_qid(rows.X)
    if column is not None and rows.qid is not None:
        raise DataError(f"{rows.name('X')} has a column 'qid', and qid is given too: leave one out")
    qid = rows.qid if column is None else column
    if qid is None:
        raise DataError(f"{rows.name('qid')} is missing: a ranking needs the query of each row")
    weight = rows.weight
    if weight is not None and not rows.lazy():
        groups, places = np.unique(np.asarray(qid), return_inverse=True)
        if len(weight) != len(groups):
            raise DataError(f"{rows.name('weight')} has {len(weight)} entries for {len(groups)} query groups")
        weight = np.asarray(weight)[places]
    return dataclasses.replace(rows, X=X, qid=qid, weight=weight)
