"""Matrices that are larger than memory: their bins are on the worker's disk, in a folder that goes with the matrix."""

from __future__ import annotations

import os
import uuid
import weakref
from pathlib import Path
from typing import Any

import xgboost as xgb

from dask_bridges.errors import BridgeError, DataError
from dask_bridges.member import Member
from dask_bridges.processes import folders
from dask_bridges.task import worker_of

__all__ = ["ExternalMatrix", "cache_folder", "checked"]


def checked(external_memory: bool | str | os.PathLike[str]) -> bool | str:
    """What was given for `external_memory`, with a folder as an absolute path.

    Raises
    ------
    DataError
        If it is neither True or False nor the path of a folder.
    """
    if isinstance(external_memory, bool):
        return external_memory
    path = os.fspath(external_memory) if isinstance(external_memory, (str, os.PathLike)) else ""
    if not isinstance(path, str) or not os.path.isabs(path):
        raise DataError(
            f"external_memory={external_memory!r}: give True, for the local directory of each worker, or the absolute "
            "path of a folder on the workers' own disks"
        )
    return path


def cache_folder(member: Member, where: bool | str) -> folders.Folder:
    """A new folder for one matrix, private to the user; those whose worker has died are removed first.

    Raises
    ------
    DataError
        If there can be none.
    """
    worker = worker_of(member)
    local = Path(worker.local_directory)
    base = local if where is True else Path(str(where))
    # Dask removes the local directory of a worker that is gone, but only once another starts.
    folders.sweep(base, *(local.parent.glob("worker-*") if where is True else ()))
    try:
        return folders.make(base, f"xgboost-{uuid.uuid4().hex}")
    except (OSError, BridgeError) as error:
        raise DataError(
            f"external_memory={where!r}: {member.name} on worker {worker.address} can make no folder in {base}: "
            f"{error}. Give a folder that is there on all workers and can be written to"
        ) from error


class ExternalMatrix(xgb.ExtMemQuantileDMatrix):  # type: ignore[misc]
    """A matrix whose folder is removed when nobody holds it any more, when it cannot be built, and at exit."""

    def __init__(self, folder: folders.Folder, blocks: xgb.DataIter, **options: Any) -> None:
        removed = weakref.finalize(self, _remove, folder, os.getpid())
        try:
            super().__init__(blocks, **options)
        except BaseException:
            removed()
            raise


def _remove(folder: folders.Folder, owner: int) -> None:
    if os.getpid() == owner:  # and not in a process that was forked from it
        folder.remove()
