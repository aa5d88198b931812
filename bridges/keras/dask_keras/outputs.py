"""Where the files of callbacks are: they run on the worker of rank 0, not where they were made."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from dask_bridges.processes import ChildMember

__all__ = ["directory", "tell_where"]

#: Attributes that hold a path: `filepath`, `filename`, `log_dir`, `backup_dir` and the like.
_PATH = re.compile(r"(?!_)\w*(path|file|filename|dir|directory|folder)")


def directory() -> str:
    """The working directory of this process, and its host."""
    return f"{os.getcwd()} on {socket.gethostname()}"


def tell_where(member: ChildMember, callbacks: Sequence[Any], home: str) -> None:
    """Say where callbacks with relative paths write.

    Parameters
    ----------
    member : ChildMember
        That runs them.
    callbacks : sequence of keras.callbacks.Callback
    home : str
        The client's `directory`, where they are looked for.
    """
    here = directory()
    if here != home and (named := list(_relative(callbacks))):
        text = f"{', '.join(named)}: relative paths are in {here}, the directory of {member.spec.workers[member.rank]}"
        member.log(text, logging.WARNING)


def _relative(callbacks: Sequence[Any]) -> Iterator[str]:
    for callback in callbacks:
        for name, value in vars(callback).items():
            if _PATH.fullmatch(name) and _is_relative(value):
                yield f"{type(callback).__name__}({name}={os.fspath(value)!r})"


def _is_relative(value: Any) -> bool:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        return False
    path = os.fspath(value)
    return isinstance(path, str) and "://" not in path and not os.path.isabs(path)
