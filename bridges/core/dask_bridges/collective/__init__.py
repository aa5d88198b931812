"""All-reduce, broadcast, gather and barrier between the members of a gang: raw buffers over TCP, no pickle."""

from dask_bridges.collective.operations import Collective
from dask_bridges.collective.ring import PeerLost, is_collective_error

__all__ = ["Collective", "PeerLost", "is_collective_error"]
