"""A job's result as its worker keeps it: opened, unless that takes a module that the worker has not imported.

A framework imported into a worker's process may take a device for itself, for as long
as the worker lives. Such a result stays closed there; a client, another worker and
another job get the object itself.
"""

from __future__ import annotations

import io
import pickle
import sys
from typing import Any

import wrapt
from dask.sizeof import sizeof

__all__ = ["Unopened", "opened"]


#: Who asks for the type of whatever Dask holds; that is not a use.
_NO_USE = {"abc", "cloudpickle", "dask", "distributed", "functools", "inspect", "logging", "zict"}


class _ElsewhereError(Exception):
    """A module is needed that is not imported here."""


class _Here(pickle.Unpickler):
    """Opens what needs no further module."""

    def find_class(self, module: str, name: str) -> Any:
        package = module.partition(".")[0]
        # The serializers import the framework whose model it is.
        if package not in sys.modules or package == "dask_serializers":
            raise _ElsewhereError(module)
        return super().find_class(module, name)


def opened(result: bytes) -> Any:
    """The result, or an `Unopened` one."""
    try:
        return _Here(io.BytesIO(result)).load()
    except _ElsewhereError:
        return Unopened(result)


class Unopened(wrapt.LazyObjectProxy[Any]):
    """A result that is opened by its first use in this process, and by its arrival in another one.

    Parameters
    ----------
    result : bytes
        The pickled object.
    """

    def __init__(self, result: bytes) -> None:
        super().__init__(lambda: pickle.loads(result))
        self._self_result = result

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        return Unopened if caller in _NO_USE else self.__wrapped__.__class__

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return pickle.loads, (self._self_result,)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


@sizeof.register(Unopened)  # type: ignore[untyped-decorator]
def _sizeof(result: Unopened) -> int:
    return len(result._self_result)
