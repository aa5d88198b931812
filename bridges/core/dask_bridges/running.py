"""The tasks of a gang's members, from the client: submitted, pinned to their workers, watched, let go of."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import dask
from distributed import Client, Future

from dask_bridges.errors import MemberLost
from dask_bridges.member import MemberSpec
from dask_bridges.shipping import sealed_task
from dask_bridges.task import run_member

__all__ = ["RunningMembers"]


class RunningMembers:
    """The newest task of each rank.

    Parameters
    ----------
    client : Client

    Attributes
    ----------
    replaced : asyncio.Event
        Set when a member was submitted again.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self.replaced = asyncio.Event()
        self._members: dict[int, _Running] = {}

    def submit(self, specs: Sequence[MemberSpec]) -> None:
        """One task a member, pinned to its worker, in one graph; in place of the one that its rank had."""
        keys = {_key(spec): spec for spec in specs}
        places = {key: [spec.workers[spec.rank]] for key, spec in keys.items()}
        graph = {key: sealed_task(key, run_member, spec) for key, spec in keys.items()}
        # A bound method of a dict: the scheduler unpickles and calls it without this package.
        with dask.annotate(workers=places.__getitem__, allow_other_workers=False, retries=0):
            futures = self.client.get(graph, list(graph), sync=False, priority=100)
        for spec, future in zip(specs, futures):
            if before := self._members.get(spec.rank):
                before.release()
                self.replaced.set()
            self._members[spec.rank] = _Running(spec, future)

    def spec_of(self, rank: int) -> MemberSpec | None:
        """What a member was told; None if it does not run."""
        member = self._members.get(rank)
        return None if member is None else member.spec

    @property
    def futures(self) -> list[Future]:
        """The tasks, by rank."""
        return [self._members[rank].future for rank in sorted(self._members)]

    @property
    def workers(self) -> list[str]:
        """Their workers, by rank."""
        return [self._members[rank].spec.workers[rank] for rank in sorted(self._members)]

    @property
    def ends(self) -> list[asyncio.Future[None]]:
        """Their ends, by rank."""
        return [self._members[rank].end for rank in sorted(self._members)]

    @property
    def finished(self) -> bool:
        """Whether all have ended, and well."""
        return all(end.done() for end in self.ends) and self.error is None

    @property
    def error(self) -> BaseException | None:
        """What one of those that ended badly raised."""
        return next(filter(None, map(_error_of, self.ends)), None)

    async def release(self) -> None:
        """Let go of all."""
        ends = self.ends
        for member in self._members.values():
            member.release()
        self._members.clear()
        await asyncio.gather(*ends, return_exceptions=True)


class _Running:
    """A member whose task has been submitted."""

    def __init__(self, spec: MemberSpec, future: Future) -> None:
        self.spec = spec
        self.future = future
        self.end = asyncio.ensure_future(_end_of(future))
        self.end.add_done_callback(_error_of)  # one that is looked at nowhere else was replaced

    def release(self) -> None:
        """Nobody waits for it any more."""
        self.end.cancel()
        self.future.release()


def _key(spec: MemberSpec) -> str:
    return f"{spec.label.replace(' ', '-')}-{spec.gang}-{spec.attempt}-{spec.rank}-{spec.incarnation}"


async def _end_of(future: Future) -> None:
    """Wait for a task's end and raise what it raised; nothing is fetched."""
    error = await future.exception()
    if error is None and future.cancelled():
        error = MemberLost(f"the task {future.key} was cancelled from outside, or the scheduler is gone")
    if error is not None:
        raise error


def _error_of(end: asyncio.Future[None]) -> BaseException | None:
    """What an ended task raised, if it did."""
    if not end.done():
        return None
    return asyncio.CancelledError("cancelled") if end.cancelled() else end.exception()
