"""What can go wrong, told apart by who has to do what about it."""

from __future__ import annotations

from typing import ClassVar

from dask_serializers.pages import TROUBLESHOOTING, see

__all__ = [
    "BridgeError",
    "DataError",
    "GangTimeout",
    "MemberFailed",
    "MemberLost",
    "PlacementError",
]


class BridgeError(Exception):
    """The root of every error dask-bridges raises on purpose.

    Below its message, a traceback shows the address at which the class is explained.
    """

    page: ClassVar[str] = TROUBLESHOOTING
    """Where that is; a bridge of your own may have a page of its own, with an anchor for each of its classes."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.add_note(see(type(self), self.page))


class PlacementError(BridgeError):
    """The cluster lacks what the gang needs: workers, devices or a package.

    The message says what was wanted and what there is.
    """


class WorkerLeft(PlacementError):  # noqa: N818 - in a row with MemberLost
    """A worker left the cluster before its member was there."""


class DataError(BridgeError, ValueError):
    """The data cannot be trained on as it is.

    The message names the collection, the partition or the column, and what to
    do. Found before any member starts, where it can be.
    """


class GangTimeout(BridgeError, TimeoutError):  # noqa: N818 - the name users meet
    """A deadline of the gang passed: waiting for a turn, or for all to start."""


class _AtMember(BridgeError):  # noqa: N818 - a base, never raised
    """An error that happened at one member of a gang.

    Attributes
    ----------
    rank : int
        The member's rank, 0 to world size - 1.
    worker : str
        Address of its Dask worker.
    host : str
        Host of that worker.
    """

    def __init__(self, message: str, rank: int = -1, worker: str = "", host: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.worker = worker
        self.host = host

    def __reduce__(self) -> tuple[type[_AtMember], tuple[str, int, str, str]]:
        return type(self), (str(self), self.rank, self.worker, self.host)


class MemberFailed(_AtMember):
    """A member raised: user code or the framework. The original is ``__cause__``."""


class MemberLost(_AtMember):
    """A member's process or worker died before the member was done."""


class MemberStopped(BridgeError):  # noqa: N818 - not a failure of its own
    """Raised inside a member that was asked to stop; never the cause of a failure."""


class StaleMember(BridgeError):  # noqa: N818 - not a failure of its own
    """Raised inside a member that Dask ran again or too late: its token was refused."""
