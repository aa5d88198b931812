"""The report of a TensorFlow cluster: what its tasks did until it was closed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest

from dask_bridges.reporting import read

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

ROWS, STEPS, BATCH = 600, 40, 20


def _build() -> dict[str, Any]:
    import tensorflow as tf

    return {"sum": tf.Variable(0.0)}


def _step(state: dict[str, Any], batch: Any) -> dict[str, Any]:
    import tensorflow as tf

    state["sum"].assign_add(tf.reduce_sum(batch))
    return {"sum": state["sum"]}


def test_the_page_has_all_tasks_their_restarts_rows_and_places(start: Callable[..., Any], tmp_path: Path) -> None:
    import dask_tf

    page = tmp_path / "run.html"
    with start(ps=1, worker=2, report=page) as cluster:
        cluster.feed(da.ones((ROWS, 3), chunks=(100, 3), dtype="float32"))
        trained = dask_tf.train(
            cluster, _build, _step, steps=STEPS, batch_size=BATCH, checkpoint=tmp_path / "kept", seed=0
        )
        cluster.restart("worker", 1)
        assert not page.exists()
    assert f"{STEPS} steps" in trained._repr_html_()
    (run,) = read(page).runs
    assert list(run.rows) == ["ps:0", "worker:0", "worker:1", "chief:0"]
    assert run.done == {"step": STEPS}
    (attempt,) = run.attempts
    lie = attempt.sets["train"]
    rows = np.bincount(lie["ranks"], lie["rows"])
    assert rows.tolist() == [0, ROWS / 2, ROWS / 2]
    assert "receive" in run.rows["worker:0"].totals
    assert "start" in run.rows["ps:0"].totals
    assert "restart" in run.rows["worker:1"].totals
    assert "restart" not in run.rows["worker:0"].totals
    assert [mark.kind for mark in run.rows["worker:1"].marks if mark.kind != "finished"] == ["lost", "restarted"]
    assert "checkpoint" in run.rows["chief:0"].totals
    assert run.rows["chief:0"].rows == STEPS * BATCH
    assert run.params["worker"] == "2"
    assert set(run.versions) >= {"tensorflow", "keras"}


@pytest.mark.slow
def test_what_is_raised_while_a_cluster_is_up_is_in_its_report(start: Callable[..., Any], tmp_path: Path) -> None:
    def work() -> None:
        with start(worker=1, report=tmp_path / "run.html"):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError):
        work()
    assert read(tmp_path / "run.html").error == "RuntimeError: mine"
