"""The bridge between Dask clusters and the frameworks people train models with.

The core knows no framework: it starts *gangs*, groups of members on Dask
workers that begin together, know each other, hold their own partitions and end
together. ``dask_xgboost`` and the other bridges are thin adapters on it.

>>> import dask_bridges
>>> issubclass(dask_bridges.PlacementError, dask_bridges.BridgeError)
True
"""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from dask_bridges.overview import RunningGang, gangs

__all__ = [
    "BridgeError",
    "DataError",
    "GangTimeout",
    "MemberFailed",
    "MemberLost",
    "PlacementError",
    "RunningGang",
    "__version__",
    "gangs",
    "report",
]

_config.set_defaults()


def __getattr__(name: str) -> Any:
    """Load what needs Dask's client when it is asked for."""
    if name not in ("RunningGang", "gangs"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dask_bridges import overview

    return getattr(overview, name)
