"""Training on a real GPU that a worker owns, beside jobs that have it when the training does not."""

from __future__ import annotations

import json
import os
from typing import Any

import dask.array as da
import numpy as np
import pytest
import xgboost as xgb
from distributed import Client, LocalCluster

import dask_xgboost
from dask_bridges.devices import nvml

pytest.importorskip("pynvml", reason="GPUs are found by nvidia-ml-py")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.cluster,
    pytest.mark.skipif(not nvml.gpus(), reason="NVML knows no GPU here"),
    pytest.mark.skipif(not xgb.build_info().get("USE_CUDA"), reason="XGBoost is built without CUDA"),
]


def data() -> tuple[Any, Any]:
    X = np.random.default_rng(0).integers(0, 30, (2000, 4)).astype("float32")
    return X, X[:, 0] * 2 + X[:, 1]


def assert_same(booster: xgb.Booster, X: Any, y: Any) -> None:
    """The model is that of one machine."""
    alone = xgb.train({"max_depth": 3}, xgb.QuantileDMatrix(X, y), num_boost_round=5)
    np.testing.assert_allclose(booster.inplace_predict(X), alone.inplace_predict(X), rtol=1e-3)


class Where(xgb.callback.TrainingCallback):  # type: ignore[misc]
    """Remembers the device of the booster."""

    def after_training(self, model: Any) -> Any:
        self.device = json.loads(model.save_config())["learner"]["generic_param"]["device"]
        return model


def test_a_worker_trains_on_the_gpu_it_owns_as_often_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = data()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # of the worker
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        collections = da.from_array(X, chunks=(500, 4)), da.from_array(y, chunks=500)
        for _ in range(2):  # the first leaves memory in use
            where = Where()
            booster = dask_xgboost.train(
                client, {"device": "cuda", "max_depth": 3}, *collections, num_boost_round=5, callbacks=[where],
                timeout="60s",
            )  # fmt: skip
            assert where.device == "cuda:0"
    assert_same(booster, X, y)


def test_workers_that_own_none_train_in_children_and_take_none_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = data()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        collections = da.from_array(X, chunks=(500, 4)), da.from_array(y, chunks=500)
        for _ in range(2):  # the first gives its memory back
            where = Where()
            booster = dask_xgboost.train(
                client, {"device": "cuda", "max_depth": 3}, *collections, num_boost_round=5, callbacks=[where],
                timeout="60s", n_workers=1,
            )  # fmt: skip
            assert where.device == "cuda:0"
            users = {pid for gpu in nvml.gpus() for pid, _ in nvml.usage(gpu.uuid).processes}
            assert not users & set(client.run(os.getpid).values())
    assert_same(booster, X, y)
