"""Devices for the members of a gang: who can have some is found out before; a member leases its own as it starts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distributed import Client

from dask_bridges import config
from dask_bridges.devices.finding import Group, find_groups
from dask_bridges.devices.found import Device
from dask_bridges.devices.leases import Holder, Lease, leases_here, machine_here
from dask_bridges.errors import PlacementError
from dask_bridges.placement import WorkerInfo
from dask_bridges.task import WorkerMember

__all__ = ["Wanted", "check_count", "leased", "leased_together", "meet", "what_there_is", "with_devices"]


@dataclass(frozen=True)
class Wanted:
    """The devices that a member needs.

    Attributes
    ----------
    count : int
    devices : tuple of Device
        Of its host, to choose from.
    timeout : float
        Longest wait for them, in seconds.
    ignored : frozenset of int
        Processes whose use of a device is nobody's work: those of Dask's workers.
    """

    count: int
    devices: tuple[Device, ...]
    timeout: float
    ignored: frozenset[int] = frozenset()


def check_count(count: object, argument: str) -> None:
    """See that `count` is a number of devices.

    Raises
    ------
    ValueError
        Naming `argument`.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{argument}={count!r}: pass how many devices each member gets, 1 or more")


async def with_devices(
    client: Client, workers: Sequence[WorkerInfo], count: int, label: str, timeout: float | str | None = None
) -> tuple[list[WorkerInfo], Mapping[str, Wanted]]:
    """Those of `workers` whose members can have `count` devices each, all at once, and what each of them wants.

    `timeout` is the longest wait for them (``dask-bridges.timeout``).

    Raises
    ------
    PlacementError
        If there are none; it says what there is.
    """
    groups, limit = await find_groups(client, workers, None), config.seconds("timeout", timeout)
    wanted = {
        address: Wanted(count, tuple(group.devices), limit, frozenset(group.pids))
        for group in groups
        for address in group.workers[: len(group.devices) // count]
    }
    if not wanted:
        raise PlacementError(
            f"{label} needs {count} of the devices of one host for each member, and {what_there_is(groups, workers)}"
        )
    return [worker for worker in workers if worker.address in wanted], wanted


def what_there_is(groups: Sequence[Group], workers: Sequence[WorkerInfo]) -> str:
    """The devices that were found on some workers, for an error message."""
    if not groups:
        return (
            f"none of the {len(workers)} workers has one: neither NVML (is nvidia-ml-py installed there?), nor "
            "CUDA_VISIBLE_DEVICES, nor a Dask resource GPU names one"
        )
    return ", ".join(f"{group.name} has {len(group.devices)}" for group in groups)


@contextlib.contextmanager
def leased(member: WorkerMember, wanted: Wanted | None) -> Iterator[Lease | None]:
    """Wait for a member's devices, which it has until the block is left; None where it wants none.

    Raises
    ------
    PlacementError
        If they do not become free in time; it says who has them.
    """
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(_Waiting(member, wanted).lease()) if wanted else None


def meet(member: WorkerMember, wanted: Wanted | None, says: str = "") -> list[dict[str, Any]]:
    """Have the members of a gang know where each is, what it says, and which devices it would take.

    Returns
    -------
    list of dict
        By rank, with "says"; for `leased_together`, and of what `Member.recall` tells while that lasts and after it.
    """
    return member.exchange(_seat(member, wanted, says))


@contextlib.contextmanager
def leased_together(
    member: WorkerMember, wanted: Wanted | None, seats: Sequence[Mapping[str, Any]] | None = None
) -> Iterator[Lease | None]:
    """`leased`, by every member of a gang: none goes on before all have theirs.

    Gangs take turns at the devices of a machine, and go from machine to machine in one
    order. So of two gangs that want the same devices one has all of its own before the
    other one has any of them, and neither waits for the other with a part in its hands.
    A member that was lost and comes again leases alone.

    Parameters
    ----------
    member : WorkerMember
    wanted : Wanted, optional
    seats : list of dict, optional
        What `meet` has told; without it all members or none want devices.
    """
    if seats is None and wanted is not None and not member.incarnation:
        seats = meet(member, wanted)
    if seats is None or member.incarnation or not any(seat["keys"] for seat in seats):
        with leased(member, wanted) as lease:
            yield lease
        return
    mine, limit = seats[member.rank], max(seat["limit"] for seat in seats)
    waiting = _Waiting(member, wanted) if wanted else None
    with contextlib.ExitStack() as stack:
        lease = None
        for machine in sorted({seat["machine"] for seat in seats if seat["keys"]}):
            there = [rank for rank, seat in enumerate(seats) if seat["machine"] == machine and seat["keys"]]
            with contextlib.ExitStack() as turn:
                if waiting is not None and there[0] == member.rank:
                    keys = {key for rank in there for key in seats[rank]["keys"]}
                    turn.enter_context(waiting.turn(sorted(keys)))
                member.exchange(mine, limit)  # it is this gang's turn on this machine
                if waiting is not None and member.rank in there:
                    lease = stack.enter_context(waiting.lease())
                member.exchange(mine, limit)  # all have theirs there
        yield lease


def _seat(member: WorkerMember, wanted: Wanted | None, says: str) -> dict[str, Any]:
    limit = member.spec.deadlines.start_timeout + (wanted.timeout if wanted else 0.0)
    keys = [device.key for device in wanted.devices] if wanted else []
    return {"says": says, "machine": machine_here(), "keys": keys, "limit": limit}


class _Waiting:
    """The wait of a member: people are told for whom, and it has an end."""

    def __init__(self, member: WorkerMember, wanted: Wanted) -> None:
        self._member, self._wanted = member, wanted
        leases_here().ignored |= wanted.ignored
        self._start = time.monotonic()
        self._notice = config.seconds("wait-notice")

    def lease(self) -> Lease:
        """Its devices."""
        holder = Holder(f"{self._member.label} {self._member.name}", self._member.worker.address)
        with self._member.span("wait"):
            return leases_here().lease(self._wanted.devices, self._wanted.count, holder, self.check)

    @contextlib.contextmanager
    def turn(self, keys: Sequence[str]) -> Iterator[None]:
        """Its gang's turn at these devices of its machine."""
        with contextlib.ExitStack() as stack:
            with self._member.span("wait"):
                stack.enter_context(leases_here().turn(keys, self.check))
            yield

    def check(self) -> None:
        """Raise where it is to end."""
        self._member.check()
        waited = time.monotonic() - self._start
        if waited > self._wanted.timeout:
            raise PlacementError(
                f"{self._member.label}: {self._member.name} had no {self._wanted.count} of its "
                f"{len(self._wanted.devices)} devices within {self._wanted.timeout:g} s: {self._who_has_them()}"
            )
        if waited > self._notice:
            self._notice = float("inf")
            self._member.log(f"waits for {self._wanted.count} of these devices: {self._who_has_them()}")

    def _who_has_them(self) -> str:
        rows = leases_here().status(self._wanted.devices)
        return "; ".join(f"{row['device']} is {row['state']}: {row['holder']}".removesuffix(": ") for row in rows)
