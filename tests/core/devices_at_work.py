"""Dask workers with devices that are not there, and who holds them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.config
import pytest
from distributed import Client, LocalCluster

from dask_bridges.devices import Device, Usage, devices_here, leases_here
from dask_bridges.testing import wait_until_free

unseen = 0


@contextlib.contextmanager
def cluster_with_devices(folder: Path, probe: str = "", **options: Any) -> Iterator[LocalCluster]:
    """Two Dask workers of one host, each of which declares a device; leases are in a folder of their own.

    Other sessions on this machine would have the same devices. `probe` is a function of this module that says what
    is used of them. Workers have the configuration of who starts them.
    """
    settings = {"device-folder": str(folder / "leases"), "device-probe": f"{__name__}:{probe}" if probe else None}
    with (
        pytest.MonkeyPatch.context() as patch,
        dask.config.set({f"dask-bridges.{name}": value for name, value in settings.items()}),
    ):
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        with LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=":0", **{"resources": {"GPU": 1}, **options}
        ) as cluster:
            yield cluster


def used_by_who_asks(device: Device) -> Usage:
    """As where a Dask worker has worked on a device in its own process; it is not seen to use all of that memory."""
    return Usage(2**30 + unseen, ((os.getpid(), 2**30),))


def use_unseen(memory: int) -> None:
    """Have this process use more memory of its devices, which cannot be seen to be its own."""
    global unseen
    unseen = memory


@contextlib.contextmanager
def client_of(cluster: LocalCluster) -> Iterator[Client]:
    """A client; afterwards nothing of a gang is left, and no lease."""
    with dask.config.set({"dask-bridges.timeout": "60s"}), Client(cluster, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=60)
        yield client
        wait_until_free(client, timeout=10)
        assert held(client) == {}


def _see(visible: str | None) -> None:
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible


def workers_of(client: Client) -> list[str]:
    return sorted(client.scheduler_info(n_workers=-1)["workers"])


def see(client: Client, *visible: str | None) -> None:
    """Set what each worker sees; None for no word of it."""
    for worker, its in zip(workers_of(client), visible):
        client.run(_see, its, workers=[worker])


def _rows_here() -> list[dict[str, Any]]:
    return leases_here().status(devices_here(["0", "1"], {}))


def held(client: Client) -> dict[str, str]:
    """The holders of those of the devices "0" and "1" that are not free, as any Dask worker sees them."""
    (rows, *_) = client.run(_rows_here).values()
    return {row["device"]: row["holder"] for row in rows if row["state"] != "free"}
