"""The demo's flights."""

from __future__ import annotations

from collections.abc import Iterator

import dask
import pandas as pd
import pytest
from distributed import Client

from dask_bridges import PlacementError
from dask_bridges.demo import flights

FLIGHTS = 336_776
NEVER_ARRIVED = 9_430


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        yield client


@pytest.fixture(scope="module")
def data(client: Client) -> flights.Flights:
    return flights.load(client)


@pytest.fixture(scope="module")
def parts(data: flights.Flights) -> dict[str, pd.DataFrame]:
    return dict(zip(("train", "valid", "test"), dask.compute(data.train, data.valid, data.test)))


@pytest.fixture(scope="module")
def raw() -> pd.DataFrame:
    return pd.read_csv(flights._folder() / "flights.csv.zip")


def test_every_flight_is_there_once(data: flights.Flights, parts: dict[str, pd.DataFrame]) -> None:
    assert data.total == FLIGHTS
    assert data.dropped == NEVER_ARRIVED
    assert sum(map(len, parts.values())) == FLIGHTS - NEVER_ARRIVED


def test_the_months_hold_the_flights_that_leave_in_them(raw: pd.DataFrame) -> None:
    counts = raw.groupby("month").size()
    for month in (1, 2, 12):
        part = flights.read_month(pd.Timestamp(2013, month, 1))
        assert len(part) == counts[month]
        assert set(part.index.month) == {month}
        assert part.index.is_monotonic_increasing


def test_only_what_is_known_before_departure_is_a_feature(data: flights.Flights) -> None:
    known = {"carrier", "origin", "dest", "sched_dep_time", "sched_arr_time", "hour", "weekday", "distance"}
    weather = set(pd.read_csv(flights._folder() / "weather.csv", nrows=1).columns) - {"time_hour"}
    for part in (data.train, data.valid, data.test):
        assert list(part.columns) == [*flights.FEATURES, "late"]
    assert set(flights.FEATURES) <= known | weather
    assert "late" not in flights.FEATURES


def test_the_split_is_by_date(parts: dict[str, pd.DataFrame]) -> None:
    train, valid, test = (pd.DatetimeIndex(part.index) for part in parts.values())
    assert train.min().month == 1
    assert train.max() < pd.Timestamp(2013, 11, 1)
    assert valid.min() >= pd.Timestamp(2013, 9, 1)
    assert valid.max() < pd.Timestamp(2013, 11, 1)
    assert test.min() >= pd.Timestamp(2013, 11, 1)
    assert test.max() >= pd.Timestamp(2013, 12, 31)


def test_weeks_are_held_out_whole(parts: dict[str, pd.DataFrame]) -> None:
    weeks = {name: set(pd.DatetimeIndex(part.index).isocalendar().week) for name, part in parts.items()}
    assert len(weeks["valid"]) == 4
    autumn = parts["train"].loc["2013-09":]
    assert not weeks["valid"] & set(pd.DatetimeIndex(autumn.index).isocalendar().week)


def test_late_is_more_than_15_minutes(parts: dict[str, pd.DataFrame], raw: pd.DataFrame) -> None:
    late = sum(int(part["late"].sum()) for part in parts.values())
    assert late == (raw["arr_delay"] > 15).sum()


def test_the_weather_is_that_of_the_hour_at_the_origin(parts: dict[str, pd.DataFrame]) -> None:
    weather = pd.read_csv(flights._folder() / "weather.csv")
    at_noon = weather.query("origin == 'JFK' and month == 7 and day == 4 and hour == 12")
    row = parts["train"].loc["2013-07-04 12:00":"2013-07-04 12:59"].query("origin == 'JFK'")
    assert len(row) > 0
    assert row["temp"].to_numpy() == pytest.approx(float(at_noon["temp"].iloc[0]))
    assert row["wind_speed"].to_numpy() == pytest.approx(float(at_noon["wind_speed"].iloc[0]), rel=1e-6)


def test_categories_are_the_same_in_every_part(parts: dict[str, pd.DataFrame]) -> None:
    train, valid, test = parts.values()
    for column, known in (("carrier", 16), ("origin", 3), ("dest", 105)):
        assert train[column].dtype == valid[column].dtype == test[column].dtype
        assert abs(len(train[column].cat.categories) - known) <= 1


def test_fewer_rows_are_a_repeatable_sample_of_the_year(client: Client) -> None:
    january = pd.Timestamp(2013, 1, 1)
    sample = flights.load(client, rows=12_000)
    assert abs(sample.total - 12_000) <= 12
    assert 0 < sample.dropped < 1000
    pd.testing.assert_frame_equal(flights.read_month(january, 12_000), flights.read_month(january, 12_000))


def test_a_package_the_workers_lack_is_named(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flights, "_REMEDIES", {"no_such_package": "pip install it"})
    with pytest.raises(PlacementError, match=r"no_such_package is missing on 2 of 2 workers .* pip install it"):
        flights.load(client)
