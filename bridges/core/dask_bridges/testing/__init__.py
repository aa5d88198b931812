"""For tests of bridges: the contract every one passes, a loopback framework, clusters of all kinds.

A bridge's tests subclass `BridgeContract`::

    class TestMyBridge(BridgeContract):
        def train(self, client, X, y, **options): ...
        def check(self, result, X, y): ...

The fixtures it uses come with the pytest plugin of this package.
"""

from dask_bridges.testing.clusters import command_line_cluster
from dask_bridges.testing.faults import Fault
from dask_bridges.testing.traces import footprint, leftovers, wait_until_free

__all__ = ["Fault", "command_line_cluster", "footprint", "leftovers", "wait_until_free"]
