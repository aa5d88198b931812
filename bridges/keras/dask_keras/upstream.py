"""Every private name of Keras that this package touches."""

from __future__ import annotations

from typing import Any

__all__ = ["build", "has_schedule", "initial_epoch", "set_initial_epoch", "sync"]


def initial_epoch(model: Any) -> int | None:
    """The epoch that `BackupAndRestore` has found to go on from; a public attribute would retire it."""
    return getattr(model, "_initial_epoch", None)


def set_initial_epoch(model: Any, epoch: int | None) -> None:
    """See `initial_epoch`."""
    if initial_epoch(model) != epoch:
        model._initial_epoch = epoch


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


def sync(model: Any) -> None:
    """Bring the state of a training on JAX into the model's variables, which others hold all the time."""
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()
