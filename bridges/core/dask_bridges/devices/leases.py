"""Who has which device: leases that every process of this user on this machine respects, and that a crash frees.

A lease is an flock on a file, one a device, in a folder private to the user. The
process that works on the device inherits the lock with its descriptor, and so does
whatever it starts itself: the device is free when the last of them is gone. It is
leased again only when its memory is free as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from urllib.parse import quote

import psutil
from dask.utils import format_bytes, parse_bytes

from dask_bridges import config
from dask_bridges.devices import nvml
from dask_bridges.devices.found import Device
from dask_bridges.devices.nvml import Usage
from dask_bridges.processes import folders

__all__ = ["Holder", "Lease", "Leases", "leases_here", "machine_here"]

logger = logging.getLogger("dask_bridges.devices")

MEMORY = Path("/dev/shm")
#: Seconds between two looks at a device that another process holds, or whose memory is not free yet.
LOOK = 0.1
#: Number of the first descriptor of a lock in a child process.
FIRST = 900


@dataclass(frozen=True)
class Holder:
    """Who holds a device, as others are told.

    Attributes
    ----------
    name : str
        What people call it.
    worker : str
        Address of its Dask worker.
    pid : int
        The process that asked for it.
    since : float
        Seconds since the epoch.
    """

    name: str
    worker: str = ""
    pid: int = field(default_factory=os.getpid)
    since: float = field(default_factory=time.time)


class Lease:
    """Some devices, or a share of one, that nobody else has until it is closed.

    Attributes
    ----------
    devices : tuple of Device
    share : float
        Of each of them; 1 for whole ones.
    holder : Holder
    """

    def __init__(self, leases: Leases, devices: tuple[Device, ...], share: float, holder: Holder) -> None:
        self._leases = leases
        self.devices = devices
        self.share = share
        self.holder = holder

    @property
    def descriptors(self) -> dict[int, int]:
        """The locks, for the process that works there to inherit: descriptors here, by their numbers there."""
        return {FIRST + at: self._leases._slots[device.key].lock for at, device in enumerate(self.devices)}

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables by which that process sees these devices and no others."""
        return {
            "CUDA_VISIBLE_DEVICES": ",".join(device.name for device in self.devices),
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # NVML's
        }

    def close(self) -> None:
        """Give them back."""
        self._leases._give_back(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _Slot:
    """One device, as this process knows it."""

    def __init__(self, device: Device, path: Path) -> None:
        self.device = device
        self.path = path
        self.lock = -1
        self.held: list[Lease] = []
        self.baseline: int | None = None
        self.dirty_since = float("inf")
        self.aside = ""

    @property
    def free(self) -> float:
        return 1.0 - sum(lease.share for lease in self.held)


@dataclass(eq=False)
class _Request:
    devices: Sequence[Device]
    keys: frozenset[str]
    amount: float
    holder: Holder


class Leases:
    """The leases of this process; one object a process, see `leases_here`.

    Parameters
    ----------
    folder : Path
        Of the lock files.
    probe : callable
        ``probe(device) -> Usage``.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from dask_bridges.devices import Device, Holder, Leases
    >>> leases = Leases(pathlib.Path(tempfile.mkdtemp()))
    >>> with leases.lease([Device("0", "0"), Device("1", "1")], 1, Holder("me")) as lease:
    ...     [device.name for device in lease.devices]
    ['0']
    """

    def __init__(self, folder: Path, probe: Callable[[Device], Usage] | None = None) -> None:
        self.folder = folder
        self._probe = probe or _usage
        self._slots: dict[str, _Slot] = {}
        self._requests: list[_Request] = []
        self._changed = threading.Condition()
        self.ignored: set[int] = set()

    def lease(
        self,
        devices: Sequence[Device],
        amount: float,
        holder: Holder,
        check: Callable[[], None] = lambda: None,
    ) -> Lease:
        """Wait for some of `devices`: all of the `amount` at once, in the order asked.

        Parameters
        ----------
        devices : sequence of Device
            To choose from.
        amount : float
            How many, or a share of one.
        holder : Holder
        check : callable
            Called now and then; what it raises ends the waiting.
        """
        request = _Request(devices, frozenset(device.key for device in devices), amount, holder)
        with self._changed:
            for device in devices:
                if device.key not in self._slots:
                    self._slots[device.key] = self._slot(device)
            self._requests.append(request)
            try:
                while True:
                    check()
                    if (lease := self._granted(request)) is not None:
                        return lease
                    self._changed.wait(LOOK)
            finally:
                self._requests.remove(request)
                self._changed.notify_all()

    @contextlib.contextmanager
    def turn(self, keys: Iterable[str], check: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Wait until no other gang, of whatever process on this machine, collects any of these devices.

        Whoever leases by itself needs no turn, and takes none away.

        Parameters
        ----------
        keys : iterable of str
            Of the devices.
        check : callable
            Called now and then; what it raises ends the waiting.
        """
        self._make_folder()
        with contextlib.ExitStack() as stack:
            for key in sorted(set(keys)):  # in one order for all
                lock = _open(self._path(key, "turn"))
                stack.callback(os.close, lock)
                while not _locked(lock):
                    check()
                    time.sleep(LOOK)
            yield

    def leave_in_use(self, lease: Lease) -> None:
        """What is used of its devices now stays in use, by this process itself, and nobody here waits for it.

        For one that has worked on them in this process, which containers may not see among those of a device.
        """
        with self._changed:
            for device in lease.devices:
                self._slots[device.key].baseline = _unseen(self._probe(device))

    def wake(self) -> None:
        """Have those who wait look whether they still do."""
        with self._changed:
            self._changed.notify_all()

    def status(self, devices: Iterable[Device]) -> list[dict[str, Any]]:
        """What is known of each device.

        Returns
        -------
        list of dict
            With "device", "state" ("free", "held", "held elsewhere" or "set aside"), "holder", and "since" in
            seconds since the epoch.
        """
        with self._changed:
            return [self._status_of(self._slots.get(device.key) or self._slot(device)) for device in devices]

    # With the lock held

    def _granted(self, request: _Request) -> Lease | None:
        for other in itertools.takewhile(lambda other: other is not request, self._requests):
            if other.keys & request.keys:
                return None
        slots = [self._slots[device.key] for device in request.devices]
        chosen = self._share(slots, request.amount) if request.amount < 1 else self._whole(slots, int(request.amount))
        if not chosen:
            return None
        lease = Lease(self, tuple(slot.device for slot in chosen), min(request.amount, 1.0), request.holder)
        for slot in chosen:
            slot.held.append(lease)
            _write(slot.lock, lease.holder)
        return lease

    def _share(self, slots: Sequence[_Slot], amount: float) -> list[_Slot]:
        """The fullest device that has room, or else one that nobody uses."""
        begun = [slot for slot in slots if slot.held and slot.free >= amount]
        if begun:
            return [min(begun, key=lambda slot: slot.free)]
        return self._whole(slots, 1)

    def _whole(self, slots: Sequence[_Slot], count: int) -> list[_Slot]:
        taken: list[_Slot] = []
        for slot in slots:
            if len(taken) < count and not slot.held and self._take(slot):
                taken.append(slot)
        if len(taken) < count:
            for slot in taken:
                _close(slot)
            return []
        return taken

    def _take(self, slot: _Slot) -> bool:
        """Lock a device, if no other process has it and its memory is free."""
        lock = _open(slot.path)
        if not _locked(lock):
            os.close(lock)
            return False
        slot.lock = lock
        if why := self._in_use(slot):
            _close(slot)
            self._set_aside(slot, why)
            return False
        if slot.aside:
            logger.info("device %s is free again", slot.device.name)
        slot.dirty_since, slot.aside = float("inf"), ""
        return True

    def _in_use(self, slot: _Slot) -> str:
        """Who uses the memory of a device that nobody holds; empty where nobody does."""
        usage = self._probe(slot.device)
        ours = sum(memory for pid, memory in usage.processes if pid in self.ignored)
        others = [(pid, memory) for pid, memory in usage.processes if pid not in self.ignored]
        if slot.baseline is None:
            slot.baseline = _unseen(usage)
        above = usage.memory - ours - slot.baseline
        tolerance = parse_bytes(config.get("device-memory-tolerance"))
        if not others and above <= tolerance:
            return ""
        who = ", ".join(f"process {pid} ({_name_of(pid)})" for pid, _ in others) or "nobody that can be seen here"
        return f"{format_bytes(max(above, 0))} of its memory are in use by {who}"

    def _set_aside(self, slot: _Slot, why: str) -> None:
        now = time.monotonic()
        slot.dirty_since = min(slot.dirty_since, now)
        if now - slot.dirty_since >= config.seconds("device-settle-timeout"):
            if not slot.aside:
                logger.warning("device %s is set aside until it is free: %s", slot.device.name, why)
            slot.aside = why

    def _give_back(self, lease: Lease) -> None:
        with self._changed:
            for device in lease.devices:
                slot = self._slots[device.key]
                if lease in slot.held:
                    slot.held.remove(lease)
                    if not slot.held:
                        _close(slot)
            self._changed.notify_all()

    def _slot(self, device: Device) -> _Slot:
        self._make_folder()
        return _Slot(device, self._path(device.key, "lock"))

    def _make_folder(self) -> None:
        with contextlib.suppress(FileExistsError):
            folders.make_private(self.folder)
        folders.check_private(self.folder)

    def _path(self, key: str, kind: str) -> Path:
        return self.folder / f"{quote(key, safe='')}.{kind}"

    def _status_of(self, slot: _Slot) -> dict[str, Any]:
        holders = [lease.holder for lease in slot.held]
        state = "held" if holders else "set aside" if slot.aside else "free"
        if state == "free" and slot.path.exists():
            lock = _open(slot.path)
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                state, holders = "held elsewhere", _read(lock)
            finally:
                os.close(lock)
        return {
            "device": slot.device.name,
            "state": state,
            "holder": ", ".join(holder.name for holder in holders) or slot.aside,
            "since": min((holder.since for holder in holders), default=0.0),
        }


@functools.cache
def leases_here() -> Leases:
    """The leases of this process."""
    probe = config.get("device-probe")
    folder = config.get("device-folder")
    base = MEMORY if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    path = Path(folder) if folder else base / f"dask-bridges-devices-{os.geteuid()}"
    return Leases(path, resolve_name(probe) if probe else None)


@functools.cache
def machine_here() -> str:
    """A name of this machine, the same to all that can share leases here."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _unseen(usage: Usage) -> int:
    """Bytes that are used by none of the processes that can be seen."""
    return usage.memory - sum(memory for _, memory in usage.processes)


def _usage(device: Device) -> Usage:
    return nvml.usage(device.key) if device.real else Usage()


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _close(slot: _Slot) -> None:
    lock, slot.lock = slot.lock, -1
    os.close(lock)


def _write(lock: int, holder: Holder) -> None:
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(dataclasses.asdict(holder)).encode(), 0)


def _read(lock: int) -> list[Holder]:
    try:
        return [Holder(**json.loads(os.pread(lock, 64 * 1024, 0)))]
    except (ValueError, TypeError):  # it is being written
        return []


def _name_of(pid: int) -> str:
    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return "of another user or container"
