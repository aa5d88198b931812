"""Tasks that pass through the scheduler unopened.

Dask's scheduler unpickles the graphs it is given. Tasks made here consist of
standard library functions and bytes, so that neither this package nor a
framework has to be installed where the scheduler runs.
"""

from __future__ import annotations

import functools
import operator
import pickle
import types
from collections.abc import Callable
from typing import Any

import cloudpickle
from dask._task_spec import Task
from distributed.protocol.pickle import dumps

__all__ = ["sealed", "sealed_task"]


def sealed_task(key: Any, function: Callable[..., Any], *fixed: Any, inputs: tuple[Any, ...] = ()) -> Task:
    """The task ``function(*fixed, *inputs)``.

    Parameters
    ----------
    key : str or tuple
        Of the task.
    function : callable
    fixed : objects
        Leading arguments; travel with the function, opened on the worker only.
    inputs : tuple of TaskRef
        What the task depends on.
    """
    call = Task(None, pickle.loads, _pickled(functools.partial(function, *fixed)))
    return Task(key, operator.call, call, *inputs)


def _pickled(call: functools.partial[Any]) -> bytes:
    """As Dask pickles; modules that the user registered by value are found however deep in the arguments."""
    by_value = [name for name in cloudpickle.list_registry_pickle_by_value() if not name.startswith("dask_bridges.")]
    return bytes(cloudpickle.dumps(call) if by_value else dumps(call))


def _open_and_call(sealed_function: bytes, *args: Any, **kwargs: Any) -> Any:
    import pickle

    return pickle.loads(sealed_function)(*args, **kwargs)


class _ByValue:
    """Unpickles as the function `_open_and_call`, where its module is not installed too."""

    def __reduce__(self) -> tuple[Any, ...]:
        return cloudpickle.loads, (_opener(),)


@functools.cache
def _opener() -> bytes:
    """`_open_and_call` by value: as a function of ``__main__`` it is pickled whole."""
    function = types.FunctionType(_open_and_call.__code__, {"__builtins__": __builtins__}, "_open_and_call")
    function.__module__ = "__main__"
    return bytes(cloudpickle.dumps(function))


class sealed:  # noqa: N801 - used like a function
    """`function` as a callable that any process can unpickle, and only a worker opens.

    For collections' own graphs (``map_partitions``, ``blockwise``), where tasks
    cannot be made by hand.

    Parameters
    ----------
    function : callable
    fixed, keywords
        Arguments that travel with it.

    Examples
    --------
    >>> import pickle
    >>> pickle.loads(pickle.dumps(sealed(max, 3)))(2, 5)
    5
    """

    def __init__(self, function: Callable[..., Any], *fixed: Any, **keywords: Any) -> None:
        self.call = functools.partial(function, *fixed, **keywords)
        functools.update_wrapper(self, function, assigned=("__name__", "__doc__"), updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.call(*args, **kwargs)

    def __dask_tokenize__(self) -> Any:
        return "sealed", self.call.func, self.call.args, self.call.keywords

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (_ByValue(), _pickled(self.call))
