"""The loopback framework keeps the contract of all bridges."""

from typing import Any

from distributed import Client

from dask_bridges.testing import loopback
from dask_bridges.testing.contract import BridgeContract


class TestLoopback(BridgeContract):
    def train(self, client: Client | None, X: Any, y: Any, **options: Any) -> Any:
        options.setdefault("rounds", 1)
        return loopback.train(client, X, y, **options)

    def check(self, result: Any, X: Any, y: Any) -> None:
        alone, labels = X.compute(), y.compute()
        assert result.total == (alone * labels[:, None]).sum()
        assert sum(result.rows) == len(alone)
        assert all(result.rows)
