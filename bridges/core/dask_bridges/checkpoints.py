"""What attempts resume from: checkpoints on any file system or object store that fsspec reaches, whole or absent.

The files of a checkpoint go to a folder of a name that was never used before; the
manifest, one JSON object, is written last, in one step, and makes it exist. It
holds sizes and checksums, so that what was damaged later is not taken for whole.

    checkpoint-000000000120.json
    data-000000000120-5f0c9be2a1d4/0, 1, …
"""

from __future__ import annotations

import contextlib
import logging
import operator
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from dask_bridges.errors import BridgeError, DataError, PlacementError
from dask_bridges.manifests import Broken, File, Gone, Manifest, digest, name_of, steps_in

__all__ = ["Checkpoint", "Checkpoints"]

logger = logging.getLogger("dask_bridges.checkpoints")

#: Files without a manifest are what a crashed save left, or what a writer elsewhere is saving now. They are taken
#: for the former when the store wrote them this long before the newest manifest, by its own clock.
LEFT_ALONE = timedelta(hours=1)

T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read.

    Attributes
    ----------
    step : int
    files : dict of str to bytes
    meta : dict of str to object
        As JSON keeps it: tuples have become lists.
    """

    step: int
    files: dict[str, bytes]
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one training, at one place.

    Several processes may save and read at the same time; it can be pickled.

    Parameters
    ----------
    url : str
        A folder: a path (which all workers must share), or a URL that fsspec knows,
        such as ``s3://bucket/run-1``. Folders and files are private to the user
        where the file system is local.
    keep : int
        How many of the newest stay. The one that was saved last stays, too.
    storage_options : mapping, optional
        For fsspec: credentials and the like.

    Raises
    ------
    PlacementError
        If the URL's protocol is not known, or its package is not installed.

    Examples
    --------
    >>> from dask_bridges.checkpoints import Checkpoints
    >>> checkpoints = Checkpoints("memory://doc/run-1")
    >>> checkpoints.save(10, {"weights": b"..."}, {"loss": 0.5})
    >>> checkpoints.save(20, {"weights": b"..!"}, {"loss": 0.25})
    >>> checkpoints.latest()
    20
    >>> checkpoints.load().meta
    {'loss': 0.25}
    """

    def __init__(self, url: str | Path, *, keep: int = 2, storage_options: Mapping[str, Any] | None = None) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint has to stay")
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        self.url = re.sub(r"//[^/@]*@", "//", str(url))  # it is told in messages: without a password
        self.keep = keep
        try:
            self._fs, self._root = url_to_fs(str(url), **(storage_options or {}))
        except (ValueError, ImportError) as error:
            raise PlacementError(
                f"checkpoints at {self.url}: {error}. Give a path, or a URL whose protocol fsspec knows, "
                "with its package installed on the client and on all workers"
            ) from error
        self._local = isinstance(self._fs, LocalFileSystem)

    def __repr__(self) -> str:
        return f"Checkpoints({self.url!r}, keep={self.keep})"

    def check(self) -> None:
        """See, before anything is trained, whether this process can write there.

        Raises
        ------
        PlacementError
            If it cannot.
        """
        probe = self._path(f".probe-{secrets.token_hex(6)}")
        try:
            self._make_folder(self._root)
            self._put(probe, b"dask-bridges")
            if self._fs.cat_file(probe) != b"dask-bridges":
                raise OSError("what was written is not what is read")
            self._fs.rm_file(probe)
        except Exception as error:  # stores raise what they like
            raise PlacementError(
                f"checkpoints cannot be written to {self.url} from {socket.gethostname()}: {_text(error)}. "
                "Choose a folder or bucket that all workers can write to, or give storage_options"
            ) from error

    # Saving

    def save(self, step: int, files: Mapping[str, Any], meta: Mapping[str, Any] | None = None) -> None:
        """Save a checkpoint; one of the same step is replaced.

        Parameters
        ----------
        step : int
            From 0.
        files : mapping of str to bytes-like
        meta : mapping of str to object, optional
            Anything that JSON can hold.

        Raises
        ------
        DataError
            If a file has no bytes, or `meta` cannot be JSON.
        BridgeError
            If it could not be written; what was there before is there still.
        """
        step = operator.index(step)
        if step < 0:
            raise DataError(f"checkpoint {step}: steps are counted from 0")
        views = {name: _view(name, content) for name, content in files.items()}
        folder = f"data-{step:012d}-{secrets.token_hex(6)}"
        described = {name: File(str(i), len(view), digest(view)) for i, (name, view) in enumerate(views.items())}
        manifest = Manifest(step, folder, described, dict(meta or {}))
        text = manifest.dump()
        try:
            self._put_files(folder, {described[name].file: view for name, view in views.items()})
            replaced = self._folder_of(step)
            self._put(self._path(name_of(step)), text)
        except Exception as error:
            raise BridgeError(f"checkpoint {step} could not be saved to {self.url}: {_text(error)}") from error
        try:
            self._remove(replaced)
            self._remove_old(step)
            self._remove_leftovers(step)
        except Exception as error:  # the checkpoint is there: no reason to end a training
            logger.warning("old checkpoints at %s could not be removed: %s", self.url, _text(error))

    def _put_files(self, folder: str, files: Mapping[str, memoryview]) -> None:
        try:
            for path in (self._root, self._path(folder)):
                self._make_folder(path)
            if self._local:
                for file, view in files.items():
                    self._put(self._path(folder, file), view)
                _sync_folder(self._root)
            elif files:
                self._fs.pipe({self._path(folder, file): bytes(view) for file, view in files.items()})
        except BaseException:
            # Not after a manifest that failed: it may have arrived.
            with contextlib.suppress(Exception):
                self._remove(folder)
            raise

    def _remove_old(self, saved: int) -> None:
        kept = {*self.steps()[-self.keep :], saved}
        for step in self._published():
            if step not in kept and step < max(kept):
                folder = self._folder_of(step)
                self._remove_file(name_of(step))
                self._remove(folder)

    def _remove_leftovers(self, saved: int) -> None:
        # Before the manifests are read: one that is published meanwhile has its files in use.
        found = [name for name in self._names() if name.startswith(("data-", "."))]
        in_use = {self._folder_of(step) for step in self._published()}
        newest = self._written(self._path(name_of(saved)))
        for name in found:
            written = None if name in in_use else self._last_written(name)
            if written and newest and newest - written > LEFT_ALONE:
                self._remove(name)

    def _last_written(self, name: str) -> datetime | None:
        """When a file was written, or the last one of a folder; None where one is gone, or nobody knows."""
        try:
            paths = self._fs.ls(self._path(name), detail=False) or [self._path(name)]
        except FileNotFoundError:
            return None
        times = [self._written(path) for path in paths]
        known = [time for time in times if time]
        return max(known) if len(known) == len(times) else None

    def _written(self, path: str) -> datetime | None:
        try:
            time: datetime = self._fs.modified(path)
        except (FileNotFoundError, NotImplementedError):
            return None
        return time

    # Reading

    def steps(self) -> list[int]:
        """The steps of which all files are there, in their sizes; ascending."""
        return sorted(step for step in self._published() if self._is_complete(step))

    def latest(self) -> int | None:
        """The newest step that is whole, by its checksums; None without one.

        Those that are not are skipped, with a warning in the log.
        """

        def verified(manifest: Manifest) -> int:
            for _ in self._contents(manifest):
                pass
            return manifest.step

        return self._newest(verified)

    def load(self, step: int | None = None) -> Checkpoint:
        """Read a checkpoint: the newest that is whole, or that of a step.

        Raises
        ------
        BridgeError
            If there is none, or that of `step` is not whole.
        """

        def read(manifest: Manifest) -> Checkpoint:
            return Checkpoint(manifest.step, dict(self._contents(manifest)), manifest.meta)

        if step is not None:
            try:
                return self._current(operator.index(step), read)
            except Broken as broken:
                raise BridgeError(
                    f"checkpoint {step} at {self.url} cannot be loaded: {broken}. There are {self.steps()}: load one "
                    "of them, or without a step the newest that is whole; saving this step again replaces it"
                ) from None
        checkpoint = self._newest(read)
        if checkpoint is None:
            raise BridgeError(f"there is no checkpoint at {self.url} that is whole: begin without one")
        return checkpoint

    def _newest(self, use: Callable[[Manifest], T]) -> T | None:
        found: list[int] | None = None
        while found != (found := self._published()):  # others may have saved, and removed, meanwhile
            for step in reversed(found):
                try:
                    return self._current(step, use)
                except Gone:
                    continue
                except Broken as broken:
                    logger.warning("checkpoint %d at %s is skipped: %s", step, self.url, broken)
        return None

    def _current(self, step: int, use: Callable[[Manifest], T]) -> T:
        """Use a manifest; once more where it was replaced, and its files removed, meanwhile."""
        manifest = self._manifest(step)
        while True:
            try:
                return use(manifest)
            except Broken:
                if manifest == (manifest := self._manifest(step)):
                    raise

    def _contents(self, manifest: Manifest) -> Iterator[tuple[str, bytes]]:
        for name, file in manifest.files.items():
            path = f"{manifest.folder}/{file.file}"
            try:
                content = self._fs.cat_file(self._path(path))
            except FileNotFoundError:
                raise Broken(f"file {name!r} ({path}) is missing") from None
            if len(content) != file.size:
                raise Broken(f"file {name!r} ({path}) has {len(content)} bytes, of {file.size} that were written")
            if digest(content) != file.digest:
                raise Broken(f"file {name!r} ({path}) is not what was written: its checksum differs")
            yield name, content

    def _is_complete(self, step: int) -> bool:
        def complete(manifest: Manifest) -> bool:
            if not manifest.files:
                return True
            try:
                listed = self._fs.ls(self._path(manifest.folder), detail=True)
            except FileNotFoundError:
                raise Broken("its folder is missing") from None
            sizes = {_base(entry["name"]): entry["size"] for entry in listed}
            if any(sizes.get(file.file) != file.size for file in manifest.files.values()):
                raise Broken("a file is missing or has another size")
            return True

        try:
            return self._current(step, complete)
        except Broken:
            return False

    def _manifest(self, step: int) -> Manifest:
        name = name_of(step)
        try:
            return Manifest.parse(self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            raise Gone(f"it is not there, no {name}") from None

    def _folder_of(self, step: int) -> str:
        try:
            return self._manifest(step).folder
        except Broken:
            return ""

    def _published(self) -> list[int]:
        """The steps that have a manifest, ascending."""
        return steps_in(self._names())

    # The store

    def _names(self) -> list[str]:
        self._fs.invalidate_cache(self._root)
        try:
            return [_base(path) for path in self._fs.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []

    def _path(self, *names: str) -> str:
        return "/".join((self._root.rstrip("/"), *names))

    def _make_folder(self, path: str) -> None:
        if not self._local:
            self._fs.makedirs(path, exist_ok=True)
        elif not os.path.isdir(path):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).mkdir(0o700, exist_ok=True)

    def _put(self, path: str, content: bytes | memoryview) -> None:
        """Write a file in one step."""
        if self._local:
            _put_durably(Path(path), content)
        else:
            self._fs.pipe_file(path, bytes(content))  # of an object store: there when it is whole

    def _remove_file(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def _remove(self, name: str) -> None:
        """Remove a file or a folder, if it is there; others may be at it, too."""
        if name and self._local and os.path.isdir(self._path(name)):
            shutil.rmtree(self._path(name), ignore_errors=True)
        elif name:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(self._path(name), recursive=True)


def _view(name: Any, content: Any) -> memoryview:
    if not isinstance(name, str):
        raise DataError(f"file {name!r} of a checkpoint: its name is not a string")
    try:
        view = memoryview(content)
        return view.cast("B") if view.nbytes else memoryview(b"")
    except TypeError as error:
        raise DataError(
            f"file {name!r} of a checkpoint has to be bytes, or contiguous memory of numbers: {error}"
        ) from None


def _base(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _put_durably(path: Path, content: bytes | memoryview) -> None:
    """Write a file, private to the user, that is there whole or not at all even after a loss of power."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with open(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(path: str | Path) -> None:
    with contextlib.suppress(OSError):  # not every system can
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
