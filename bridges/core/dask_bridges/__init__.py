"""The bridge between Dask clusters and the frameworks people train models with.

The core knows no framework: it starts *gangs*, groups of members on Dask
workers that begin together, know each other, hold their own partitions and end
together. ``dask_xgboost`` and the other bridges are thin adapters on it.

>>> import dask_bridges
>>> issubclass(dask_bridges.PlacementError, dask_bridges.BridgeError)
True
"""

from dask_bridges import config as _config
from dask_bridges._version import __version__
from dask_bridges.errors import (
    BridgeError,
    DataError,
    GangTimeout,
    MemberFailed,
    MemberLost,
    PlacementError,
)
from dask_bridges.reporting import report

__all__ = [
    "BridgeError",
    "DataError",
    "GangTimeout",
    "MemberFailed",
    "MemberLost",
    "PlacementError",
    "__version__",
    "report",
]

_config.set_defaults()
