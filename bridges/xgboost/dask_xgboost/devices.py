"""GPUs to train on: those that workers own, for ranks in their processes, or any of their host's, for children."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distributed import Client

from dask_bridges import config
from dask_bridges.devices import Device, devices_here, leases_here
from dask_bridges.devices.members import Wanted, leased_together, with_devices
from dask_bridges.errors import PlacementError
from dask_bridges.placement import WorkerInfo
from dask_bridges.task import WorkerMember

__all__ = ["OnGPUs", "on_gpus", "own_gpu", "wants_gpus"]

VISIBLE = "CUDA_VISIBLE_DEVICES"


def wants_gpus(params: Mapping[str, Any]) -> bool:
    """Whether a training is to run on GPUs.

    Raises
    ------
    ValueError
        If ``device`` names one by its number.
    """
    device = str(params.get("device", "cpu"))
    kind, colon, _ = device.partition(":")
    if kind not in ("cuda", "gpu"):
        return False
    if colon:
        raise ValueError(
            f"device={device!r}: each rank has one GPU, and sees no other: use device={kind!r}, and choose workers by "
            "workers="
        )
    return True


@dataclass(frozen=True)
class _Seen:
    """What a worker's process sees: how many GPUs, and which of them is its own."""

    own: Device | None
    count: int
    pid: int


def look_here() -> _Seen:
    """What a worker sees; runs there. Its own is the first that its variable names (dask-cuda's way)."""
    devices = devices_here(None, {})
    own = devices[0] if devices and (VISIBLE in os.environ or len(devices) == 1) else None
    return _Seen(own, len(devices), os.getpid())


@dataclass(frozen=True)
class OnGPUs:
    """Who trains on which GPU.

    Attributes
    ----------
    workers : list of WorkerInfo
    wanted : mapping of str to Wanted
        Of each, by its address: the GPU that it owns, or one of its host's.
    owned : bool
        Whether they are the workers' own, and ranks train in these workers' processes; in children of them if not.
    """

    workers: list[WorkerInfo]
    wanted: Mapping[str, Wanted]
    owned: bool


async def on_gpus(
    client: Client, workers: Sequence[WorkerInfo], label: str, *, named: bool, owned: bool, timeout: float | str | None
) -> OnGPUs:
    """A GPU for each of `workers`, as far as there are any.

    Ranks train in their workers' own processes if every worker that sees GPUs owns one, and there are such; in
    children of these if not, and where it is not to be `owned` ones.

    Raises
    ------
    PlacementError
        If there is none, or none for one of those that were `named`.
    """
    limit = config.seconds("timeout", timeout)
    there = await _of_owners(client, workers, limit) if owned else None
    if there is None:
        there = OnGPUs(*await with_devices(client, workers, 1, label, timeout), owned=False)
    if named and len(there.workers) < len(workers):
        lacking = ", ".join(worker.address for worker in workers if worker not in there.workers)
        having = ", ".join(worker.address for worker in there.workers)
        raise PlacementError(
            f"device='cuda' is a GPU for each of the workers named, and there is none for {lacking}: they see none, or "
            f"there are fewer GPUs than workers on their host. Name those that have one, {having}, by workers="
        )
    return there


async def _of_owners(client: Client, workers: Sequence[WorkerInfo], limit: float) -> OnGPUs | None:
    """The workers that own a GPU; None where there are none, or some see GPUs of which they own none."""
    seen: dict[str, _Seen] = await client.run(look_here, workers=[worker.address for worker in workers])
    owners = Counter((worker.host, own.key) for worker in workers if (own := seen[worker.address].own) is not None)
    owning, wanted = [], {}
    for worker in workers:
        its = seen[worker.address]
        if its.own is not None and owners[worker.host, its.own.key] == 1:
            owning.append(worker)
            wanted[worker.address] = Wanted(1, (its.own,), limit, frozenset({its.pid}))
        elif its.count:
            return None
    return OnGPUs(owning, wanted, owned=True) if owning else None


@contextlib.contextmanager
def own_gpu(member: WorkerMember, wanted: Wanted | None) -> Iterator[None]:
    """Lease the GPU of a rank's worker, whose process keeps some of its memory afterwards."""
    with leased_together(member, wanted) as lease:
        try:
            yield
        finally:
            if lease is not None:
                leases_here().leave_in_use(lease)
