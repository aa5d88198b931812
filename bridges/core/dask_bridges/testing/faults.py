"""What a member does wrong, when: picklable, so that it happens where the member runs."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from distributed import Client, Event, get_client, get_worker

__all__ = ["Fault", "TroubleError", "call_at", "die", "leave", "trouble"]


class TroubleError(RuntimeError):
    """The user's own exception, raised in a member."""


def trouble() -> None:
    """Raise the user's exception."""
    raise TroubleError("deliberate")


def die() -> None:
    """Be killed, as for memory: no goodbye."""
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    """Stand still, with all connections open."""
    os.kill(os.getpid(), signal.SIGSTOP)


def leave() -> None:
    """Call ``sys.exit(0)``."""
    raise SystemExit(0)


def crash() -> None:
    """Use memory that is not there."""
    os.kill(os.getpid(), signal.SIGSEGV)


def vanish() -> None:
    """Leave without a word, as if all were well."""
    os._exit(0)


def vanish_badly() -> None:
    """Leave without a word, as if all were not well."""
    os._exit(1)


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


@dataclass(frozen=True)
class Dated:
    """An action that is written down before it is done, with the time."""

    action: Callable[[], None]
    file: Path

    def __call__(self) -> None:
        """Called by the fault."""
        part = self.file.with_suffix(".part")
        part.write_text(repr(time.time()))
        part.rename(self.file)
        self.action()


@dataclass(frozen=True)
class Hold:
    """A fault that holds rank 0 after its first round, until it is released."""

    name: str
    scheduler: str

    @classmethod
    def new(cls, client: Client) -> Hold:
        """A hold of its own name."""
        return cls(uuid.uuid4().hex, client.scheduler.address)

    def reached(self, client: Client | None = None) -> Event:
        """Set when rank 0 is held."""
        return Event(f"{self.name}-reached", client=client)

    def released(self, client: Client | None = None) -> Event:
        """Rank 0 goes on when it is set."""
        return Event(f"{self.name}-released", client=client)

    @contextlib.contextmanager
    def released_at_last(self, client: Client) -> Iterator[None]:
        """Release at the end, whatever happens."""
        try:
            yield
        finally:
            self.released(client).set()

    def __call__(self, rank: int, round: int) -> None:
        """Called by the bridge's member after each round."""
        if (rank, round) == (0, 0):
            with self._client() as client:
                self.reached(client).set()
                self.released(client).wait(60)

    @contextlib.contextmanager
    def _client(self) -> Iterator[Client]:
        """The worker's client, or one of its own in a child process."""
        try:
            client = get_client()
        except ValueError:
            with Client(self.scheduler, set_as_default=False) as client:
                yield client
        else:
            yield client


@dataclass(frozen=True)
class RollCall:
    """Another fault, before which every rank writes down, after its first round, that it runs."""

    file: Path
    fault: Callable[..., None]

    def ranks(self) -> list[int]:
        """Who has run, as often as it has."""
        return [int(line) for line in self.file.read_text().split()]

    def __call__(self, rank: int, round: int) -> None:
        """Called by the bridge's member after each round."""
        if round == 0:
            with self.file.open("a") as file:
                file.write(f"{rank}\n")
        self.fault(rank=rank, round=round)


@dataclass(frozen=True)
class DiesOnArrival:
    """A fault that kills the worker of that address as it reads it, before its member starts."""

    worker: str

    def __reduce__(self) -> tuple[Callable[[str], DiesOnArrival], tuple[str]]:
        return _arrive, (self.worker,)

    def __call__(self, rank: int, round: int) -> None:
        """Does nothing more."""


def _arrive(worker: str) -> DiesOnArrival:
    with contextlib.suppress(ValueError):  # not on a worker
        if get_worker().address == worker:
            die()
    return DiesOnArrival(worker)


def call_at(fault: Callable[..., None] | None, rank: int, round: int) -> None:
    """Call the fault, if there is one."""
    if fault is not None:
        fault(rank=rank, round=round)
