"""Reports of runs: what the page tells of losses, restarts and failures, and when it is refused."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from click.testing import CliRunner
from distributed import Client, LocalCluster
from tests.core.jobs_at_work import add

import dask_bridges
from dask_bridges import BridgeError, MemberFailed, PlacementError, events
from dask_bridges.events import Event, Memory, Planned, Spent
from dask_bridges.gang import Gang, GangPlan
from dask_bridges.jobs import DevicePool
from dask_bridges.reporting import read
from dask_bridges.reporting.cells import attempt_cells
from dask_bridges.reporting.shares import Shares
from dask_bridges.testing import Fault, loopback
from dask_bridges.testing.faults import TroubleError, die, trouble
from dask_bridges.ui.cli import bridges

ROWS, CHUNK = 6000, 500


@pytest.fixture
def data() -> tuple[Any, Any]:
    X = da.ones((ROWS, 4), chunks=(CHUNK, 4))
    return X, X[:, 0]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "run.html"


@dataclass(frozen=True)
class Once:
    """A fault that strikes the first time only."""

    file: Path
    fault: Callable[..., None]

    def __call__(self, rank: int, round: int) -> None:
        if not self.file.exists():
            if (rank, round) == (self.fault.rank, self.fault.round):  # type: ignore[attr-defined]
                self.file.touch()
            self.fault(rank=rank, round=round)


@pytest.mark.cluster
def test_a_killed_member_and_the_restart_are_in_one_timeline(
    bridges_doomed_client: Client, data: tuple[Any, Any], page: Path, tmp_path: Path
) -> None:
    fault = Once(tmp_path / "struck", Fault(1, 2, die))
    result = loopback.train(bridges_doomed_client, *data, rounds=5, fault=fault, restarts=3, report=page)
    story = read(page)
    (run,) = story.runs
    first, *_, last = run.attempts
    said = CliRunner().invoke(bridges, ["report", str(page)])
    assert f"member 1 was lost while it ran, with its worker {run.rows['member 1'].workers['1']}" in said.output
    assert re.search(r"^member 1 +tcp://.* s ", said.output, re.MULTILINE)
    row = run.rows["member 1"]
    assert first.cause == 1
    assert row.workers["1"] in first.error
    assert f"member 1 was lost while it ran, with its worker {row.workers['1']}" in page.read_text()
    assert (last.error, story.error) == ("", "")
    assert "<b>1</b><span>restart</span>" in page.read_text()
    assert "It went on after:" in page.read_text()
    assert "<div class='failed'>" not in page.read_text()
    assert attempt_cells(run)[1][2] == "3"
    assert "lost" in [mark.kind for mark in row.marks]
    assert "restarted" in [mark.kind for mark in run.rows["member 0"].marks]
    restart = next(piece for piece in run.rows["member 0"].pieces if "restart" in piece.seconds)
    assert restart.start == pytest.approx(first.ended, abs=1e-3)
    # All that was done, in both attempts, one after the other.
    pieces = run.rows["member 0"].pieces
    assert {piece.attempt for piece in pieces} == {first.number, last.number}
    assert all(one.end <= other.start + 1e-3 for one, other in itertools.pairwise(pieces))
    assert {"wait", "start", "receive", "compute", "communicate", "restart"} <= set(run.rows["member 0"].totals)
    assert run.curves["total"] == [(n, pytest.approx(result.total / 5 * (n + 1))) for n in range(5)]
    assert sum(last.sets["X"]["rows"]) == ROWS
    assert sum(row.rows for row in run.rows.values()) >= 5 * ROWS
    assert all(held > 1e6 for row in run.rows.values() for _, held in row.memory)
    assert run.versions["numpy"] == np.__version__
    assert run.params == {"rounds": "5"}
    assert 0 < Shares.of(story).nobody < 1


def test_the_report_of_a_run_that_fails_names_member_and_error(
    client: Client, data: tuple[Any, Any], page: Path
) -> None:
    with pytest.raises(MemberFailed) as raised:
        loopback.train(client, *data, rounds=3, fault=Fault(1, 1, trouble), report=page)
    assert isinstance(raised.value.__cause__, TroubleError)
    story = read(page)
    assert story.error == f"MemberFailed: {raised.value}"
    assert "member 1" in story.error
    assert "TroubleError: deliberate" in story.error
    (attempt,) = story.runs[0].attempts
    assert attempt.cause == 1
    assert [mark.kind for mark in story.runs[0].rows["member 1"].marks] == ["failed"]
    assert "It failed." in page.read_text()


def test_the_report_of_what_never_started_says_why(client: Client, data: tuple[Any, Any], page: Path) -> None:
    with pytest.raises(PlacementError):
        loopback.train(client, *data, workers=["nobody"], report=page)
    story = read(page)
    assert story.runs == []
    assert "nobody" in story.error


@pytest.mark.parametrize("where", ["no/such/folder/run.html", "."])
def test_a_path_that_cannot_be_written_is_refused_before_anything_starts(
    client: Client, tmp_path: Path, where: str
) -> None:
    computed = tmp_path / "computed"

    def note(block: Any) -> Any:
        computed.touch()
        return block

    X = da.ones((100, 2), chunks=50).map_blocks(note, dtype=float, meta=np.empty((0, 0)))
    with pytest.raises(ValueError, match=r"report=.* cannot be written.*Give the name of a file"):
        loopback.train(client, X, X[:, 0], report=tmp_path / where)
    assert not computed.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_write_protected_page_is_refused(page: Path) -> None:
    page.touch(mode=0o444)
    with pytest.raises(ValueError, match="write-protected"):
        dask_bridges.report(page)


def test_without_bokeh_the_extra_is_named(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bokeh", None)
    with pytest.raises(BridgeError, match=r'needs Bokeh: pip install "dask-bridges\[report\]"'):
        dask_bridges.report(page)


def test_a_report_around_several_has_those_and_no_others(client: Client, data: tuple[Any, Any], page: Path) -> None:
    loopback.train(client, *data)
    with dask_bridges.report(page):
        loopback.train(client, *data, rounds=2)
        loopback.train(client, *data, rounds=3)
    loopback.train(client, *data)
    assert [run.params["rounds"] for run in read(page).runs] == ["2", "3"]
    assert events.begun == []


def test_what_is_raised_within_a_report_is_in_it(client: Client, data: tuple[Any, Any], page: Path) -> None:
    def fail_after_training() -> None:
        with dask_bridges.report(page):
            loopback.train(client, *data)
            raise TroubleError("after the training")

    with pytest.raises(TroubleError):
        fail_after_training()
    story = read(page)
    assert (len(story.runs), story.error) == (1, "TroubleError: after the training")
    assert events.begun == []


def test_a_page_that_cannot_be_written_at_the_end_costs_no_result(
    client: Client, data: tuple[Any, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()

    def remove(event: Event) -> None:
        if isinstance(event, Planned) and folder.exists():
            folder.rmdir()

    result = loopback.train(client, *data, report=folder / "run.html", listeners=[remove])
    assert result.rows
    assert "could not be written" in caplog.text


def test_where_no_report_is_asked_for_members_tell_no_more(client: Client, data: tuple[Any, Any], page: Path) -> None:
    plain: list[Event] = []
    loopback.train(client, *data, listeners=[plain.append])
    assert not [event for event in plain if isinstance(event, Spent | Memory | Planned)]
    detailed: list[Event] = []
    loopback.train(client, *data, listeners=[detailed.append], report=page)
    assert {Spent, Memory, Planned} <= {type(event) for event in detailed}


def test_asynchronous_clients_have_reports_too(
    threads_cluster: LocalCluster, data: tuple[Any, Any], page: Path
) -> None:
    async def work() -> None:
        async with (
            Client(threads_cluster.scheduler_address, asynchronous=True) as client,
            dask_bridges.report(page),
        ):
            await loopback.train(client, *data, rounds=2)

    asyncio.run(work())
    assert [run.done for run in read(page).runs] == [{"round": 2}]


@pytest.mark.cluster
def test_a_pools_report_shows_which_job_had_which_device(bridges_client: Client, page: Path) -> None:
    worker = next(iter(bridges_client.scheduler_info(n_workers=-1)["workers"]))
    with DevicePool(bridges_client, devices={worker: ["a", "b"]}, preload=(), report=page) as pool:
        futures = pool.map(add, range(4), range(4))
        assert bridges_client.gather(futures) == [0, 2, 4, 6]
        assert "2 of" not in pool._repr_html_()
        assert pool._repr_html_().count(worker) == 4  # each device of it, and who offers it
    (run,) = read(page).runs
    jobs = [piece.text for row in run.rows.values() for piece in row.pieces if piece.text]
    assert {f"a on {worker}", f"b on {worker}"} <= set(run.rows)
    assert sorted(jobs) == sorted(str(future.key) for future in futures)


def test_a_gang_shows_itself_in_a_notebook(client: Client, addresses: list[str]) -> None:
    gang = Gang(client, GangPlan("<training>", print, [0, 1], addresses[:2]))
    shown = gang._repr_html_()
    assert "&lt;training&gt;" in shown
    assert "member 1" in shown


def test_a_file_that_is_no_report_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "other.html").write_text("<html></html>")
    said = CliRunner().invoke(bridges, ["report", str(tmp_path / "other.html")])
    assert said.exit_code == 1
    assert "other.html is no report of dask-bridges" in said.output
