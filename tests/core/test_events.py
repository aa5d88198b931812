"""Events: what listeners see, early or late, and what is refused."""

from __future__ import annotations

import dataclasses
import logging
import threading
from typing import Any

import pytest

from dask_bridges.events import Event, EventStream, Finished, Log, Metrics, Progress, Span, Started, from_message


def log(text: str, **fields: Any) -> Log:
    return Log(gang="g", text=text, **fields)


@pytest.mark.parametrize(
    "event",
    [
        Started(gang="g", rank=1, worker="tcp://1", host="1"),
        Progress(gang="g", done=1, total=2, unit="epoch"),
        Metrics(gang="g", step=3, values={"valid-auc": 0.5}),
        Span(gang="g", kind="compute", seconds=0.25),
        log("a line", level=logging.WARNING, attempt=2),
        Finished(gang="g", rank=0),
    ],
)
def test_an_event_survives_the_trip_as_plain_data(event: Event) -> None:
    assert from_message(event.to_message()) == event


def test_events_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        log("a").text = "b"  # type: ignore[misc]


def test_what_a_newer_version_says_is_passed_over() -> None:
    known = log("a")
    assert from_message({"event": "Teleported", "gang": "g"}) is None
    assert from_message({**known.to_message(), "colour": "red"}) == known


def test_all_listeners_see_the_whole_run_also_late_ones() -> None:
    stream = EventStream("g")
    early: list[Any] = []
    late: list[Any] = []
    stream.listen(early.append)
    stream.publish(log("one"))
    stream.listen(late.append)
    stream.publish(log("two"))
    assert [e.text for e in early] == [e.text for e in late] == ["one", "two"]


def test_a_listener_from_another_thread_misses_nothing() -> None:
    stream, total = EventStream("g"), 3000

    def talk() -> None:
        for done in range(total):
            stream.publish(Progress(gang="g", done=done))

    heard: list[list[Any]] = []
    talker = threading.Thread(target=talk)
    talker.start()
    while talker.is_alive() and len(heard) < 20:
        heard.append([])
        stream.listen(heard[-1].append)
    talker.join()
    assert all([event.done for event in seen] == list(range(total)) for seen in heard)


def test_events_of_another_attempt_or_gang_are_refused() -> None:
    stream = EventStream("g")
    stream.attempt = 2
    for event in (log("stale", attempt=1), log("mine", attempt=2), Log(gang="h", text="theirs", attempt=2)):
        stream.receive((0.0, event.to_message()))
    assert [event.text for event in stream.events if isinstance(event, Log)] == ["mine"]


def test_a_listener_that_fails_is_dropped_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    stream = EventStream("g")
    seen: list[Any] = []

    def fail(event: Event) -> None:
        raise RuntimeError("deliberate")

    stream.listen(fail)
    stream.listen(seen.append)
    stream.publish(log("one"))
    stream.publish(log("two"))
    assert [event.text for event in seen] == ["one", "two"]
    assert caplog.text.count("a listener failed and is dropped") == 1


def test_a_message_that_is_no_event_is_passed_over() -> None:
    stream = EventStream("g")
    for message in ("text", 3, None, {}, {"a": 1}):
        stream.receive((0.0, message))
    assert stream.events == []
