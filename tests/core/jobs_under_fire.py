"""Jobs that prove by locks of their own that nobody is where they are, and that end in every way there is."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from dataclasses import dataclass

from tests.core.jobs_at_work import Flags

from dask_bridges.jobs import Job

__all__ = ["Ending", "held_twice", "records", "works"]

#: Half devices of a whole one.
HALVES = 2


@dataclass(frozen=True)
class Ending:
    """How a job ends: "return", "raise", "exit", "crash", or "wait" for what others do to it; after `lasts` seconds."""

    number: int
    how: str
    lasts: float


def _alone(flags: Flags) -> list[int]:
    """Lock what this job has, half by half of each device, as long as its process lives."""
    job, locks = Job.current(), []
    wanted = round(HALVES * job.share)
    for device in job.devices:
        got = 0
        for half in range(HALVES):
            lock = os.open(flags.folder / f"{device}.{half}", os.O_RDWR | os.O_CREAT)
            try:
                if got < wanted:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    locks.append(lock)
                    got += 1
            except OSError:
                os.close(lock)
        if got < wanted:
            flags.set(f"twice-{device}-{job.key}")
            raise AssertionError(f"somebody else is on device {device}")
    return locks


def _note(flags: Flags, number: int, what: str) -> None:
    job = Job.current()
    line = json.dumps([time.monotonic_ns(), number, what, job.devices, job.share]) + "\n"
    file = os.open(flags.folder / "records", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line.encode())
    os.close(file)


def works(flags: Flags, ending: Ending) -> int:
    """A job that notes its beginning, and its end where that is of its own making."""
    _alone(flags)
    _note(flags, ending.number, "begins")
    if ending.how == "wait":
        flags.set(f"up-{ending.number}", str(os.getpid()))
        time.sleep(600)
    time.sleep(ending.lasts)
    _note(flags, ending.number, "ends")
    match ending.how:
        case "raise":
            raise LookupError(ending.number)
        case "exit":
            os._exit(3)
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
    return ending.number


def records(flags: Flags) -> list[tuple[int, int, str, list[str], float]]:
    """When, who, what, and on which share of which devices."""
    return sorted(tuple(json.loads(line)) for line in (flags.folder / "records").read_text().splitlines())


def held_twice(flags: Flags) -> list[str]:
    """Jobs that found somebody else on their device, by their locks or by what all have noted."""
    found = [path.name for path in flags.folder.glob("twice-*")]
    ended = {number for _, number, what, _, _ in records(flags) if what == "ends"}
    used: dict[str, float] = {}
    for _, number, what, devices, share in records(flags):
        for device in devices if number in ended else []:
            used[device] = used.get(device, 0.0) + (share if what == "begins" else -share)
            if used[device] > 1:
                found.append(f"{device}: {number}")
    return found
