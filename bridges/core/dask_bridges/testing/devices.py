"""Devices that are not there: what is in use of them is what a test writes to a file."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import dask.config

from dask_bridges.devices import Device, Usage

__all__ = ["pretended", "usage"]

#: The environment variable that names the file.
FILE = "DASK_BRIDGES_PRETENDED_DEVICES"


def usage(device: Device) -> Usage:
    """What the file says of a device: nothing in use where it does not name it. For ``dask-bridges.device-probe``."""
    memory, processes = json.loads(Path(os.environ[FILE]).read_text()).get(device.name, (0, []))
    return Usage(memory, tuple(map(tuple, processes)))


class Pretended:
    """What is in use of devices that are not there."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.set({})

    def set(self, used: Mapping[str, tuple[int, list[tuple[int, int]]]]) -> None:
        """By the name of each device: bytes in use, and the processes that hold them, with theirs."""
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps(used))
        part.rename(self._file)


@contextlib.contextmanager
def pretended(folder: Path) -> Iterator[Pretended]:
    """Have this process, and the clusters it starts meanwhile, ask a file; leases are in `folder` as well."""
    settings = {
        "dask-bridges.device-probe": f"{__name__}:usage",
        "dask-bridges.device-folder": str(folder / "leases"),
    }
    before = os.environ.get(FILE)
    os.environ[FILE] = str(folder / "devices.json")
    try:
        with dask.config.set(settings):
            yield Pretended(folder / "devices.json")
    finally:
        os.environ.pop(FILE)
        if before is not None:
            os.environ[FILE] = before
