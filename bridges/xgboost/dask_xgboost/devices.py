"""GPUs to train on: a rank trains in its worker's own process, so on the one that its worker owns."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distributed import Client

from dask_bridges import config
from dask_bridges.devices import Device, devices_here, leases_here
from dask_bridges.devices.members import Wanted, leased_together
from dask_bridges.errors import PlacementError
from dask_bridges.placement import WorkerInfo
from dask_bridges.task import WorkerMember

__all__ = ["own_gpu", "wants_gpus", "with_own_gpus"]

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
            f"device={device!r}: each worker trains on the one GPU that it owns, whatever its number: use "
            f"device={kind!r}, and choose workers by workers="
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


async def with_own_gpus(
    client: Client, workers: Sequence[WorkerInfo], *, named: bool, timeout: float | str | None
) -> tuple[list[WorkerInfo], dict[str, Wanted]]:
    """Those of `workers` that own a GPU, and what the ranks there want: that GPU, whatever the worker uses of it.

    Raises
    ------
    PlacementError
        If none does, or one of those that were `named` does not; it says why.
    """
    seen: dict[str, _Seen] = await client.run(look_here, workers=[worker.address for worker in workers])
    owners: dict[tuple[str, str], list[str]] = {}
    for worker in workers:
        if (own := seen[worker.address].own) is not None:
            owners.setdefault((worker.host, own.key), []).append(worker.address)
    limit, wanted, lacking = config.seconds("timeout", timeout), {}, []
    for worker in workers:
        its = seen[worker.address]
        shared = owners[worker.host, its.own.key] if its.own else []
        if its.own is not None and shared == [worker.address]:
            wanted[worker.address] = Wanted(1, (its.own,), limit, frozenset({its.pid}))
        else:
            lacking.append(f"{worker.address} {_why_not(its, [other for other in shared if other != worker.address])}")
    if not wanted or (named and lacking):
        raise PlacementError(
            "device='cuda' trains in a worker's own process, on the GPU that this worker owns:\n  "
            + "\n  ".join(lacking)
            + f"\nStart one worker a GPU, each with its own first in {VISIBLE}, as dask-cuda's LocalCUDACluster and "
            "`dask cuda worker` do; or train in jobs of a dask_bridges.jobs.DevicePool"
        )
    return [worker for worker in workers if worker.address in wanted], wanted


def _why_not(its: _Seen, others: Sequence[str]) -> str:
    if its.own is not None:
        return f"has GPU {its.own.name} first, and so has {', '.join(others)}: name one of them by workers="
    if its.count:
        return f"sees {its.count} GPUs, and no {VISIBLE} names one of them as its own"
    return "sees none: neither NVML (is nvidia-ml-py installed there?) nor its CUDA_VISIBLE_DEVICES names one"


@contextlib.contextmanager
def own_gpu(member: WorkerMember, wanted: Wanted | None) -> Iterator[None]:
    """Lease the GPU of a rank's worker, whose process keeps some of its memory afterwards."""
    with leased_together(member, wanted) as lease:
        try:
            yield
        finally:
            if lease is not None:
                leases_here().leave_in_use(lease)
