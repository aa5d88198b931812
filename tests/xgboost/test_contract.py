"""dask_xgboost keeps the contract of all bridges."""

from typing import Any

import numpy as np
import pytest
import xgboost as xgb
from distributed import Client
from xgboost import collective

import dask_xgboost
from dask_bridges.testing.contract import BridgeContract, FailureContract, RunContract, TurnContract
from dask_bridges.testing.contract.base import Contract

PARAMS = {"objective": "binary:logistic", "max_depth": 3, "eta": 0.5}


class _Faulty(xgb.callback.TrainingCallback):
    def __init__(self, fault: Any) -> None:
        self.fault = fault

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        self.fault(rank=collective.get_rank(), round=epoch)
        return False


class XGBoost(Contract):
    def train(
        self, client: Client | None, X: Any, y: Any, *, fault: Any = None, rounds: int = 3, **options: Any
    ) -> Any:
        """Without restarts: the contract is of how losses are found and told."""
        options.setdefault("max_restarts", 0)
        callbacks = [] if fault is None else [_Faulty(fault)]
        return dask_xgboost.train(client, PARAMS, X, y, num_boost_round=rounds, callbacks=callbacks, **options)

    def check(self, result: Any, X: Any, y: Any) -> None:
        alone, labels = X.compute(), y.compute()
        oracle = xgb.train(PARAMS, xgb.QuantileDMatrix(alone, labels), result.num_boosted_rounds())
        rows = xgb.DMatrix(alone)
        np.testing.assert_allclose(result.predict(rows), oracle.predict(rows), atol=1e-5)

    def use(self, client: Client, result: Any, X: Any) -> None:
        predictions = client.compute(dask_xgboost.predict(client, result, X)).result()
        np.testing.assert_allclose(predictions, result.predict(xgb.DMatrix(X.compute())), rtol=1e-6)
        frame = X.to_dask_dataframe(columns=["a", "b", "c"])
        series = client.compute(dask_xgboost.predict(client, result, frame)).result()
        np.testing.assert_allclose(series, predictions, rtol=1e-6)


@pytest.mark.cluster
class TestXGBoost(XGBoost, RunContract, TurnContract):
    """What a person meets every day, on the shared workers."""

    test_trains_on_workers_started_from_the_command_line = None
    test_nothing_of_ours_is_needed_on_the_scheduler = None
    test_waits_for_the_first_worker_of_an_adaptive_cluster = None
    test_a_worker_that_joins_later_is_left_out = None

    told_within = FailureContract.told_within
    test_the_root_cause_is_raised = FailureContract.test_the_root_cause_is_raised_and_the_workers_are_free


@pytest.mark.slow  # many clusters of their own
class TestXGBoostWhateverDies(XGBoost, BridgeContract):
    """The whole contract."""
