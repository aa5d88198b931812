"""The flights as a network takes them: categories as numbers, the other columns on one scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
from dask.base import compute

from dask_bridges.demo.flights import CATEGORICAL, FEATURES
from dask_bridges.shipping import sealed

__all__ = ["NUMBERS", "Scaling", "inputs"]

NUMBERS = [column for column in FEATURES if column not in CATEGORICAL]


@dataclass(frozen=True)
class Scaling:
    """What brings the columns :data:`NUMBERS` of the training rows to mean 0 and deviation 1."""

    mean: pd.Series
    deviation: pd.Series

    @classmethod
    def of(cls, train: Any) -> Scaling:
        """Of all rows of a dask dataframe."""
        numbers = train[NUMBERS].astype("float64")
        return cls(*compute(numbers.mean(), numbers.std()))

    def __call__(self, part: pd.DataFrame) -> pd.DataFrame:
        """Scaled, and the mean where the weather was not recorded."""
        scaled: pd.DataFrame = ((part[NUMBERS] - self.mean) / self.deviation).fillna(0.0).astype("float32")
        return scaled


def inputs(flights: Any, scaling: Scaling) -> dict[str, Any]:
    """The model's inputs, by name: a series of numbers from 0 for each category, and the rest as one dataframe.

    Parameters
    ----------
    flights : dask.dataframe.DataFrame
        Its categories are known, so that a number stands for the same one in every partition. 0 is for a missing one.
    scaling : Scaling

    Returns
    -------
    dict
        Of dask collections with the rows and partitions of `flights`.
    """
    codes = {column: (flights[column].cat.codes + 1).astype("int32") for column in CATEGORICAL}
    return {**codes, "numbers": flights.map_partitions(sealed(_scaled, scaling=scaling))}


def _scaled(part: pd.DataFrame, *, scaling: Scaling) -> pd.DataFrame:
    return scaling(part)
