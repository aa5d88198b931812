"""Progress bars: where they are drawn, and what they show."""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Callable

import dask.config
import pytest

from dask_bridges.events import Log, Metrics, Progress
from dask_bridges.ui.progress import ProgressBar, wants_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class ZMQInteractiveShell:
    """Named as the shell of a notebook's kernel."""


def look_at(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO | None) -> None:
    """Let error output go there; called in the test itself, since pytest captures each phase anew."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delitem(sys.modules, "IPython", raising=False)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to send output to a file or pipe."""
    return lambda: look_at(monkeypatch, io.StringIO())


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """Call it for a terminal that shows what is written to it."""

    def start() -> Terminal:
        stream = Terminal()
        look_at(monkeypatch, stream)
        return stream

    return start


def test_no_bar_where_nobody_looks_on(elsewhere: Callable[[], None]) -> None:
    elsewhere()
    assert not wants_bar(None)


def test_no_bar_where_there_is_no_output_at_all(elsewhere: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere()
    monkeypatch.setattr(sys, "stderr", None)
    assert not wants_bar(None)


def test_a_bar_in_a_terminal(terminal: Callable[[], Terminal]) -> None:
    terminal()
    assert wants_bar(None)


def test_a_bar_in_a_notebook(elsewhere: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere()
    module = types.ModuleType("IPython")
    module.get_ipython = ZMQInteractiveShell  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", module)
    assert wants_bar(None)


def test_the_argument_wins_over_the_configuration_and_that_over_the_surroundings(
    terminal: Callable[[], Terminal],
) -> None:
    terminal()
    assert not wants_bar(False)
    with dask.config.set({"dask-bridges.progress": False}):
        assert not wants_bar(None)
        assert wants_bar(True)


def test_a_bar_may_be_asked_for_where_nobody_looks_on(elsewhere: Callable[[], None]) -> None:
    elsewhere()
    assert wants_bar(True)
    with dask.config.set({"dask-bridges.progress": True}):
        assert wants_bar(None)


def test_the_bar_shows_label_rounds_rate_and_newest_metrics(terminal: Callable[[], Terminal]) -> None:
    stream = terminal()
    bar = ProgressBar("XGBoost")
    for done in (1, 2, 3):
        bar(Metrics(gang="g", rank=0, step=done - 1, values={"valid-auc": 0.5 + done / 8}))
        bar(Progress(gang="g", rank=0, done=done, total=3))
    bar.close()
    last = stream.getvalue().rpartition("\r")[2]
    assert last.startswith("XGBoost: 100%")
    assert "3/3" in last
    assert "round/s" in last or "s/round" in last
    assert "valid-auc=0.875" in last


def test_who_waits_is_told_above_the_bar(terminal: Callable[[], Terminal]) -> None:
    stream = terminal()
    bar = ProgressBar("XGBoost")
    bar(Log(gang="g", text="waits for running other training (gang 1)"))
    bar(Log(gang="g", rank=1, text="a member's own line"))
    bar.close()
    assert stream.getvalue() == "XGBoost waits for running other training (gang 1)\n"
