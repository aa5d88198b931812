"""`fit(strategy="ps")`: Keras on parameter servers, asynchronously."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from typing import Any

import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import Client, LocalCluster

from dask_bridges import DataError
from dask_bridges.testing import leftovers

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(sys.platform != "linux", reason="tasks live in child processes, which need Linux"),
    pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs TensorFlow"),
]

ROWS = 600


def data() -> tuple[Any, Any]:
    X = np.random.default_rng(0).normal(size=(ROWS, 4)).astype("float32")
    return X, X @ np.array([1.0, -2.0, 0.5, 0.0], "float32")


def made() -> Any:
    import keras

    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.02), "mse", metrics=["mae"])
    return model


@pytest.mark.slow
def test_a_model_learns_and_no_update_is_lost(bridges_client: Client) -> None:
    import keras

    import dask_keras

    X, y = data()
    frame = dd.from_pandas(pd.DataFrame(X, columns=list("abcd")).assign(y=y), npartitions=5)
    stop, model = keras.callbacks.EarlyStopping("val_loss", patience=50), made()
    history = dask_keras.fit(
        bridges_client, model, frame[list("abcd")], frame["y"], batch_size=20, epochs=4, strategy="ps", servers=2,
        validation_data=(da.from_array(X[:100], chunks=(50, 4)), da.from_array(y[:100], chunks=50)), callbacks=[stop],
    )  # fmt: skip
    assert history is model.history
    assert history.epoch == [0, 1, 2, 3]
    assert set(history.history) == {"loss", "mae", "val_loss", "val_mae"}
    assert int(model.optimizer.iterations.numpy()) == 4 * ROWS // 20
    assert model.evaluate(X, y, verbose=0)[0] < 0.5 * made().evaluate(X, y, verbose=0)[0]
    assert leftovers(bridges_client) == {}


@pytest.mark.slow
def test_an_asynchronous_client_awaits_it(bridges_cluster: LocalCluster) -> None:
    import dask_keras

    X, y = data()
    model = made()

    async def main() -> Any:
        async with Client(bridges_cluster.scheduler_address, asynchronous=True, set_as_default=False) as client:
            arrays = da.from_array(X, chunks=(200, 4)), da.from_array(y, chunks=200)
            return await dask_keras.fit(client, model, *arrays, batch_size=20, strategy="ps", workers=2)

    assert asyncio.run(main()).epoch == [0]
    assert int(model.optimizer.iterations.numpy()) == ROWS // 20


def test_what_servers_cannot_train_is_refused(bridges_client: Client) -> None:
    import dask_keras

    X, y = (da.from_array(each, chunks=200) for each in data())
    with pytest.raises(DataError, match="one collection each"):
        dask_keras.fit(bridges_client, made(), (X, X), y, strategy="ps")
    with pytest.raises(DataError, match="checkpoint_seconds"):
        dask_keras.fit(bridges_client, made(), X, y, strategy="ps", checkpoint="/tmp/x", checkpoint_every=3)
    with pytest.raises(DataError, match="memory of one process"):
        dask_keras.fit(bridges_client, made(), X, y, strategy="ps", checkpoint="memory://")
    with pytest.raises(DataError, match="'sync' and 'ps'"):
        dask_keras.fit(bridges_client, made(), X, y, strategy="ring")  # type: ignore[arg-type]
    assert leftovers(bridges_client) == {}
