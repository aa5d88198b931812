"""Training on a real GPU that a worker owns, beside jobs that have it when the training does not."""

from __future__ import annotations

import json
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


def trained_here(X: Any, y: Any) -> xgb.Booster:
    return xgb.train({"max_depth": 3}, xgb.QuantileDMatrix(X, y), num_boost_round=5)


class Where(xgb.callback.TrainingCallback):  # type: ignore[misc]
    """Remembers the device of the booster."""

    def after_training(self, model: Any) -> Any:
        self.device = json.loads(model.save_config())["learner"]["generic_param"]["device"]
        return model


def test_a_worker_trains_on_the_gpu_it_owns_as_often_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    X = np.random.default_rng(0).integers(0, 30, (2000, 4)).astype("float32")
    y = X[:, 0] * 2 + X[:, 1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # of the worker
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        data = da.from_array(X, chunks=(500, 4)), da.from_array(y, chunks=500)
        for _ in range(2):  # the first leaves memory in use
            where = Where()
            booster = dask_xgboost.train(
                client, {"device": "cuda", "max_depth": 3}, *data, num_boost_round=5, callbacks=[where], timeout="60s"
            )
            assert where.device == "cuda:0"
    ours, expected = (model.inplace_predict(X) for model in (booster, trained_here(X, y)))
    np.testing.assert_allclose(ours, expected, rtol=1e-3)
