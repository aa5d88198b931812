"""Devices for the members of a gang: who can have some is found out before; a member leases its own as it starts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from distributed import Client

from dask_bridges import config
from dask_bridges.devices.finding import Group, find_groups
from dask_bridges.devices.found import Device
from dask_bridges.devices.leases import Holder, Lease, leases_here
from dask_bridges.errors import PlacementError
from dask_bridges.placement import WorkerInfo
from dask_bridges.task import WorkerMember

__all__ = ["Wanted", "check_count", "leased", "with_devices"]


@dataclass(frozen=True)
class Wanted:
    """The devices that a member needs.

    Attributes
    ----------
    count : int
    devices : tuple of Device
        Of its host, to choose from.
    ignored : frozenset of int
        Processes whose use of a device is nobody's work: those of Dask's workers.
    """

    count: int
    devices: tuple[Device, ...]
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
    client: Client, workers: Sequence[WorkerInfo], count: int, label: str
) -> tuple[list[WorkerInfo], Mapping[str, Wanted]]:
    """Those of `workers` whose members can have `count` devices each, all at once, and what each of them wants.

    Raises
    ------
    PlacementError
        If there are none; it says what there is.
    """
    groups = await find_groups(client, workers, None)
    wanted = {
        address: Wanted(count, tuple(group.devices), frozenset(group.pids))
        for group in groups
        for address in group.workers[: len(group.devices) // count]
    }
    if not wanted:
        raise PlacementError(
            f"{label} needs {count} devices for each member, all of one host, and {_there(groups, workers)}"
        )
    return [worker for worker in workers if worker.address in wanted], wanted


def _there(groups: Sequence[Group], workers: Sequence[WorkerInfo]) -> str:
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
        If they do not become free in time (``dask-bridges.timeout``); it says who has them.
    """
    if wanted is None:
        yield None
        return
    leases = leases_here()
    leases.ignored |= wanted.ignored
    deadline = time.monotonic() + config.seconds("timeout")

    def check() -> None:
        member.check()
        if time.monotonic() > deadline:
            rows = leases.status(wanted.devices)
            raise PlacementError(
                f"{member.label}: {member.name} had no {wanted.count} of its {len(wanted.devices)} devices within "
                f"{config.seconds('timeout'):g} s: "
                + "; ".join(f"{row['device']} is {row['state']} {row['holder']}".strip() for row in rows)
            )

    holder = Holder(f"{member.label} {member.name}", member.worker.address)
    with member.span("wait"), contextlib.ExitStack() as stack:
        lease = stack.enter_context(leases.lease(wanted.devices, wanted.count, holder, check))
        kept = stack.pop_all()
    with kept:
        yield lease
