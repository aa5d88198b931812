"""The report of an XGBoost training tells what the training itself gives."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import xgboost as xgb
from distributed import Client

import dask_xgboost
from dask_bridges.reporting import read

pytestmark = pytest.mark.cluster

ROWS, VALID, ROUNDS = 6000, 900, 12
PARAMS = {"objective": "reg:squarederror", "max_depth": 3, "eval_metric": ["rmse", "mae"], "nthread": 1}


def data(rows: int) -> tuple[Any, Any]:
    X = np.random.default_rng(rows).integers(0, 9, size=(rows, 4)).astype("float32")
    return da.from_array(X, chunks=(rows // 6, 4)), da.from_array(X[:, 0] - X[:, 1], chunks=rows // 6)


def train(client: Client, page: Path, **options: Any) -> dict[str, Any]:
    X, y = data(ROWS)
    result: dict[str, Any] = {}
    evals = [(X, "train"), (data(VALID), "valid")]
    dask_xgboost.train(
        client, PARAMS, X, y, num_boost_round=ROUNDS, evals=evals, evals_result=result, report=page, **options
    )
    return result


def test_the_page_has_curves_times_rows_and_places(bridges_client: Client, tmp_path: Path) -> None:
    result = train(bridges_client, tmp_path / "run.html")
    (run,) = read(tmp_path / "run.html").runs
    curves = {f"{name}-{metric}": list(enumerate(log)) for name, logs in result.items() for metric, log in logs.items()}
    assert run.curves == curves
    assert run.done == {"round": ROUNDS}
    (attempt,) = run.attempts
    assert {name: sum(lie["rows"]) for name, lie in attempt.sets.items()} == {"train": ROWS, "valid": VALID}
    assert sum(attempt.sets["train"]["nbytes"]) == ROWS * 5 * 4
    assert list(run.rows) == ["member 0", "member 1", "member 2"]
    for row in run.rows.values():
        assert {"wait", "start", "receive", "build", "compute", "communicate"} <= set(row.totals)
        assert row.memory
    fed = sum(row.rows for row in run.rows.values())
    passes = [(fed - times * VALID) / ROWS for times in range(1, 6)]  # XGBoost reads both sets whole, several times
    assert any(its >= 1 and its.is_integer() for its in passes)
    assert run.params["objective"] == "reg:squarederror"
    assert run.params["num_boost_round"] == str(ROUNDS)
    assert run.versions["xgboost"] == xgb.__version__


class Killer(xgb.callback.TrainingCallback):
    """Kills the worker of one rank once, after a round."""

    def __init__(self, file: Path, rank: int, round: int) -> None:
        self.file, self.rank, self.round = file, rank, round

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        if (xgb.collective.get_rank(), epoch) == (self.rank, self.round) and not self.file.exists():
            self.file.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return False


@pytest.mark.slow
def test_what_was_lost_and_went_on_is_one_story(bridges_doomed_client: Client, tmp_path: Path) -> None:
    killer = Killer(tmp_path / "killed", rank=1, round=7)
    page = tmp_path / "run.html"
    result = train(bridges_doomed_client, page, callbacks=[killer], checkpoint_every=2)
    (run,) = read(page).runs
    assert [attempt.number for attempt in run.attempts] == [1, 2]
    assert "member 1" in run.attempts[0].error
    assert run.attempts[1].error == ""
    assert run.curves["valid-rmse"] == list(enumerate(result["valid"]["rmse"]))
    assert "restart" in run.rows["member 0"].totals
    assert "checkpoint" in run.rows["member 0"].totals
