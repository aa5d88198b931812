"""Every private name of Keras that we touch, and nothing else.

Checked against Keras 3.15.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

from dask_bridges.errors import DataError

__all__ = [
    "assigned",
    "attach",
    "build",
    "fresh_loss",
    "has_schedule",
    "in_order",
    "initial_epoch",
    "layers",
    "mask_of",
    "output_losses",
    "set_initial_epoch",
    "sync",
    "tried",
    "with_moments",
    "without_model",
]


def initial_epoch(model: Any) -> int | None:
    """The epoch that `BackupAndRestore` has found to go on from; a public attribute would retire it."""
    return getattr(model, "_initial_epoch", None)


def set_initial_epoch(model: Any, epoch: int | None) -> None:
    """See `initial_epoch`."""
    if initial_epoch(model) != epoch:
        model._initial_epoch = epoch


def layers(model: Any) -> list[Any]:
    """All layers of a model, however deep; a public way to them would retire it."""
    return list(model._flatten_layers())


def has_schedule(optimizer: Any) -> bool:
    """Whether the learning rate follows a schedule, so that it cannot be set; a public question would retire it."""
    import keras

    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return isinstance(inner._learning_rate, keras.optimizers.schedules.LearningRateSchedule)


def build(model: Any, batch: Any) -> None:
    """Make what a model, its loss, metrics and optimizer have in variables, as `fit` does, on TensorFlow late.

    A public way to do that would retire it.
    """
    model._symbolic_build(data_batch=batch)
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


def attach(callback: Any, model: Any) -> None:
    """Give a callback its model, and do no more; `set_model` may: TensorBoard's writes files."""
    callback._model = model


@contextlib.contextmanager
def without_model(callbacks: Sequence[Any]) -> Iterator[None]:
    """Callbacks are without their models within, as they travel; a way to unset these would retire it."""
    models = [getattr(callback, "_model", None) for callback in callbacks]
    for callback in callbacks:
        attach(callback, None)
    try:
        yield
    finally:
        for callback, model in zip(callbacks, models):
            attach(callback, model)


@contextlib.contextmanager
def with_moments(layer: Any, moments: Callable[[Any, Sequence[int]], tuple[Any, Any]]) -> Iterator[None]:
    """Have a `BatchNormalization` take its mean and variance from `moments`, called with inputs and axes.

    A public method for them, or synchronization by another way than TensorFlow's strategies, would retire it.
    """
    of = type(layer)

    def _moments(self: Any, inputs: Any, mask: Any) -> tuple[Any, Any]:
        if mask is not None:
            raise DataError(f"layer {self.name!r} has synchronized=True and a mask: leave one out")
        return moments(inputs, self._reduction_axes)

    layer.__class__ = type(of.__name__, (of,), {"_moments": _moments})
    try:
        yield
    finally:
        layer.__class__ = of


def sync(model: Any) -> None:
    """Bring the state of a training on JAX into the model's variables, which others hold all the time."""
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()


def in_order(model: Any, logs: dict[str, Any]) -> Any:
    """The values of `logs` as ``model.evaluate`` returns them: a list in its order, or one value alone.

    Would be retired by a public way from the dict of ``get_metrics_result`` to that list; ``metrics_names``, which is
    public, has one name for all compiled metrics together.
    """
    return model._flatten_metrics_in_order(logs)


def output_losses(model: Any) -> list[Any]:
    """The running means of each output's loss, of a compiled model with several; ``metrics`` has them among others.

    Would be retired by means that count rows on every backend: ``CompileLoss.call`` weights them by
    ``y_pred.shape[0]``, which is None in a compiled function of TensorFlow, so that they count batches there.
    """
    loss = model._compile_loss
    return [] if loss is None else list(loss.metrics)


@contextlib.contextmanager
def assigned() -> Iterator[set[int]]:
    """The ids of the variables that are given values within; a count of a variable's versions would retire it."""
    import keras

    found: set[int] = set()
    assign = keras.Variable.assign

    def noted(variable: Any, value: Any) -> Any:
        found.add(id(variable))
        return assign(variable, value)

    with mock.patch.object(keras.Variable, "assign", noted):
        yield found


def tried(function: Any, *args: Any) -> None:
    """Run a function on `KerasTensor`s, to no effect but its errors; a public name for this would retire it."""
    from keras.src.backend import compute_output_spec

    compute_output_spec(function, *args)


def fresh_loss(model: Any) -> Any:
    """The loss as it was compiled, not yet built for any data; a public way to copy it would retire it."""
    held = model._compile_loss
    return type(held)(held._user_loss, held._user_loss_weights, output_names=held.output_names)


def mask_of(tensor: Any) -> Any:
    """The mask that goes with a tensor, which losses look at; a public question would retire it."""
    from keras.src.backend import get_keras_mask

    return get_keras_mask(tensor)
