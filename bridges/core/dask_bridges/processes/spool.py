"""Partitions in files on tmpfs, which a child process reads at memory speed.

The worker's process owns a `Spool`; children read it through a directory
descriptor that they inherit, as ``/proc/self/fd/N/<feed>/<file>``. What does not
fit in memory lies on the local disk, behind symbolic links: readers see one folder.

A spool is a folder in ``<base>/dask-bridges-<uid>/``, and another one in the same
on the local disk once that is needed; they go when their owner crashes, too (`folders`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import shutil
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from dask.utils import format_bytes

from dask_bridges.errors import BridgeError, DataError
from dask_bridges.processes import files, folders
from dask_bridges.processes.files import read_array, read_frame

__all__ = ["MEMORY", "Spool", "Writer", "memory_here", "read_array", "read_frame", "sweep"]

logger = logging.getLogger("dask_bridges.spool")

MEMORY = Path("/dev/shm")
#: Share of a tmpfs that is left to others.
LEFT_FREE = 0.05
#: What the kernel says where nothing more fits.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM}


def sweep(base: str | Path, overflow: str | Path) -> None:
    """Remove this user's spools in either folder whose owners have ended without removing them."""
    folders.sweep(Path(base), Path(overflow))


class Spool:
    """A worker's partitions, in files that its child process reads.

    Parameters
    ----------
    name : str
        What the folder is called, with something random behind it.
    budget : callable
        Without arguments: how many bytes this worker may still put into memory,
        beside the `nbytes` that are there. Asked before each file.
    overflow : Path
        Folder on the local disk for what does not fit.
    base : Path, optional
        Folder in memory; ``/dev/shm`` by default, and `overflow` where that is
        no tmpfs or cannot be written to.
    told : callable, optional
        Called with a sentence when a feed begins to go to disk, once a feed. Logs a warning by default.

    Attributes
    ----------
    path : Path
        The folder that holds the feeds.
    nbytes : int
        Bytes it now holds in memory.

    Raises
    ------
    BridgeError
        If the folder of all spools belongs to somebody else, or is a symbolic link.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from dask_bridges.processes.spool import Spool, read_array
    >>> with Spool("doc", budget=lambda: 2**20, overflow=tempfile.gettempdir()) as spool:
    ...     with spool.writer("train") as writer:
    ...         writer.array("X-0", np.arange(6.0).reshape(3, 2))
    ...     read_array(spool.path / "train" / "X-0", "float64", (3, 2)).sum()
    np.float64(15.0)
    """

    def __init__(
        self,
        name: str,
        *,
        budget: Callable[[], int],
        overflow: str | Path,
        base: str | Path | None = None,
        told: Callable[[str], None] = logger.warning,
    ) -> None:
        _check_name("spool", name)
        self._budget, self._told = budget, told
        self._overflow = Path(overflow).absolute()
        home = Path(base).absolute() if base else MEMORY
        self._no_memory = "" if base or _usable_tmpfs(MEMORY) else f"{MEMORY} is not a tmpfs that can be written to"
        sweep(home, self._overflow)
        name = f"{name}-{secrets.token_hex(6)}"
        self._disk = folders.home(self._overflow) / f"{name}.disk"
        self._folders = [self._make(home, name)]
        self.path = self._folders[0].path
        self.nbytes = 0
        self._pending = 0  # bytes promised to files that are being written
        self._feeds: dict[str, Writer] = {}
        self._lock = threading.RLock()
        self._closed = False
        # Also when the process ends, or nobody holds the spool any more.
        self._finalizer = weakref.finalize(self, _dismantle, self._folders, os.getpid())

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextlib.contextmanager
    def writer(self, feed: str) -> Iterator[Writer]:
        """Write a feed: it is there, whole, when the block is left, and nothing of it after an exception.

        Raises
        ------
        DataError
            If there is a feed of this name, or its files fit neither in memory nor on disk.
        """
        _check_name("feed", feed)
        with self._lock:
            self._check_new(feed)
            writer = Writer(self, feed)
        try:
            yield writer
            with self._lock:
                self._check_new(feed)
                writer._publish()
                self._feeds[feed] = writer
        except BaseException:
            writer._remove()
            raise

    def drop(self, feed: str) -> None:
        """Remove a feed, if it is there; what a child has mapped of it stays readable there."""
        with self._lock:
            writer = self._feeds.pop(feed, None)
            if writer:
                writer._hide()
        if writer:
            writer._remove()

    def close(self) -> None:
        """Remove everything, on disk too."""
        with self._lock:
            self._closed = True
            self.nbytes = 0
        self._finalizer()

    def _make(self, home: Path, name: str) -> folders.Folder:
        if not self._no_memory:
            try:
                return folders.make(home, name, self._disk)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                self._no_memory = f"{home} is full"
        self._overflow.mkdir(parents=True, exist_ok=True)
        return folders.make(self._overflow, name, self._disk)

    def _check_new(self, feed: str) -> None:
        self._check_open()
        if feed in self._feeds:
            raise DataError(f"there is a feed {feed!r} already: choose another name, or drop that one first")

    def _check_open(self) -> None:
        if self._closed:
            raise BridgeError(f"the spool {self.path} is closed: nothing can be written to it any more")

    def _claim(self, size: int) -> str:
        """Promise memory to a file of `size` bytes; where there is not enough, why."""
        with self._lock:
            self._check_open()
            if self._no_memory:
                return self._no_memory
            free = _free(self.path) - self._pending
            if size > free:
                return f"{self.path.parent.parent} has {format_bytes(max(free, 0))} to spare"
            left = self._budget() - self._pending
            if size > left:
                return f"the worker's memory limit leaves {format_bytes(max(left, 0))}"
            self._pending += size
            return ""

    def _settle(self, size: int, written: bool) -> None:
        """End a promise, kept or not."""
        with self._lock:
            self._pending -= size
            self.nbytes += size if written else 0

    def _folder_on_disk(self) -> Path:
        with self._lock:
            self._check_open()
            if len(self._folders) == 1:
                self._overflow.mkdir(parents=True, exist_ok=True)
                self._folders.append(folders.make(self._overflow, self._disk.name))
            return self._disk


class Writer:
    """Writes the files of one feed, from any thread. Made by `Spool.writer`.

    Attributes
    ----------
    nbytes : int
        Bytes written.
    overflowed : int
        Those of them that went to disk.
    """

    def __init__(self, spool: Spool, feed: str) -> None:
        self.nbytes = self.overflowed = 0
        self._spool, self._feed = spool, feed
        self._name = f"{feed}-{secrets.token_hex(6)}"
        self._hidden = self._folder = spool.path / f".{self._name}"
        self._disk: Path | None = None
        folders.make_private(self._folder)

    def array(self, file: str, array: np.ndarray) -> None:
        """Write an array's values: raw, row by row (C order), little-endian.

        Raises
        ------
        DataError
            If the values are Python objects or masked, or fit nowhere.
        """
        if array.dtype.hasobject or isinstance(array, np.ma.MaskedArray):
            what = "masked" if isinstance(array, np.ma.MaskedArray) else f"of dtype {array.dtype}"
            raise DataError(
                f"feed {self._feed!r}, file {file!r}: an array {what} has no plain bytes; "
                "fill or convert it, or write it as a dataframe"
            )
        self._put(file, array.nbytes, partial(files.write_array, array=array))

    def frame(self, file: str, frame: Any) -> None:
        """Write a pandas DataFrame, Series or Index as an Arrow file.

        Raises
        ------
        DataError
            If a column has values that Arrow does not know, or the file fits nowhere.
        """
        import pyarrow

        try:
            table = files.arrow_table(frame)
        except (pyarrow.ArrowException, ValueError, TypeError) as error:
            raise DataError(
                f"feed {self._feed!r}, file {file!r}: this dataframe cannot be written as Arrow: "
                f"{'; '.join(map(str, error.args))}. Convert or leave out that column."
            ) from error
        self._put(file, files.arrow_size(table), partial(files.write_arrow, table=table))

    def _put(self, file: str, size: int, fill: Callable[[Path], None]) -> None:
        _check_name("file", file)
        path = self._folder / file
        if os.path.lexists(path):
            raise DataError(f"feed {self._feed!r} has a file {file!r} already")
        why = self._spool._claim(size)
        if not why:
            written = False
            try:
                files.write_whole(path, fill)
                written = True
            except OSError as error:
                if error.errno not in _FULL:
                    self._spool._check_open()
                    raise
                why = f"{self._spool.path.parent.parent} is full"
            finally:
                self._spool._settle(size, written)
        if why:
            self._put_on_disk(path, size, fill, why)
        self._count(size, on_disk=bool(why))

    def _count(self, size: int, on_disk: bool) -> None:
        with self._spool._lock:
            self.nbytes += size
            self.overflowed += size if on_disk else 0

    def _put_on_disk(self, path: Path, size: int, fill: Callable[[Path], None], why: str) -> None:
        spool = self._spool
        try:
            folder = self._folder_on_disk(size, why)
            files.write_whole(folder / path.name, fill)
            # Relative and short: a long target takes a page of a tmpfs that may be full.
            path.symlink_to(Path("..", folders.BESIDE, self._name, path.name))
        except OSError as error:
            spool._check_open()
            raise DataError(
                f"feed {self._feed!r}, file {path.name!r} of {format_bytes(size)}: it fits neither in memory, at "
                f"{spool.path} ({why}), nor on disk, at {spool._disk} ({error.strerror}). Make room there, give "
                "the workers more memory, or spread the data over more of them."
            ) from error

    def _folder_on_disk(self, size: int, why: str) -> Path:
        with self._spool._lock:
            if self._disk is None:
                self._disk = folders.make_private(self._spool._folder_on_disk() / self._name)
                self._spool._told(
                    f"feed {self._feed!r} goes on on disk, which is slower to read: {format_bytes(self.nbytes)} are "
                    f"in memory, at {self._spool.path}; the next {format_bytes(size)} do not fit, since {why}, and "
                    f"go to {self._disk}"
                )
            return self._disk

    def _publish(self) -> None:
        self._folder = self._hidden.with_name(self._feed)
        self._hidden.rename(self._folder)

    def _hide(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # the spool was closed
            self._folder.rename(self._hidden)

    def _remove(self) -> None:
        for folder in (self._hidden, self._disk):
            if folder:
                shutil.rmtree(folder, ignore_errors=True)
        with self._spool._lock:
            if not self._spool._closed:
                self._spool.nbytes -= self.nbytes - self.overflowed


def _check_name(what: str, name: str) -> None:
    if not name or name.startswith(".") or "/" in name or "\0" in name or len(os.fsencode(name)) > 200:
        raise DataError(
            f"{name!r} cannot be the name of a {what}: without a dot in front, '/' and NUL, up to 200 bytes"
        )


def _dismantle(held: list[folders.Folder], owner: int) -> None:
    if os.getpid() == owner:  # a forked copy owns nothing
        for folder in reversed(held):
            folder.remove()


def _usable_tmpfs(path: Path) -> bool:
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK) and _filesystem(path) == "tmpfs"


def memory_here() -> tuple[int, int]:
    """Bytes that spools may take in memory on this machine now, and its size; (0, 0) where they go to disk."""
    if not _usable_tmpfs(MEMORY):
        return 0, 0
    state = os.statvfs(MEMORY)
    return min(max(_free(MEMORY), 0), sys.maxsize), state.f_frsize * state.f_blocks


def _filesystem(path: Path) -> str:
    """The type of the file system a path is on, as Linux names it; empty where it does not say."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if line.split()[2] == number:
                return line.partition(" - ")[2].split()[0]
    return ""


def _free(path: Path) -> int:
    """Bytes a file system has for us; one without a limit says that it has no blocks at all."""
    state = os.statvfs(path)
    if not state.f_blocks:
        return sys.maxsize
    return int(state.f_frsize * (state.f_bavail - LEFT_FREE * state.f_blocks))
