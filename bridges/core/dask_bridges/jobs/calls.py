"""A job's call on its way: packed by the client, opened in the job's process, with its inputs in between.

The worker that hosts the job opens neither the call nor what is in it: a model among
the arguments is built on the job's device and nowhere else.
"""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
from distributed import Future
from distributed.protocol.pickle import dumps

__all__ = ["Inputs", "pack", "unpack"]

#: Bytes from which a part of the inputs goes to the spool, and not through the pipe.
LARGE = 64 * 1024


def pack(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[bytes, list[Future]]:
    """A call as bytes, and the futures among its arguments, also in lists, tuples, sets and dicts.

    Raises
    ------
    TypeError
        If something in it cannot be pickled.
    """
    futures: list[Future] = []
    call = (function, _placed(tuple(args), futures), _placed(dict(kwargs), futures))
    try:
        if cloudpickle.list_registry_pickle_by_value():
            return bytes(cloudpickle.dumps(call)), futures
        return bytes(dumps(call)), futures
    except Exception as error:
        name = getattr(function, "__qualname__", repr(function))
        raise TypeError(
            f"the job {name} cannot be sent to a worker, since it or one of its arguments cannot be pickled: {error}. "
            "Open files, connections and locks inside the function."
        ) from error


class _Input:
    """Stands for a future: unpickles as its value."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _value, (self.number,)


_values: Sequence[Any] = ()


def _value(number: int) -> Any:
    return _values[number]


def _placed(what: Any, futures: list[Future]) -> Any:
    kind = type(what)
    if isinstance(what, Future):
        futures.append(what)
        return _Input(len(futures) - 1)
    if kind in (list, tuple, set, frozenset):
        return kind(_placed(item, futures) for item in what)
    if kind is dict:
        return {key: _placed(value, futures) for key, value in what.items()}
    return what


@dataclass(frozen=True)
class Inputs:
    """Values of futures on their way into a job's process.

    Attributes
    ----------
    pickled : bytes
    parts : tuple
        Their buffers in order: bytes, or None for those in the spool.
    feed : str
        Where these are, as ``<number of the buffer>``.
    """

    pickled: bytes = b""
    parts: tuple[bytes | None, ...] = ()
    feed: str = ""

    @classmethod
    def of(cls, values: Sequence[Any]) -> tuple[Inputs, dict[str, np.ndarray[Any, Any]]]:
        """Inputs, and what is to be written to the spool for them, by file."""
        buffers: list[pickle.PickleBuffer] = []
        pickled = bytes(dumps(tuple(values), buffer_callback=buffers.append))
        parts: list[bytes | None] = []
        large: dict[str, np.ndarray[Any, Any]] = {}
        for number, buffer in enumerate(buffers):
            raw = buffer.raw()
            if raw.nbytes < LARGE:
                parts.append(bytes(raw))
            else:
                parts.append(None)
                large[str(number)] = np.frombuffer(raw, np.uint8)
        return cls(pickled, tuple(parts)), large

    def open(self, spool: str) -> tuple[Any, ...]:
        """The values; large arrays are mapped, and can be written to without anybody seeing it."""
        if not self.pickled:
            return ()
        folder = Path(spool, self.feed)
        buffers = [_mapped(folder / str(n)) if part is None else part for n, part in enumerate(self.parts)]
        return tuple(pickle.loads(self.pickled, buffers=buffers))


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size, access=mmap.ACCESS_COPY)


def unpack(call: bytes, values: Sequence[Any]) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Function, arguments and keyword arguments of a packed call; once a process."""
    global _values
    _values = values
    function, args, kwargs = pickle.loads(call)
    return function, args, kwargs
