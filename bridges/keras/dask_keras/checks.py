"""What can be found wrong on the client, before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from distributed.protocol.pickle import dumps

from dask_bridges import partitions
from dask_bridges.errors import DataError
from dask_keras.replica import Set
from dask_tf.schema import itemsize

__all__ = ["check_count", "check_element", "check_model", "matrices", "pickled_callbacks", "unpacked"]


def check_model(model: Any) -> None:
    """Refuse models that cannot be trained as several replicas, with the reason."""
    import keras

    if not isinstance(model, keras.Model):
        raise TypeError(f"model is a keras.Model, not {type(model).__name__}")
    name = f"model {model.name!r}"
    if not model.compiled or model.optimizer is None or model.loss is None:
        raise DataError(f"{name} is not compiled: call model.compile(optimizer=..., loss=...) first")
    for method in ("train_step", "test_step", "make_train_function"):
        of = getattr(type(model), method)
        if not of.__module__.startswith("keras."):
            raise DataError(
                f"{name} overrides {method}() in {type(model).__name__}, which may do with a batch whatever it "
                "likes: that cannot be divided over workers. Put what it does into a loss, a layer or call(), or "
                "train it by model.fit in a task of one worker"
            )
    if model.steps_per_execution != 1:
        raise DataError(
            f"{name} is compiled with steps_per_execution={model.steps_per_execution}: the workers meet in every "
            "step, so that nothing would be gained. Compile it without"
        )
    for loss in keras.tree.flatten(model.loss):
        reduction = getattr(loss, "reduction", "sum_over_batch_size")
        if reduction not in ("sum_over_batch_size", "mean"):
            raise DataError(
                f"loss {loss.name!r} of {name} has reduction={reduction!r}: only means over the rows of a batch "
                "(reduction='sum_over_batch_size') are the same however the rows are divided over workers"
            )


def check_count(name: str, value: Any, *, optional: bool = False) -> None:
    """Refuse what is no number of something."""
    if value is None and optional:
        return
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise DataError(f"{name}={value!r}: pass a whole number of 1 or more")


def unpacked(validation_data: Any) -> tuple[Any, ...]:
    """``(X, y)`` or ``(X, y, sample_weight)``."""
    if not isinstance(validation_data, tuple | list) or len(validation_data) not in (2, 3):
        raise DataError("validation_data is a tuple (X, y) or (X, y, sample_weight) of Dask collections")
    return tuple(validation_data)


def pickled_callbacks(callbacks: Any) -> bytes:
    """The callbacks as they travel; one that cannot is named."""
    import keras

    given = list(callbacks or ())
    for callback in given:
        if not isinstance(callback, keras.callbacks.Callback):
            raise TypeError(f"callbacks are keras.callbacks.Callback objects, not {callback!r}")
        model, callback._model = getattr(callback, "_model", None), None
        try:
            dumps(callback)
        except Exception as error:
            raise DataError(
                f"callback {type(callback).__name__} cannot be sent to the worker it is to run on: {error}. Make what "
                "it holds (open files, locks, connections) in on_train_begin()"
            ) from error
        finally:
            callback._model = model
    models = [getattr(callback, "_model", None) for callback in given]
    for callback in given:
        callback._model = None
    try:
        return bytes(dumps(given))
    finally:
        for callback, model in zip(given, models):
            callback._model = model


def matrices(model: Any, X: Any, collections: Mapping[str, Any]) -> frozenset[str]:
    """The dataframes among the inputs whose columns the model takes side by side."""
    frames = {role for role, each in collections.items() if partitions.is_frame(each) and each.ndim == 2}
    if not frames:
        return frozenset()
    inputs = getattr(model, "inputs", None)
    if inputs and set(collections) == frames and len(frames) == 1 and not isinstance(X, Mapping | tuple | list):
        (role,) = frames
        by_name = isinstance(getattr(model, "_inputs_struct", None), dict)
        if len(inputs) == 1 and not by_name and inputs[0].name not in collections[role].columns:
            return frozenset(frames)
        return frozenset()
    return frozenset() if inputs is None else frozenset(frames)


def check_element(model: Any, found: Set) -> None:
    """See that two rows fit the model's inputs."""
    blocks = tuple(np.zeros((2, block.width), _dtype(block.dtype)) for block in found.schema.blocks)
    inputs = found.layout.element(found.schema, blocks)[0]
    wanted = getattr(model, "inputs", None)
    if not wanted:
        return
    if isinstance(inputs, dict):
        missing = [each.name for each in wanted if each.name not in inputs]
        if missing:
            raise DataError(
                f"model {model.name!r} has inputs {missing}, which X has no columns for: it has {[*inputs]}"
            )
        pairs = [(each, inputs[each.name]) for each in wanted]
    else:
        given = list(inputs) if isinstance(inputs, tuple) else [inputs]
        if len(given) != len(wanted):
            raise DataError(f"model {model.name!r} has {len(wanted)} inputs, and X is {len(given)} collections")
        pairs = list(zip(wanted, given))
    for spec, value in pairs:
        _check_shape(model, spec, value)


def _check_shape(model: Any, spec: Any, value: Any) -> None:
    wanted, given = tuple(spec.shape[1:]), value.shape[1:]
    fits = (given, (*given, 1), given[:-1] if given[-1:] == (1,) else given)  # Keras adds and drops a last 1
    if not any(len(shape) == len(wanted) and all(w in (None, g) for w, g in zip(wanted, shape)) for shape in fits):
        raise DataError(
            f"input {spec.name!r} of model {model.name!r} takes rows of shape {wanted}, and X has rows of shape {given}"
        )


def _dtype(name: str) -> Any:
    return np.dtype(name) if name != "bfloat16" else np.dtype(f"V{itemsize(name)}")
