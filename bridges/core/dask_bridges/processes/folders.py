"""Folders that are private to the user and go with the process that made them, also when it crashes.

All of a user lie in ``<base>/dask-bridges-<uid>/``. In each is a ``.lock`` on which
its owner keeps an flock: one whose lock can be taken has lost its owner, and is
swept away by whoever makes the next. A folder may name another one, as
``.beside``, that goes with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from dask_bridges.errors import BridgeError

__all__ = ["BESIDE", "Folder", "check_private", "home", "make", "make_private", "sweep"]

#: The link to the folder that goes with this one.
BESIDE = ".beside"
_LOCK = ".lock"


@dataclass(frozen=True)
class Folder:
    """A folder that we hold the lock of.

    Attributes
    ----------
    path : Path
    lock : int
        Descriptor of its lock; -1 for one that has none, whose removal was cut short.
    """

    path: Path
    lock: int

    def remove(self) -> None:
        """Remove it with all that is in it; the lock is held until then."""
        # Renamed first, so that a thread that still writes there does not find it.
        hidden = self.path.with_name(f".{self.path.name.lstrip('.')}")
        with contextlib.suppress(OSError):
            self.path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
        if self.lock >= 0:
            os.close(self.lock)


def home(base: Path) -> Path:
    """Where the folders of this user are in `base`."""
    return base.absolute() / f"dask-bridges-{os.geteuid()}"


def make(base: Path, name: str, beside: Path | None = None) -> Folder:
    """Make a folder and lock it.

    Raises
    ------
    BridgeError
        If the home of these folders belongs to somebody else, or is a symbolic link.
    """
    here = home(base)
    with contextlib.suppress(FileExistsError):
        make_private(here)
    check_private(here)
    lock_of_all = _open_lock(here, os.O_CREAT)
    try:
        _flock(lock_of_all, wait=True)
        path = make_private(here / name)
        folder = Folder(path, _open_lock(path, os.O_CREAT | os.O_EXCL))
        _flock(folder.lock)
    finally:
        os.close(lock_of_all)
    try:
        if beside:
            (path / BESIDE).symlink_to(beside)
    except OSError:
        folder.remove()
        raise
    return folder


def make_private(path: Path) -> Path:
    """Make a folder that only its user can enter, whatever the umask is."""
    path.mkdir(0o700)
    path.chmod(0o700)
    return path


def sweep(*bases: Path) -> None:
    """Remove the folders of this user in `bases` whose owners have ended without removing them."""
    for here in {home(base) for base in bases}:
        with contextlib.suppress(OSError, BridgeError):
            check_private(here)
            for folder in _abandoned(here):
                _remove_with_beside(folder)


def _abandoned(here: Path) -> list[Folder]:
    """Folders that nobody held. We hold them now, so that nobody else removes them."""
    lock_of_all = _open_lock(here, os.O_CREAT)
    try:
        # Held, it means that no folder is made but not locked yet.
        if not _flock(lock_of_all, wait=True):
            return []
        found = [_take(path) for path in here.iterdir() if path.name != _LOCK]
        return [folder for folder in found if folder]
    finally:
        os.close(lock_of_all)


def _take(path: Path) -> Folder | None:
    """Take a folder that nobody holds."""
    try:
        lock = _open_lock(path)
    except FileNotFoundError:
        return Folder(path, -1)
    except OSError:
        return None
    if _flock(lock):
        return Folder(path, lock)
    os.close(lock)
    return None


def _remove_with_beside(folder: Folder) -> None:
    with contextlib.suppress(OSError):
        named = Path(os.readlink(folder.path / BESIDE))
        # Also where its own removal was cut short; and never anything but a folder of this kind.
        for path in (named, named.with_name(f".{named.name}")):
            if path.parent.name == folder.path.parent.name and path.is_dir():
                beside = _take(path)
                if beside:
                    beside.remove()
    folder.remove()


def check_private(here: Path) -> None:
    """See that a folder is this user's, and closed to others.

    Raises
    ------
    BridgeError
        If it belongs to somebody else, or is a symbolic link.
    """
    status = here.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        what = "a symbolic link" if stat.S_ISLNK(status.st_mode) else f"not a folder of user {os.geteuid()}"
        raise BridgeError(
            f"{here} is {what}: others could read or change what is in it. "
            f"Have it removed, or choose another folder than {here.parent}"
        )
    if stat.S_IMODE(status.st_mode) != 0o700:
        here.chmod(0o700)


def _open_lock(folder: Path, flags: int = 0) -> int:
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | flags, 0o600)
    if flags:
        os.fchmod(lock, 0o600)  # whatever the umask is
    return lock


def _flock(lock: int, wait: bool = False) -> bool:
    """Take a lock. On a file system without locks nobody gets one, so nothing is taken for abandoned."""
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
