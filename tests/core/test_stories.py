"""What events come to: who did what when, how much of the time nobody computed, and that it stays small."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_bridges.events import (
    Down,
    Ended,
    Event,
    Failed,
    Lost,
    Memory,
    Metrics,
    Offered,
    Placed,
    Planned,
    Ran,
    Span,
    Spent,
    Started,
    Up,
)
from dask_bridges.reporting import Recorder, read
from dask_bridges.reporting.cells import attempt_cells, failures, overcome
from dask_bridges.reporting.shares import Shares
from dask_bridges.reporting.story import MOST, Piece, Row, Story

#: The start of all stories here.
ZERO = 1_700_000_000.0


def told(*events: Event, length: float = 10.0) -> Story:
    """The story of some events, of so many seconds."""
    story = Story(ZERO, ZERO + length)
    for event in events:
        story.add(event)
    return story


def at(second: float, of: type[Event], rank: int = -1, gang: str = "g", attempt: int = 1, **fields: Any) -> Event:
    return of(gang=gang, attempt=attempt, rank=rank, time=ZERO + second, **fields)


def planned(names: list[str], second: float = 0.0, **fields: Any) -> Event:
    return at(second, Planned, label="training", run="r", names=names, **fields)


def timeline(row: Row) -> list[tuple[float, float, dict[str, float]]]:
    """What a row did, in seconds from the start of the story."""
    return [
        (round(piece.start - ZERO, 3), round(piece.end - ZERO, 3), {k: round(v, 3) for k, v in piece.seconds.items()})
        for piece in row.pieces
    ]


def test_what_is_inside_a_span_is_what_its_time_went_into() -> None:
    story = told(
        planned(["a"]),
        at(2, Span, 0, kind="receive", seconds=1),
        at(3, Span, 0, kind="receive", seconds=0.5),
        at(5, Span, 0, kind="compute", seconds=5),
    )
    assert timeline(story.runs[0].rows["a"]) == [
        (0, 1, {"compute": 1}),
        (1, 2, {"receive": 1}),
        (2, 2.5, {"compute": 0.5}),
        (2.5, 3, {"receive": 0.5}),
        (3, 5, {"compute": 2}),
    ]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), max_size=30))
def test_pieces_never_overlap_and_cover_what_was_told(spans: list[tuple[int, int]]) -> None:
    row = Row("a")
    for start, length in sorted(spans, key=lambda span: (span[0] + span[1], -span[0])):  # by their ends
        row.add(Piece(start, start + length, {"compute": length}))
    ends = [(piece.start, piece.end) for piece in row.pieces]
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ends))
    covered = {second for start, length in spans for second in range(start, start + length)}
    assert row.totals.get("compute", 0) == pytest.approx(len(covered))


def test_pieces_too_short_to_be_seen_count_nevertheless() -> None:
    spans = [at(1 + n / 1000, Span, 0, kind="receive", seconds=0.0004) for n in range(1000)]
    story = told(planned(["a"]), *spans, at(2, Span, 0, kind="compute", seconds=1))
    totals = story.runs[0].rows["a"].totals
    assert totals == {"receive": pytest.approx(0.4, abs=1e-3), "compute": pytest.approx(0.6, abs=1e-3)}


def test_waiting_starting_and_the_process_that_comes_are_seen() -> None:
    story = told(
        planned(["a"]), at(1, Span, kind="wait", seconds=1), at(1.5, Started, 0, worker="tcp://w", host="h"),
        at(3, Up, 0), at(4, Span, 0, kind="compute", seconds=1),
    )  # fmt: skip
    assert timeline(story.runs[0].rows["a"]) == [
        (0, 1, {"wait": 1}),
        (1, 1.5, {"start": 0.5}),
        (1.5, 3, {"start": 1.5}),
        (3, 4, {"compute": 1}),
    ]
    assert story.runs[0].rows["a"].workers == {"1": "tcp://w"}


def test_a_process_that_starts_again_restarts_from_its_loss_to_its_return() -> None:
    story = told(
        planned(["a"]), at(0, Span, kind="wait", seconds=0), at(1, Started, 0, worker="w", host="h"), at(1, Up, 0),
        at(4, Down, 0), at(6, Up, 0),
    )  # fmt: skip
    row = story.runs[0].rows["a"]
    assert timeline(row)[-1] == (4, 6, {"restart": 2})
    assert [mark.kind for mark in row.marks] == ["lost", "restarted"]


def test_the_next_attempt_restarts_all_members_from_the_end_of_the_last() -> None:
    story = told(
        planned(["a", "b"]),
        at(0, Span, kind="wait", seconds=0),
        at(1, Started, 0, worker="w0", host="h"),
        at(1, Started, 1, worker="w1", host="h"),
        at(3, Lost, 1, worker="w1"),
        at(4, Ended, error="MemberLost: b", cause=1),
        planned(["a"], 4.5, gang="h", attempt=2),
        at(5, Span, gang="h", attempt=2, kind="wait", seconds=0.5),
        at(6, Started, 0, gang="h", attempt=2, worker="w0", host="h"),
        at(9, Ended, gang="h", attempt=2),
    )
    (run,) = story.runs
    assert timeline(run.rows["a"])[-1] == (4, 6, {"restart": 2})
    assert timeline(run.rows["b"])[-1] == (3, 4, {"restart": 1})  # it did not come back
    assert [(attempt.number, attempt.cause, attempt.error) for attempt in run.attempts] == [
        (1, 1, "MemberLost: b"),
        (2, -1, ""),
    ]


def test_rounds_that_are_done_again_are_told_once() -> None:
    values = [(0, 0.9), (1, 0.8), (2, 0.7), (1, 0.81), (2, 0.71), (3, float("nan"))]
    story = told(planned(["a"]), *(at(1, Metrics, 0, step=step, values={"loss": value}) for step, value in values))
    assert story.runs[0].curves == {"loss": [(0, 0.9), (1, 0.81), (2, 0.71)]}


def test_the_share_in_which_nobody_computed_is_that_of_all_members_together() -> None:
    story = told(
        planned(["a", "b"]),
        at(4, Span, 0, kind="compute", seconds=3),  # from 1 to 4
        at(6, Span, 1, kind="compute", seconds=3),  # from 3 to 6
        at(8, Spent, 0, window=2, seconds={"compute": 0.5, "communicate": 1.5}),
        at(8, Spent, 1, window=2, seconds={"compute": 0.4, "communicate": 1.6}),
    )
    shares = Shares.of(story)
    assert shares.nobody == pytest.approx(1 - 0.55, abs=2e-3)
    assert shares.totals["communicate"] == pytest.approx(0.15, abs=2e-3)  # of the member that waits less
    assert shares.computing.mean() * 10 == pytest.approx(3 + 3 + 0.5 + 0.4, abs=0.01)


def test_what_ended_a_run_is_told_apart_from_what_another_went_on_after() -> None:
    native = "XGBoostError: no such objective\n" + "\n".join(map(str, range(30))) + "\nStack trace:\n [bt] (0)"
    story = told(
        planned(["a"]),
        at(1, Ended, error="MemberLost: a", cause=0),
        planned(["a"], second=2, gang="h", attempt=2),
        at(3, Ended, gang="h", attempt=2),
        at(4, Planned, gang="i", label="search", run="s", names=["b"]),
        at(5, Ended, gang="i", error=native, cause=0),
    )
    assert overcome(story) == ["1 training, attempt 1: MemberLost: a"]
    assert failures(story) == ["2 search, attempt 1: XGBoostError: no such objective\n0\n1\n2\n3\n…"]
    assert attempt_cells(story.runs[1])[1][-1] == "XGBoostError: no such objective"


def test_jobs_that_share_a_device_have_a_row_each() -> None:
    story = told(
        planned(["host"]),
        at(0, Started, 0, worker="w", host="h"),
        at(1, Offered, 0, worker="w", devices=["gpu0"]),
        at(4, Ran, 0, key="first", devices=["gpu0"], seconds=3),
        at(5, Ran, 0, key="second", devices=["gpu0"], seconds=3, error="MemberLost: it crashed"),
        at(8, Ran, 0, key="third", devices=["gpu0"], seconds=3),
    )
    rows = story.runs[0].rows
    assert [piece.text for piece in rows["gpu0 on w"].pieces] == ["first", "third"]
    assert [piece.text for piece in rows["gpu0 on w, 2"].pieces] == ["second: MemberLost: it crashed"]
    assert [mark.kind for mark in rows["gpu0 on w, 2"].marks] == ["failed"]
    assert story.runs[0].done == {"job": 3}
    assert [name for name, row in rows.items() if row.device] == ["gpu0 on w", "gpu0 on w, 2"]
    assert attempt_cells(story.runs[0])[1][2] == "1"  # the host is a member, and devices are none


def test_a_long_run_stays_small_and_keeps_its_sums() -> None:
    story = told(planned(["a"]), length=30_000)
    for second in range(30_000):
        story.add(at(second + 1, Spent, 0, window=1, seconds={"compute": 0.75, "communicate": 0.25}, rows=7, nbytes=56))
        story.add(at(second + 1, Memory, 0, nbytes=second, limit=100))
        story.add(at(second + 1, Metrics, 0, step=second, values={"loss": 1.0}))
    row = story.runs[0].rows["a"]
    assert max(len(row.pieces), len(row.fed), len(row.memory), len(story.runs[0].curves["loss"])) <= MOST
    assert row.totals == {"compute": pytest.approx(22_500), "communicate": pytest.approx(7_500)}
    assert row.rows == 210_000
    assert row.memory[-1][1] == 29_999
    assert Shares.of(story).nobody == pytest.approx(0.25)
    assert len(story.plain()["runs"][0]["rows"]["a"]["pieces"]) <= 1500


def test_a_page_of_hundreds_of_members_is_as_coarse_as_it_has_to_be(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run.html")
    names = [f"member {rank}" for rank in range(300)]
    recorder(planned(names))
    recorder.story.began = ZERO
    for rank in range(300):
        for second in range(200):
            recorder(at(second + 1, Spent, rank, window=1, seconds={"compute": 0.5, "communicate": 0.5}))
    recorder.story.ended = ZERO + 200
    plain = recorder.story.plain()
    assert sum(len(row["pieces"]) for row in plain["runs"][0]["rows"].values()) <= 60_000


def test_what_a_page_holds_is_had_back_whole_and_harmless(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run.html")
    nasty = "</script><script>alert(1)</script>"
    for event in (
        at(0, Planned, label=nasty, run="r", names=[nasty], params={nasty: nasty}, versions={"x": "1"}),
        at(0, Placed, name=nasty, ranks=[0, 0], rows=[3, 4], nbytes=[24, 32]),
        at(1, Failed, 0, error=nasty),
        at(2, Span, 0, kind="compute", seconds=1),
        at(3, Ended, error=nasty, cause=0),
    ):
        recorder(event)
    recorder.write(RuntimeError(nasty))
    text = (tmp_path / "run.html").read_text()
    assert nasty not in text
    assert read(tmp_path / "run.html").plain() == recorder.story.plain()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.html"]


def test_the_slices_of_shares_can_be_put_together_for_the_chart() -> None:
    from dask_bridges.reporting.figures import COARSE
    from dask_bridges.reporting.shares import MOMENTS

    assert MOMENTS % COARSE == 0
    assert np.isfinite(Shares.of(told()).computing).all()
