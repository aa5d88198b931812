"""What can be found wrong on the client, before anything starts."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from distributed.protocol.pickle import dumps

from dask_bridges import partitions
from dask_bridges.errors import DataError
from dask_keras import upstream
from dask_keras.replica import Set
from dask_serializers import CannotMove
from dask_tf.schema import itemsize

__all__ = [
    "check_count",
    "check_element",
    "check_model",
    "course",
    "listed",
    "matrices",
    "pickled_callbacks",
    "target_matrices",
    "unpacked",
]

logger = logging.getLogger(__name__)


def check_model(model: Any) -> None:
    """Refuse models that cannot be trained as several replicas, with the reason."""
    import keras

    if not isinstance(model, keras.Model):
        raise TypeError(f"model is a keras.Model, not {type(model).__name__}")
    name = f"model {model.name!r}"
    if not model.compiled or model.optimizer is None:
        raise DataError(f"{name} is not compiled: call model.compile(optimizer=..., loss=...) first")
    if not _has_loss(model):
        raise DataError(f"{name} is compiled without a loss, and none of its layers adds one: compile it with loss=...")
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


def _has_loss(model: Any) -> bool:
    """Whether there may be something to minimise: layers of the user's own may add losses when they are called."""
    if model.loss is not None or model.losses:
        return True
    layers = upstream.layers(model)
    of_keras = all(type(each).__module__.startswith("keras.") for each in (model, *layers))
    return not of_keras or any(getattr(each, "activity_regularizer", None) is not None for each in layers)


def check_count(name: str, value: Any, *, least: int = 1, optional: bool = False) -> None:
    """Refuse what is no number of something."""
    if value is None and optional:
        return
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise DataError(f"{name}={value!r}: pass a whole number of {least} or more")


def course(model: Any, y: Any, sample_weight: Any, **given: Any) -> dict[str, Any]:
    """What `fit` is told of how long, how often and in which order to train, checked and in plain types."""
    steps, freq, weights, seed = (given[n] for n in ("steps_per_epoch", "validation_freq", "class_weight", "seed"))
    several = isinstance(freq, Collection)
    for name, optional, least in (
        ("batch_size", False, 1), ("epochs", False, 1), ("steps_per_epoch", True, 1), ("initial_epoch", False, 0),
        ("seed", True, 0),
    ):  # fmt: skip
        check_count(name, given[name], least=least, optional=optional)
    for each in freq if several else [freq]:
        check_count("validation_freq", each)
    if weights is not None and not isinstance(weights, Mapping):
        raise DataError(f"class_weight={weights!r}: pass a dict of the classes' weights, such as {{0: 1.0, 1: 2.5}}")
    if weights and sample_weight is not None:
        raise DataError("class_weight and sample_weight cannot be given at the same time, as in Keras")
    if weights and (isinstance(y, Mapping | tuple | list) or len(getattr(model, "outputs", None) or ()) > 1):
        raise DataError("class_weight is for models with one output, as in Keras: give each its own sample_weight")
    return {
        **{name: int(given[name]) for name in ("batch_size", "epochs", "initial_epoch")},
        "steps_per_epoch": None if steps is None else int(steps),
        "validation_freq": [int(each) for each in freq] if several else int(freq),
        "class_weight": dict(weights) if weights else None,
        "shuffle": bool(given["shuffle"]),
        "seed": None if seed is None else int(seed),
    }


def unpacked(validation_data: Any) -> tuple[Any, ...] | None:
    """``(X, y)`` or ``(X, y, sample_weight)``; None without any."""
    if validation_data is None:
        return None
    if not isinstance(validation_data, tuple | list) or len(validation_data) not in (2, 3):
        raise DataError("validation_data is a tuple (X, y) or (X, y, sample_weight) of Dask collections")
    return tuple(validation_data)


def listed(callbacks: Any) -> list[Any]:
    """The callbacks as Keras takes them: one, or any nest of them."""
    import keras

    return [] if callbacks is None else keras.tree.flatten(callbacks)


def pickled_callbacks(given: list[Any]) -> bytes:
    """The callbacks as they travel; one that cannot is named."""
    import keras

    for callback in given:
        if not isinstance(callback, keras.callbacks.Callback):
            raise TypeError(f"callbacks are keras.callbacks.Callback objects, not {callback!r}")
        with upstream.without_model([callback]):
            try:
                dumps(callback)
            except Exception as error:
                raise DataError(
                    f"callback {type(callback).__name__} cannot be sent to the worker it is to run on: {error}. Make "
                    "what it holds (open files, locks, connections) in on_train_begin()"
                ) from error
    with upstream.without_model(given):
        return bytes(dumps(given))


def matrices(model: Any, X: Any, collections: Mapping[str, Any]) -> frozenset[str]:
    """The dataframes among the inputs whose columns the model takes side by side."""
    frames = {role for role, each in collections.items() if partitions.is_frame(each) and each.ndim == 2}
    if not frames:
        return frozenset()
    inputs = getattr(model, "inputs", None)
    if inputs and set(collections) == frames and len(frames) == 1 and not isinstance(X, Mapping | tuple | list):
        (role,) = frames
        by_name = input_keys(model) is not None
        if len(inputs) == 1 and not by_name and inputs[0].name not in collections[role].columns:
            return frozenset(frames)
        return frozenset()
    return frozenset() if inputs is None else frozenset(frames)


def target_matrices(model: Any, y: Any, collections: Mapping[str, Any]) -> frozenset[str]:
    """The dataframes that are one target each; one alone has, in columns of their names, those of several outputs."""
    several = len(getattr(model, "outputs", None) or ()) > 1 or isinstance(model.loss, Mapping)
    if several and not isinstance(y, Mapping | tuple | list):
        return frozenset()
    return frozenset(role for role, each in collections.items() if partitions.is_frame(each) and each.ndim == 2)


def input_keys(model: Any) -> tuple[str, ...] | None:
    """The names of the inputs of a model that takes a dict of them, which need not be those of its tensors."""
    inputs = getattr(model, "input", None)  # a Sequential model has none before it is called
    return tuple(inputs) if isinstance(inputs, Mapping) else None


def check_element(model: Any, found: Set) -> None:
    """See that two rows fit the model's inputs, its outputs and its loss."""
    blocks = tuple(np.zeros((2, block.width), _dtype(block.dtype)) for block in found.schema.blocks)
    element = found.layout.element(found.schema, blocks)
    _check_inputs(model, element[0])
    _try_out(model, *element)


def _check_inputs(model: Any, inputs: Any) -> None:
    wanted = getattr(model, "inputs", None)
    if not wanted:
        return
    if isinstance(inputs, dict):
        named = {each.name: each for each in wanted} if input_keys(model) is None else dict(model.input)
        missing = [name for name in named if name not in inputs]
        if missing:
            raise DataError(
                f"model {model.name!r} has inputs {missing}, which X has no columns for: it has {[*inputs]}"
            )
        pairs = [(spec, inputs[name]) for name, spec in named.items() if hasattr(spec, "shape")]
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


def _try_out(model: Any, x: Any, y: Any = None, weight: Any = None) -> None:
    """Trace the model and its loss on what stands for two rows; nothing is computed."""
    import keras

    if model.run_eagerly:  # it may do what cannot be traced
        return
    whole = model if model.built else pickle.loads(dumps(model))  # the user's stays without weights
    of_model = type(model).compute_loss.__module__.startswith("keras.")
    loss = upstream.fresh_loss(model) if of_model and model.loss is not None else None
    outputs: list[Any] = []

    def trial(x: Any, y: Any, weight: Any) -> Any:
        outputs.append(whole(x, training=True))
        if any(upstream.mask_of(tensor) is not None for tensor in keras.tree.flatten(outputs)):
            raise DataError(_MASKED.format(model=model.name))
        return loss(y, outputs[0], weight) if loss is not None else ()

    given = keras.tree.map_structure(_symbol, [x, y, weight])
    try:
        upstream.tried(trial, *given)
    except (DataError, CannotMove):
        raise
    except (ValueError, TypeError, KeyError) as error:
        if type(error).__name__ == "OperatorNotAllowedInGraphError":  # of TensorFlow, which may yet convert it
            return
        of = f", to outputs of {_described(outputs[0])}" if outputs else ""
        raise DataError(
            f"model {model.name!r} cannot be trained on X of {_described(x)} and y of {_described(y)} a row{of}, with "
            f"the loss {_named(model.loss)}: {error}"
        ) from error
    except Exception:
        logger.debug("model %r could not be tried out", model.name, exc_info=True)


_MASKED = (
    "the outputs of model {model!r} carry a mask (of an Embedding with mask_zero=True, or a Masking layer), so that "
    "its loss is a mean over entries, not over rows, and workers with unlike numbers of entries would count wrongly. "
    "End the mask before the output (a layer that pools over time or returns only its last output does), or give the "
    "entries sample weights"
)


def _symbol(value: Any) -> Any:
    import keras

    return None if value is None else keras.KerasTensor(value.shape, _name(value.dtype))


def _name(dtype: Any) -> str:
    return "bfloat16" if np.dtype(dtype).kind == "V" else str(np.dtype(dtype))


def _described(values: Any) -> str:
    import keras

    flat = [f"shape {tuple(value.shape[1:])}" for value in keras.tree.flatten(values) if value is not None]
    return " and ".join(flat) or "none"


def _named(loss: Any) -> str:
    import keras

    return ", ".join(
        each if isinstance(each, str) else str(getattr(each, "name", getattr(each, "__name__", each)))
        for each in keras.tree.flatten(loss)
    )


def _dtype(name: str) -> Any:
    return np.dtype(name) if name != "bfloat16" else np.dtype(f"V{itemsize(name)}")
