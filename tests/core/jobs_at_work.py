"""What the jobs of tests do, and how tests wait for them: imported fast, since each job's process does that."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

#: Devices of the first two workers of the shared cluster.
FOUR = {"0": ["0", "1"], "1": ["2", "3"]}


class Flags:
    """Files by which a test and its jobs tell each other how far they are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def set(self, name: str, text: str = "set") -> None:
        part = self.folder / f".{name}.part"
        part.write_text(text)
        part.rename(self.folder / name)

    def wait(self, name: str, timeout: float = 60.0) -> str:
        deadline = time.monotonic() + timeout
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, f"{name} was never set"
            time.sleep(0.005)
        return (self.folder / name).read_text()


def find_in(folder: str) -> None:
    sys.path.insert(0, folder)


def find_not_in(folder: str) -> None:
    sys.path.remove(folder)


def where(_: Any = None) -> tuple[str, int]:
    return os.environ["CUDA_VISIBLE_DEVICES"], os.getpid()


def hold(flags: Flags, name: str, go: str = "go") -> str:
    flags.set(name, str(os.getpid()))
    flags.wait(go)
    return os.environ["CUDA_VISIBLE_DEVICES"]


limits: list[int] = []  # what was told to `note_limit` in this process


def note_limit(memory: int) -> None:
    limits.append(memory)


def add(*numbers: Any, plus: Any = 0) -> Any:
    return sum(numbers) + plus


def gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def wait_until(true: Callable[[], Any], timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@contextlib.contextmanager
def claimed(flags: Flags, devices: str = "") -> Iterator[str]:
    """What this process sees as its devices, or these; an error if another that claims has one of them now."""
    devices = devices or os.environ["CUDA_VISIBLE_DEVICES"]
    with contextlib.ExitStack() as stack:
        for device in devices.split(","):
            claim = flags.folder / f"claim-{device}"
            claim.mkdir()
            stack.callback(claim.rmdir)
        yield devices


def claim(flags: Flags, _: Any = None) -> str:
    with claimed(flags) as devices:
        return devices
