"""Objects that Keras cannot find again by name: which they are, and how they travel."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from importlib import import_module
from typing import Any

import cloudpickle
import numpy as np

from dask_serializers.keras import upstream
from dask_serializers.standin import CannotMove

__all__ = ["Describer", "load", "restored"]

KEY = "dask_serializers"  # no Keras package is named so
ARRAY, TUPLE, ITEMS = "__array__", "__tuple__", "__items__"


class Describer:
    """Describes objects as ``keras.saving.serialize_keras_object`` does, and keeps what a description cannot hold."""

    def __init__(self) -> None:
        #: key in the description -> class, function or object that is not Keras's and not registered.
        self.custom: dict[str, Any] = {}
        #: Modules that register classes and functions of the description with Keras.
        self.modules: set[str] = set()
        #: Constants inside the description.
        self.arrays: list[np.ndarray[Any, Any]] = []
        self._keys: dict[int, str] = {}

    def describe(self, obj: Any) -> Any:
        """Return the description of `obj`, for :func:`restored`; anything JSON can hold."""
        with upstream.describing(self._describe), upstream.sharing():
            description = upstream.serialize(obj)
        return self._encoded(description)

    def _describe(self, obj: Any, plain: Callable[[Any], Any]) -> Any:
        if isinstance(obj, np.ndarray) and obj.ndim > 0 and not obj.dtype.hasobject:
            self.arrays.append(obj)
            return {
                "class_name": "__numpy__",
                "config": {"value": {ARRAY: len(self.arrays) - 1}, "dtype": str(obj.dtype)},
            }
        if isinstance(obj, types.FunctionType):
            return plain(obj) if self._found_by_name(obj) else self._by_key(obj)
        if _opaque(obj):
            return self._by_key(obj)
        described = plain(obj)
        if isinstance(described, dict) and "registered_name" in described and hasattr(obj, "get_config"):
            cls = type(obj)
            if not self._found_by_name(cls):
                described["registered_name"] = self._key(cls)
            if isinstance(described["config"], dict):
                described["config"] |= upstream.missing_from_config(obj, described["config"])
        return described

    def _found_by_name(self, symbol: Any) -> bool:
        """Whether Keras at the receiver finds this class or function, given what we import there."""
        if upstream.public_name(symbol) is not None or symbol.__module__.partition(".")[0] == "keras":
            return True
        if not upstream.registered(symbol) or symbol.__module__ == "__main__":
            return False
        if getattr(sys.modules.get(symbol.__module__), symbol.__name__, None) is not symbol:
            return False
        self.modules.add(symbol.__module__)
        return True

    def _by_key(self, obj: Any) -> dict[str, Any]:
        key = self._key(obj)
        return {"module": KEY, "class_name": "function", "config": key, "registered_name": key}

    def _key(self, obj: Any) -> str:
        key = self._keys.get(id(obj))
        if key is None:
            key = f"{KEY}:{getattr(obj, '__name__', type(obj).__name__)}:{len(self.custom)}"
            self._keys[id(obj)] = key
            self.custom[key] = obj
        return key

    def _encoded(self, node: Any) -> Any:
        """Keep what JSON loses: tuples, and keys that are no text.

        And put our key back where Keras's wrappers (``activations.serialize``) have put a function's bare name.
        """
        if isinstance(node, dict):
            if node.get("class_name") == "function" and node.get("registered_name") in self.custom:
                node = {**node, "config": node["registered_name"]}
            if all(isinstance(key, str) for key in node):
                return {key: self._encoded(value) for key, value in node.items()}
            return {ITEMS: [[self._encoded(key), self._encoded(value)] for key, value in node.items()]}
        if isinstance(node, tuple):
            return {TUPLE: [self._encoded(value) for value in node]}
        return [self._encoded(value) for value in node] if isinstance(node, list) else node

    def pickled(self) -> bytes:
        """The custom objects, by cloudpickle; :class:`CannotMove` names the one that cannot be."""
        if not self.custom:
            return b""
        try:
            return bytes(cloudpickle.dumps(self.custom))
        except Exception:
            for key, obj in self.custom.items():
                _pickled_alone(key, obj)
            raise


def _pickled_alone(key: str, obj: Any) -> None:
    try:
        cloudpickle.dumps(obj)
    except Exception as error:
        name = key.split(":")[1]
        where = getattr(obj, "__code__", None)
        place = f" ({where.co_filename}, line {where.co_firstlineno})" if where else ""
        raise CannotMove(
            f"{name}{place} cannot be pickled, and is not registered with Keras. Keep what it uses out of its closure "
            "(open it inside the function), or make it a class registered with keras.saving.register_keras_serializable"
        ) from error


def _opaque(obj: Any) -> bool:
    """Whether Keras has no description of `obj` at all: a partial, a bound method, a class, any other object."""
    if isinstance(obj, (type, types.MethodType)):
        return upstream.public_name(obj) is None and not isinstance(obj, np.generic)
    return callable(obj) and not hasattr(obj, "get_config") and type(obj).__module__.partition(".")[0] != "keras"


def restored(node: Any, arrays: list[np.ndarray[Any, Any]]) -> Any:
    """The description as Keras made it, from :meth:`Describer.describe` and its constants."""
    if isinstance(node, list):
        return [restored(value, arrays) for value in node]
    if not isinstance(node, dict):
        return node
    if ARRAY in node:
        return arrays[node[ARRAY]]
    if TUPLE in node:
        return tuple(restored(value, arrays) for value in node[TUPLE])
    if ITEMS in node:
        return {restored(key, arrays): restored(value, arrays) for key, value in node[ITEMS]}
    return {key: restored(value, arrays) for key, value in node.items()}


def load(pickled: bytes, modules: list[str]) -> dict[str, Any]:
    """What :meth:`Describer.pickled` holds, after importing the modules that register the rest."""
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise CannotMove(
                f"module {module}, which registers classes of the model with Keras, cannot be imported here. Install "
                "it on the workers, or send it with client.upload_file"
            ) from error
    if not pickled:
        return {}
    try:
        objects: dict[str, Any] = cloudpickle.loads(pickled)
        return objects
    except ImportError as error:
        raise CannotMove(
            f"the model's custom code needs module {error.name}, which cannot be imported here. Install it on the "
            "workers, or send it with client.upload_file"
        ) from error
