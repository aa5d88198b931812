"""dask_keras keeps the contract of all bridges."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import numpy as np
import pytest
from distributed import Client

from dask_bridges.testing.contract import BridgeContract, FailureContract, RunContract
from dask_bridges.testing.contract.base import Contract

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(sys.platform != "linux", reason="ranks live in child processes, which need Linux"),
    pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs TensorFlow"),
]

ROWS = 240


class Faulty:
    """A loss that calls a fault in each step, on every rank."""

    def __init__(self, fault: Any) -> None:
        self.fault, self.round = fault, 0
        self.__name__ = "faulty"

    def __call__(self, y_true: Any, y_pred: Any) -> Any:
        import keras

        from dask_keras import current

        if hasattr(y_pred, "numpy"):
            self.fault(rank=current().rank, round=self.round)
            self.round += 1
        return keras.losses.mean_squared_error(y_true, y_pred)


def made(fault: Any = None) -> Any:
    import keras

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.001), Faulty(fault) if fault else "mse", run_eagerly=fault is not None)
    model.set_weights([np.array([[0.2], [-0.1], [0.3]], "float32"), np.zeros(1, "float32")])  # also in several threads
    return model


class Keras(Contract):
    ends_within = 5

    def train(
        self, client: Client | None, X: Any, y: Any, *, fault: Any = None, rounds: int = 3, **options: Any
    ) -> Any:
        import dask_keras

        model = made(fault)
        fitted = dask_keras.fit(
            client, model, X, y, batch_size=ROWS, epochs=rounds, shuffle=False, verbose=0, **options
        )  # fmt: skip

        async def awaited() -> Any:
            await fitted
            return model, rounds

        return awaited() if client is not None and client.asynchronous else (model, rounds)

    def check(self, result: Any, X: Any, y: Any) -> None:
        model, rounds = result
        alone = made()
        alone.fit(X.compute(), y.compute(), batch_size=ROWS, epochs=rounds, shuffle=False, verbose=0)
        for ours, theirs in zip(model.get_weights(), alone.get_weights()):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)

    def use(self, client: Client, result: Any, X: Any) -> None:
        import dask_keras

        model, _ = result
        predictions = client.compute(dask_keras.predict(client, model, X, batch_size=64)).result()
        np.testing.assert_allclose(predictions, model.predict(X.compute(), verbose=0), atol=1e-4)


class TestKeras(Keras):
    """The heart of the contract, on the shared workers."""

    test_trains_on_worker_processes = RunContract.test_trains_on_worker_processes


@pytest.mark.slow
class TestKerasThatFails(Keras):
    """What fails is found, on the shared workers."""

    test_the_root_cause_is_raised = FailureContract.test_the_root_cause_is_raised_and_the_workers_are_free


@pytest.mark.slow  # most of it is importing TensorFlow on the workers of new clusters
class TestKerasEverywhere(Keras, BridgeContract):
    """All of it, but for what needs the scheduler's address in a rank's process, or the fault in the Dask worker's."""

    test_a_worker_that_joins_later_is_left_out = None
    test_a_worker_killed_while_its_member_starts_is_named = None
