"""The contract: what a person may expect of every bridge, as tests that bridge tests subclass."""

import pytest

from dask_bridges.testing.contract.endings import EndingContract
from dask_bridges.testing.contract.failures import FailureContract
from dask_bridges.testing.contract.hosts import HostContract
from dask_bridges.testing.contract.runs import RunContract
from dask_bridges.testing.contract.turns import TurnContract

__all__ = ["BridgeContract", "EndingContract", "FailureContract", "HostContract", "RunContract", "TurnContract"]


@pytest.mark.cluster
class BridgeContract(RunContract, TurnContract, FailureContract, EndingContract, HostContract):
    """Subclass it, name the class ``Test…``, and say how to train and how to check the result."""
