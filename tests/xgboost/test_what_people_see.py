"""What a training shows while it runs: spans, log lines, warnings, a bar."""

import logging
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from distributed import Client, LocalCluster

import dask_xgboost
from dask_bridges.events import Event, Log, Metrics, Progress, Span

pytestmark = pytest.mark.cluster

PARAMS = {"objective": "reg:squarederror", "max_depth": 2, "eval_metric": "rmse"}


def _data() -> tuple[Any, Any]:
    X = np.random.default_rng(3).integers(0, 9, size=(600, 3)).astype("float32")
    return da.from_array(X, chunks=(100, 3)), da.from_array(X[:, 0], chunks=100)


def test_every_rank_tells_where_its_time_goes(bridges_client: Client) -> None:
    X, y = _data()
    seen: list[Event] = []
    dask_xgboost.train(bridges_client, PARAMS, X, y, num_boost_round=4, evals=[(X, "train")], listen=seen.append)
    spans = {(event.rank, event.kind) for event in seen if isinstance(event, Span)}
    for rank in range(3):
        assert {(rank, kind) for kind in ("receive", "build", "compute", "communicate")} <= spans
    assert (-1, "wait") in spans
    assert [event.done for event in seen if isinstance(event, Progress)] == [1, 2, 3, 4]
    assert all(event.total == 4 for event in seen if isinstance(event, Progress))
    assert [sorted(event.values) for event in seen if isinstance(event, Metrics)] == [["train-rmse"]] * 4


def test_what_xgboost_prints_on_a_worker_comes_as_log_lines(bridges_client: Client) -> None:
    X, y = _data()
    seen: list[Event] = []
    dask_xgboost.train(bridges_client, {**PARAMS, "no_such_parameter": 1}, X, y, num_boost_round=1, listen=seen.append)
    lines = [event for event in seen if isinstance(event, Log) and "no_such_parameter" in event.text]
    assert {event.rank for event in lines} == {0, 1, 2}
    assert all(event.level == logging.WARNING for event in lines)


def test_matrices_that_will_not_fit_are_warned_of_with_numbers() -> None:
    X, y = _data()
    thresholds = {f"distributed.worker.memory.{name}": False for name in ("target", "spill", "pause", "terminate")}
    with (
        dask.config.set(thresholds),
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, memory_limit="64MiB", dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
        pytest.warns(UserWarning, match=r"holds 9\.\d+ kiB of partitions; .* 0 B of its 64\.00 MiB are free"),
    ):
        dask_xgboost.train(client, PARAMS, X, y, num_boost_round=1)
