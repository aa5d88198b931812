"""What training on parameter servers can lose."""

from __future__ import annotations

from dask_bridges.errors import MemberLost

__all__ = ["ServerLost", "WorkersLost"]


class ServerLost(MemberLost):
    """A parameter server is gone, and with it the variables it held.

    Start it again at its address, connect again, and fit again: training goes on from the last checkpoint.

    Attributes
    ----------
    servers : tuple of str
        The servers that do not answer or lost their state, such as ``("ps:1",)``.
    """

    def __init__(self, message: str, servers: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.servers = servers

    def __reduce__(self) -> tuple[type[ServerLost], tuple[str, tuple[str, ...]]]:  # type: ignore[override]
        return type(self), (str(self), self.servers)


class WorkersLost(MemberLost):
    """No worker of the TensorFlow cluster has answered for a while; the parameter servers still hold everything."""
