"""NVIDIA's management library: which GPUs a machine has, and who uses their memory. It makes no CUDA context."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

__all__ = ["GPU", "Usage", "gpus", "usage"]


@dataclass(frozen=True)
class GPU:
    """One GPU of this machine; `memory` in bytes."""

    index: int
    uuid: str
    name: str
    memory: int


@dataclass(frozen=True)
class Usage:
    """What is used of a device: bytes in all, and by which processes, where that can be seen.

    Attributes
    ----------
    memory : int
    processes : tuple of (int, int)
        Process ids with the bytes they hold, 0 where that is not known.
    """

    memory: int = 0
    processes: tuple[tuple[int, int], ...] = ()


@functools.cache
def _library() -> Any:
    """The library, ready; None where there is no driver, or no package nvidia-ml-py."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # ImportError, or an error of a package that is not there to be named
        return None
    return pynvml


def gpus() -> list[GPU]:
    """The GPUs of this machine by their indices; none where NVML is not there."""
    nvml = _library()
    if nvml is None:
        return []
    found = []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle).total
        found.append(GPU(index, _text(nvml.nvmlDeviceGetUUID(handle)), _text(nvml.nvmlDeviceGetName(handle)), memory))
    return found


def usage(uuid: str) -> Usage:
    """What is used of a GPU, or of a part of one (MIG)."""
    nvml = _library()
    handle = nvml.nvmlDeviceGetHandleByUUID(uuid.encode())
    processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    return Usage(
        int(nvml.nvmlDeviceGetMemoryInfo(handle).used),
        tuple((int(process.pid), int(process.usedGpuMemory or 0)) for process in processes),
    )


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
