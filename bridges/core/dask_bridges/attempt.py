"""What the arbiter knows of one attempt of one gang; sent by value: standard library only."""

from __future__ import annotations

import asyncio
import time
from typing import Any

__all__ = ["Attempt"]


class Attempt:
    """The scheduler's view of one attempt of one gang."""

    def __init__(self, gang: str, client: str, request: dict[str, Any]) -> None:
        self.gang = gang
        self.client = client
        self.label: str = request["label"]
        self.attempt: int = request["attempt"]
        self.candidates = list(request["candidates"])
        self.places: int = request["places"]
        self.exclusive: bool = request["exclusive"]
        self.finishes: bool = request.get(
            "finishes", False
        )  # whether its members end early, with a result, when asked to
        self.finishing = False  # whether they were
        self.topic: str = request["topic"]
        self.deadlines: dict[str, float] = request["deadlines"]
        self.names: list[str] = request["names"]
        self.replaceable = set(request["replaceable"])
        self.incarnations = [0] * self.places
        self.hosts: list[str] = []  # by rank, once granted
        self.workers: list[str] = []  # by rank, once granted
        self.nannies: list[tuple[str | None, int]] = []  # by rank: address, and process of the worker
        self.presented: set[int] = set()
        self.outcomes: dict[int, str] = {}  # rank -> finished, failed, late, collateral, lost; in the order told
        self.left: set[int] = set()  # ranks that are there no longer
        self.restarted: set[int] = set()  # ranks that did not end by themselves
        self.reasons: dict[int, str] = {}  # rank -> why its worker was lost
        self.enforced: asyncio.Task[None] | None = None  # sees to it that members end
        self.payloads: dict[int, dict[int, Any]] = {}
        self.agreed: list[Any] = []  # payloads of the last exchange, by rank
        self.ending = ""  # why, once no member may start or go on
        self.released = False
        self.changed = asyncio.Event()

    @property
    def live(self) -> set[int]:
        """Ranks that presented themselves and have not left."""
        return self.presented - self.left

    def holds(self) -> set[str]:
        """Workers whose place is taken: all at first, in the end those of live members."""
        if not self.ending:
            return set(self.workers)
        return {self.workers[rank] for rank in self.live}

    def touch(self) -> None:
        """Wake whoever waits for a change of this gang."""
        self.changed.set()
        self.changed = asyncio.Event()

    async def until(self, predicate: Any, timeout: float) -> bool:
        """Wait for `predicate()` for at most `timeout` seconds; whether it came true."""
        deadline = time.monotonic() + timeout
        while not predicate():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            try:
                await asyncio.wait_for(self.changed.wait(), left)
            except TimeoutError:
                return bool(predicate())
        return True
