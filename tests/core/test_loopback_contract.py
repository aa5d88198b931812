"""The loopback framework keeps the contract of all bridges, in workers' own processes and in children of them."""

from typing import Any

import pytest
from distributed import Client

from dask_bridges.testing import loopback
from dask_bridges.testing.contract import BridgeContract, EndingContract, FailureContract


class Loopback:
    child = False

    def train(self, client: Client | None, X: Any, y: Any, **options: Any) -> Any:
        options.setdefault("rounds", 1)
        return loopback.train(client, X, y, child=self.child, **options)

    def check(self, result: Any, X: Any, y: Any) -> None:
        alone, labels = X.compute(), y.compute()
        assert result.total == (alone * labels[:, None]).sum()
        assert sum(result.rows) == len(alone)
        assert all(result.rows)


@pytest.mark.slow  # XGBoost's members keep the same contract in the same place
class TestLoopback(Loopback, BridgeContract):
    pass


@pytest.mark.slow  # TensorFlow and Keras members keep it with the quick tests
@pytest.mark.cluster
class TestLoopbackInChildProcesses(Loopback, FailureContract, EndingContract):
    child = True
    ends_within = 5
