"""Every private name of Keras that we touch, and nothing else.

Checked against Keras 3.15. Each would be retired by a public counterpart upstream: a hook in
``serialize_keras_object`` for objects that are not registered, variables created without a value, and a public walk
over what a model saves. ``tests/serializers/test_upstream.py`` fails when one of them changes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from keras.src.backend.common import global_state
from keras.src.saving import object_registration, saving_lib, serialization_lib
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.utils.naming import to_snake_case

__all__ = [
    "KerasSaveable",
    "base_reduce",
    "children",
    "describing",
    "deserialize",
    "eager",
    "give_value",
    "optimizer_variables",
    "public_name",
    "registered",
    "serialize",
    "sharing",
    "uninitialized",
]

#: Keras's own, whatever is in its place for a while.
_describe = serialization_lib.serialize_keras_object
deserialize = serialization_lib.deserialize_keras_object
_local = threading.local()

#: What pickle does with anything of Keras: an HDF5 archive in memory.
base_reduce = KerasSaveable.__reduce__

#: Shared layers and nested models are described once.
sharing = serialization_lib.ObjectSharingScope


def _described(obj: Any) -> Any:
    describe = getattr(_local, "describe", None)
    return _describe(obj) if describe is None else describe(obj, _describe)


@contextmanager
def describing(describe: Callable[[Any, Callable[[Any], Any]], Any]) -> Iterator[None]:
    """Within, in this thread, Keras describes each object by ``describe(object, what Keras itself would do)``."""
    serialization_lib.serialize_keras_object = _described
    before = getattr(_local, "describe", None)
    _local.describe = describe
    try:
        yield
    finally:
        _local.describe = before


def serialize(obj: Any) -> Any:
    """``keras.saving.serialize_keras_object``, also of `obj` itself as :func:`describing` says."""
    return serialization_lib.serialize_keras_object(obj)


def public_name(obj: Any) -> str | None:
    """``keras.layers.Dense`` for what Keras exports, None for anything else."""
    from keras.src.api_export import get_name_from_symbol

    name: str | None = get_name_from_symbol(obj)
    return name


def registered(obj: Any) -> bool:
    """Whether `obj` is known by ``keras.saving.register_keras_serializable``."""
    return obj in object_registration.GLOBAL_CUSTOM_NAMES


def children(saveable: Any) -> Iterator[tuple[str, Any]]:
    """(path, object) for what `saveable` holds directly and Keras would save, in the order and by the names it does."""
    with eager():  # Keras makes an object of each type, to see what every object of it has
        held = list(saving_lib._walk_saveable(saveable))
    for name, child in held:
        if isinstance(child, KerasSaveable):
            yield name, child
        elif isinstance(child, (list, dict, tuple)):
            yield from _inside(child, name, set())


def _inside(container: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(container) in seen:
        return
    seen.add(id(container))
    used: dict[str, int] = {}
    for child in list(container.values()) if isinstance(container, dict) else container:
        if isinstance(child, KerasSaveable):
            yield f"{path}/{_unique(to_snake_case(type(child).__name__), used)}", child
        elif isinstance(child, (list, dict, tuple)):
            yield from _inside(child, f"{path}/{_unique('container', used)}", seen)


def _unique(name: str, used: dict[str, int]) -> str:
    used[name] = used.get(name, -1) + 1
    return f"{name}_{used[name]}" if used[name] else name


def give_value(variable: Any, value: Any) -> None:
    """Make `value` (a tensor of the backend) the first value of `variable`, or assign it where there is one."""
    if variable._value is None:
        variable._initializer = lambda *args, **kwargs: value
    else:
        with eager():
            variable.assign(value)


@contextmanager
def uninitialized() -> Iterator[None]:
    """Within, variables are created without a value; those left without one get it where the block ends well."""
    import keras

    waiting = global_state.get_global_attribute("uninitialized_variables", [])
    global_state.set_global_attribute("uninitialized_variables", [])
    try:
        with keras.StatelessScope():
            yield
    finally:
        global_state.set_global_attribute("uninitialized_variables", waiting)


@contextmanager
def eager() -> Iterator[None]:
    """Within, inside :func:`uninitialized`, things are as outside of it."""
    scope = global_state.get_global_attribute("stateless_scope")
    global_state.set_global_attribute("stateless_scope", None)
    try:
        yield
    finally:
        global_state.set_global_attribute("stateless_scope", scope)


def optimizer_variables(optimizer: Any) -> list[Any]:
    """The variables a built optimizer trains, in the order it was built with."""
    return list(optimizer._trainable_variables)
