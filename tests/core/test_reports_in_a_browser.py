"""A report, opened in a browser: nothing goes wrong, and all figures are drawn."""

from __future__ import annotations

from pathlib import Path

import dask.array as da
import pytest
from distributed import Client
from tests.core.browser import NAMES, browser, look_at

from dask_bridges.reporting import read
from dask_bridges.testing import loopback

pytestmark = pytest.mark.skipif(browser() is None, reason=f"needs a browser: none of {', '.join(NAMES)} is installed")


def test_a_browser_draws_all_figures_without_an_error(client: Client, tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    X = da.ones((6000, 4), chunks=(500, 4))
    loopback.train(client, X, X[:, 0], rounds=20, report=page)
    seen = look_at(page, tmp_path)
    assert seen.problems == []
    names = ["timeline", "computing", "curve-0-total", "fed-rows", "fed-bytes", "memory", "placed-0-X"]
    assert list(seen.figures) == names
    assert all(count for figure in seen.figures.values() for count in figure.values()), seen.figures
    (run,) = read(page).runs
    boxes = sum(
        len([value for value in piece.seconds.values() if value]) for row in run.rows.values() for piece in row.pieces
    )
    assert seen.figures["timeline"]["Quad"] == boxes
    assert seen.figures["curve-0-total"]["Line"] == 20
    assert seen.figures["placed-0-X"]["HBar"] == 12
    assert "of the time nobody computed" in seen.text
