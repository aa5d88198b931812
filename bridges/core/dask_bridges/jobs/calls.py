"""A job's call on its way: packed by the client, opened in the job's process, together with its inputs.

The worker that hosts the job opens neither the call nor what is in it: a model among
the arguments is built on the job's device and nowhere else.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cloudpickle
from distributed import Future
from distributed.protocol.pickle import dumps

__all__ = ["pack", "unpack"]


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


def unpack(call: bytes, values: Sequence[Any]) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Function, arguments and keyword arguments of a packed call; once a process."""
    global _values
    _values = values
    function, args, kwargs = pickle.loads(call)
    return function, args, kwargs
