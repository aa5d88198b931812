"""Every private name of Keras that we touch, and nothing else.

Checked against Keras 3.15. Each would be retired by a public counterpart upstream: a hook in
``serialize_keras_object`` for objects that are not registered, variables created without a value, and a public walk
over what a model saves. ``tests/serializers/test_upstream.py`` fails when one of them changes.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from keras.src.backend.common import global_state
from keras.src.layers import Lambda
from keras.src.losses.losses import LossFunctionWrapper
from keras.src.models import Functional, Sequential
from keras.src.saving import object_registration, saving_lib, serialization_lib
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.utils.naming import to_snake_case

__all__ = [
    "KerasSaveable",
    "base_reduce",
    "builds_lazily",
    "built_at_once",
    "children",
    "describing",
    "deserialize",
    "dtype_policy",
    "eager",
    "give_value",
    "missing_from_config",
    "optimizer_variables",
    "public_name",
    "registered",
    "serialize",
    "set_path",
    "sharing",
    "uninitialized",
]

#: Keras's own, whatever is in its place for a while.
_describe = serialization_lib.serialize_keras_object
deserialize = serialization_lib.deserialize_keras_object
_local = threading.local()

#: What pickle does with anything of Keras: an HDF5 archive in memory.
base_reduce = KerasSaveable.__reduce__

_builds_lazily: dict[type, bool] = {}

#: Shared layers and nested models are described once.
sharing = serialization_lib.ObjectSharingScope


_describe_in_lambda = Lambda._serialize_function_to_config


@contextmanager
def _in_this_thread(name: str, value: Any) -> Iterator[None]:
    before = getattr(_local, name, None)
    setattr(_local, name, value)
    try:
        yield
    finally:
        setattr(_local, name, before)


def _described(obj: Any) -> Any:
    describe = getattr(_local, "describe", None)
    return _describe(obj) if describe is None else describe(obj, _describe)


def _described_in_lambda(layer: Any, function: Any) -> Any:
    """A Lambda layer marshals its function, and loses what globals and cells the function uses."""
    if getattr(_local, "describe", None) is None:
        return _describe_in_lambda(layer, function)
    return _described(function)


@contextmanager
def describing(describe: Callable[[Any, Callable[[Any], Any]], Any]) -> Iterator[None]:
    """Within, in this thread, Keras describes each object by ``describe(object, what Keras itself would do)``."""
    serialization_lib.serialize_keras_object = _described
    Lambda._serialize_function_to_config = _described_in_lambda
    with _in_this_thread("describe", describe):
        yield


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
    for name, child in _held(saveable):
        if isinstance(child, KerasSaveable):
            yield name, child
        elif isinstance(child, (list, dict, tuple)):
            yield from _inside(child, name, set())


def _held(saveable: Any) -> Iterator[tuple[str, Any]]:
    """As Keras's ``_walk_saveable``, which makes a new layer at each call to see which attributes all layers have."""
    kind = saveable._obj_type()
    if kind in ("Sequential", "Functional"):
        yield "layers", saveable.layers
    names = set(dir(saveable)) - _everywhere(kind)
    for name in sorted((name for name in names if not name.startswith("__")), key=saving_lib._name_key):
        try:
            child = getattr(saveable, name)
        except Exception:  # a property that has nothing to give now
            continue
        yield name, child


@cache
def _everywhere(kind: str) -> frozenset[str]:
    with eager():
        return frozenset(saving_lib.get_attr_skipset(kind))


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


def missing_from_config(obj: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a loss that its ``get_config`` leaves out: Huber's delta, say."""
    kept = getattr(obj, "_fn_kwargs", None)
    if not isinstance(obj, LossFunctionWrapper) or not kept:
        return {}
    accepted = inspect.signature(type(obj).__init__).parameters
    return {name: value for name, value in kept.items() if name in accepted and name not in config}


def builds_lazily(optimizer: Any) -> bool:
    """Whether an optimizer of this type can make its slots inside :func:`uninitialized`.

    Nadam cannot: it makes a variable of a value. Such an optimizer makes all its slots as zeros first.
    """
    kind = type(optimizer)
    if kind not in _builds_lazily:
        import keras

        trial = kind.from_config(optimizer.get_config())
        variable = keras.Variable([0.0], name="trial")
        try:
            with uninitialized():
                trial.build([variable])
            _builds_lazily[kind] = True
        except Exception:
            _builds_lazily[kind] = False
    return _builds_lazily[kind]


def set_path(variable: Any, path: str) -> None:
    """Give `variable` the path it had: a model built layer by layer gives others than one built at once."""
    variable._path = path


def dtype_policy(saveable: Any) -> Any:
    """The policy of a model that its ``from_config`` forgets (Sequential, Functional), or None for anything else."""
    return saveable.dtype_policy if isinstance(saveable, (Sequential, Functional)) else None


def give_value(variable: Any, value: Any) -> None:
    """Make `value` (a tensor of the backend) the first value of `variable`, or assign it where there is one."""
    if variable._value is None:
        variable._initializer = lambda *args, **kwargs: value
    else:
        with eager():
            variable.assign(value)


_rebuild = Sequential._maybe_rebuild
_sequential_from_config = Sequential.__dict__["from_config"].__func__


def _rebuild_later(model: Any) -> None:
    if not getattr(_local, "adding", False):
        _rebuild(model)


def _from_config_at_once(cls: Any, config: Any, custom_objects: Any = None) -> Any:
    at_once = getattr(_local, "at_once", False)
    with _in_this_thread("adding", at_once):
        model = _sequential_from_config(cls, config, custom_objects)
    if at_once and not model.built and model.layers:
        _rebuild(model)
    return model


@contextmanager
def built_at_once() -> Iterator[None]:
    """Within, in this thread, a Sequential is built from its config once, and not again for each of its layers."""
    Sequential._maybe_rebuild = _rebuild_later
    Sequential.from_config = classmethod(_from_config_at_once)
    with _in_this_thread("at_once", True):
        yield


@contextmanager
def uninitialized() -> Iterator[None]:
    """Within, variables are created without a value; those left without one get it where the block ends."""
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
