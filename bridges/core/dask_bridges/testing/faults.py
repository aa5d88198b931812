"""What a member does wrong, when: picklable, so that it happens where the member runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Fault", "TroubleError", "call_at", "die", "leave", "trouble"]


class TroubleError(RuntimeError):
    """The user's own exception, raised in a member."""


def trouble() -> None:
    """Raise the user's exception."""
    raise TroubleError("deliberate")


def die() -> None:
    """Be killed, as for memory: no goodbye."""
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    """Call ``sys.exit(0)``."""
    raise SystemExit(0)


@dataclass(frozen=True)
class Fault:
    """Do `action` on `rank` after round `round`.

    Examples
    --------
    >>> Fault(rank=1, round=2, action=trouble)(rank=0, round=2)
    """

    rank: int
    round: int
    action: Callable[[], None]

    def __call__(self, rank: int, round: int) -> None:
        """Called by the bridge's member after each round."""
        if (rank, round) == (self.rank, self.round):
            self.action()


def call_at(fault: Callable[..., None] | None, rank: int, round: int) -> None:
    """Call the fault, if there is one."""
    if fault is not None:
        fault(rank=rank, round=round)
