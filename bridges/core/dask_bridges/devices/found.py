"""The devices of a worker: as NVML, its environment, its Dask resources, or the user name them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dask_bridges.devices import nvml
from dask_bridges.devices.nvml import GPU

__all__ = ["Device", "devices_here"]

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Device:
    """One device that a job can have for itself.

    Attributes
    ----------
    name : str
        As ``CUDA_VISIBLE_DEVICES`` names it.
    key : str
        What it is leased by: its UUID, or its name where nothing more is known.
    memory : int
        Its bytes; 0 where that is not known.
    real : bool
        Whether NVML knows it, so that who uses it can be looked up.
    """

    name: str
    key: str
    memory: int = 0
    real: bool = False


def devices_here(named: Sequence[str] | None, resources: Mapping[str, float]) -> list[Device]:
    """The devices of a worker, in whose process this is called.

    Those the user has `named`; else those its ``CUDA_VISIBLE_DEVICES`` names; else all
    that NVML knows; else as many as it declares as its Dask resource "GPU".
    """
    gpus = nvml.gpus()
    if named is None and VISIBLE in os.environ:
        named = visible(os.environ[VISIBLE])
    if named is not None:
        return [_device(name, gpus) for name in named]
    if gpus:
        return [Device(gpu.uuid, gpu.uuid, gpu.memory, True) for gpu in gpus]
    return [_device(str(number), []) for number in range(int(resources.get("GPU", 0)))]


def visible(names: str) -> list[str]:
    """The devices that a value of ``CUDA_VISIBLE_DEVICES`` names; as CUDA does, none after a -1.

    >>> from dask_bridges.devices.found import visible
    >>> visible("2,GPU-8932f937,-1,0")
    ['2', 'GPU-8932f937']
    """
    found: list[str] = []
    for name in map(str.strip, names.split(",")):
        if not name or name.startswith("-") or name in ("none", "NoDevFiles"):
            break
        found.append(name)
    return list(dict.fromkeys(found))


def _device(name: str, gpus: Sequence[GPU]) -> Device:
    """A device by its index, its UUID or the beginning of that; or a name that NVML does not know."""
    for gpu in gpus:
        if name == str(gpu.index) or (name.startswith("GPU-") and gpu.uuid.startswith(name)):
            return Device(name, gpu.uuid, gpu.memory, True)
    return Device(name, name, 0, bool(gpus) and name.startswith("MIG-"))
