"""Which devices there are: what the workers have, or the user has named, by host."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distributed import Client, Worker

from dask_bridges.devices.found import Device, devices_here
from dask_bridges.errors import PlacementError
from dask_bridges.placement import WorkerInfo, check_packages

__all__ = ["Group", "find_groups"]


@dataclass
class Group:
    """Devices that jobs can have together: those of a host, or that the user named for one worker.

    Attributes
    ----------
    name : str
        The host, or the worker's address.
    workers : list of str
        Addresses of those that can host the jobs; one of them does.
    devices : list of Device
    pids : set of int
        Of these workers.
    """

    name: str
    workers: list[str] = field(default_factory=list)
    devices: list[Device] = field(default_factory=list)
    pids: set[int] = field(default_factory=set)


def look_here(named: Mapping[str, Sequence[str]], dask_worker: Worker) -> dict[str, Any]:
    """What a worker has; runs there."""
    names = named.get(dask_worker.address)
    devices = devices_here(names, dask_worker.state.total_resources)
    return {"devices": devices, "pid": os.getpid(), "declared": bool(devices) and not _named(devices, names)}


def _named(devices: Sequence[Device], names: Sequence[str] | None) -> bool:
    return names is not None or "CUDA_VISIBLE_DEVICES" in os.environ or any(device.real for device in devices)


async def find_groups(
    client: Client, workers: Sequence[WorkerInfo], named: Mapping[str, Sequence[str]] | None, *, strict: bool = True
) -> list[Group]:
    """The devices of `workers`, by host; those that the user `named` by worker, by worker.

    A worker that is lost meanwhile has none.

    Raises
    ------
    PlacementError
        If a name in `named` is no worker and no host, or a worker lacks this package.
    """
    wanted = {str(who): [str(device) for device in devices] for who, devices in (named or {}).items()}
    names = _by_worker(workers, wanted, strict) if named is not None else {}
    looked_at = [worker for worker in workers if named is None or worker.address in names]
    asked = [worker.address for worker in looked_at]
    await check_packages(client, asked, ["dask_bridges"])
    found = await client.run(look_here, names, workers=asked, on_error="ignore")
    groups: dict[str, Group] = {}
    for worker in looked_at:
        if worker.address not in found:
            continue
        alone = worker.name in wanted or worker.address in wanted
        group = groups.setdefault(worker.address if alone else worker.host, Group(worker.host))
        if alone:
            group.name = worker.address
        its = found[worker.address]
        group.workers.append(worker.address)
        group.pids.add(its["pid"])
        if its["declared"]:  # a number: each worker of a host declares its own
            start = len(group.devices)
            group.devices += [Device(str(start + at), str(start + at)) for at in range(len(its["devices"]))]
        else:
            known = {device.key for device in group.devices}
            group.devices += [device for device in its["devices"] if device.key not in known]
    return [group for group in groups.values() if group.devices]


def _by_worker(workers: Sequence[WorkerInfo], wanted: Mapping[str, list[str]], strict: bool) -> dict[str, list[str]]:
    known = {name for worker in workers for name in (worker.name, worker.address, worker.host)}
    unknown = [name for name in wanted if name not in known]
    if unknown and strict:
        there = ", ".join(f"{worker.address} (name {worker.name}, host {worker.host})" for worker in workers)
        raise PlacementError(f"devices= names {unknown}, which are no workers and no hosts; there are {there}")
    return {
        worker.address: wanted[name]
        for worker in workers
        for name in (worker.host, worker.name, worker.address)
        if name in wanted
    }
