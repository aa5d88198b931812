"""What a member's time goes into: added up without gaps, told only where somebody wants to know."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from dask_bridges.events import Event, Spent
from dask_bridges.tally import Tally, slept


class Told(list[dict[str, Any]]):
    """What a tally has told."""

    def __call__(self, kind: type[Event], **fields: Any) -> None:
        assert kind is Spent
        self.append(fields)


def test_windows_and_kinds_cover_all_of_the_time() -> None:
    told = Told()
    tally = Tally(told, True)
    tally.begin()
    start = time.perf_counter()
    for _ in range(3):
        with tally.timed("checkpoint"), tally.timed("communicate"):
            threading.Event().wait(0.01)
        tally.tell("compute", now=True)
    lasted = time.perf_counter() - start
    assert sum(window["window"] for window in told) == pytest.approx(lasted, rel=0.05)
    for window in told:
        assert sum(window["seconds"].values()) == pytest.approx(window["window"])
        assert window["seconds"]["communicate"] >= 0.01 > window["seconds"]["checkpoint"]  # what is inside counts once


def test_rows_are_those_since_the_last_telling() -> None:
    told = Told()
    tally = Tally(told, True)
    threads = [threading.Thread(target=lambda: [tally.fed(1, 8) for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tally.tell("", now=True)
    tally.tell("", now=True)
    assert [(window["rows"], window["nbytes"], window["seconds"]) for window in told] == [
        (4000, 32_000, {}),
        (0, 0, {}),
    ]


def test_it_tells_a_few_times_a_second_however_often_it_may() -> None:
    told = Told()
    tally = Tally(told, True)
    for _ in range(10_000):
        tally.tell("compute")
    assert len(told) <= 1 + (time.perf_counter() - tally._first) / 0.5


def test_where_nobody_wants_to_know_nothing_is_told() -> None:
    told = Told()
    tally = Tally(told, False)
    with tally.timed("communicate"):
        tally.fed(1, 8)
    tally.tell("compute", now=True)
    assert not tally.due
    assert told == []


def test_a_thread_that_waits_sleeps_and_one_that_computes_does_not() -> None:
    before = slept()
    threading.Event().wait(0.2)
    waited = slept() - before
    before, used = slept(), time.thread_time()
    while time.thread_time() - used < 0.2:
        sum(range(1000))
    assert slept() - before < waited / 2
    assert waited == pytest.approx(0.2, rel=0.5)
