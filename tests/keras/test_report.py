"""The report of a Keras training tells what the training itself gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from distributed import Client

from dask_bridges.reporting import read

keras = pytest.importorskip("keras")
dask_keras = pytest.importorskip("dask_keras")

pytestmark = pytest.mark.cluster

ROWS, VALID, EPOCHS = 400, 60, 3


def data(rows: int) -> tuple[Any, Any]:
    X = np.random.default_rng(rows).normal(size=(rows, 3)).astype("float32")
    return da.from_array(X, chunks=(rows // 4, 3)), da.from_array(X[:, 0], chunks=rows // 4)


def test_the_page_has_curves_times_rows_and_places(bridges_client: Client, tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    page = tmp_path / "run.html"
    history = dask_keras.fit(
        bridges_client, model, *data(ROWS), validation_data=data(VALID), epochs=EPOCHS, batch_size=40, workers=2,
        checkpoint=tmp_path / "kept", report=page,
    )  # fmt: skip
    (run,) = read(page).runs
    assert run.curves == {name: list(enumerate(map(float, values))) for name, values in history.history.items()}
    assert run.done == {"batch": EPOCHS * 10}
    (attempt,) = run.attempts
    assert {name: sum(lie["rows"]) for name, lie in attempt.sets.items()} == {"train": ROWS, "validation": VALID}
    for row in run.rows.values():
        assert {"wait", "start", "receive", "compute", "communicate", "checkpoint"} <= set(row.totals)
    assert [row.rows for row in run.rows.values()] == [EPOCHS * ROWS // 2] * 2
    assert sum(nbytes for row in run.rows.values() for *_, nbytes in row.fed) == EPOCHS * ROWS * 4 * 4
    assert run.versions["keras"] == keras.__version__
    assert run.params["epochs"] == str(EPOCHS)
    # The process of a rank counts as well as its worker, and no process has imported Keras for less.
    held = [nbytes for _, nbytes in run.rows["member 0"].memory]
    assert max(held) > min(held) + 128 * 2**20
