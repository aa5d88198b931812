"""Batch normalization by the whole batch: the moments of all ranks' rows, and gradients through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dask_keras.host_calls import through_host
from dask_keras.synchronous import Replicas

__all__ = ["Moments", "is_synchronized"]


def is_synchronized(layer: Any) -> bool:
    """Whether a layer asks for it."""
    import keras

    return isinstance(layer, keras.layers.BatchNormalization) and bool(layer.synchronized)


class Moments:
    """Mean and variance over the rows of all ranks.

    The loss of the whole batch is the mean of the ranks' losses by their rows, and
    the gradients of a rank are weighted by its rows later, when they are brought
    together. So what comes back through a mean is weighted by each rank's rows, and
    divided by this one's.

    Parameters
    ----------
    replicas : Replicas
    """

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas

    def __call__(self, inputs: Any, axes: Sequence[int]) -> tuple[Any, Any]:
        """Of `inputs`, over these axes, of which the first is that of the rows; both have the others' shape."""
        from keras import ops

        short = str(inputs.dtype) in ("float16", "bfloat16")
        values = ops.cast(inputs, "float32") if short else inputs
        count = 1
        for axis in axes:
            count = count * ops.shape(values)[axis] if axis else count
        count = ops.cast(count, values.dtype)
        mean = self._mean(ops.sum(values, axes) / count)
        kept = [1 if axis in axes else -1 for axis in range(len(values.shape))]
        variance = self._mean(ops.sum(ops.square(values - ops.reshape(mean, kept)), axes) / count)
        return (ops.cast(mean, inputs.dtype), ops.cast(variance, inputs.dtype)) if short else (mean, variance)

    def _mean(self, sums: Any) -> Any:
        """The sums over this rank's rows, to the means over all rows; with a gradient."""
        import tensorflow as tf  # no other backend has layers that ask for it

        @tf.custom_gradient  # type: ignore[untyped-decorator, unused-ignore]
        def mean(value: Any) -> Any:
            means = through_host(self._forward, [value])[0]
            return means, lambda gradient: through_host(self._backward, [gradient])[0]

        return mean(sums)

    def _forward(self, whole: Sequence[Any], _: Any) -> tuple[list[Any], list[Any]]:
        share, rows = self._replicas.part
        return [self._sum(value, 1.0 if share else 0.0) / value.dtype.type(rows) for value in whole], []

    def _backward(self, whole: Sequence[Any], _: Any) -> tuple[list[Any], list[Any]]:
        share, rows = self._replicas.part
        back = 1.0 / share if share else 0.0
        return [self._sum(value, share / rows) * value.dtype.type(back) for value in whole], []

    def _sum(self, value: Any, weight: float) -> Any:
        buffer = np.array(value * value.dtype.type(weight)) if weight else np.zeros_like(value)
        self._replicas.guarded(self._replicas.collective.all_reduce, buffer)
        return buffer
