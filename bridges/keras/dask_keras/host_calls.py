"""A call into Python in the middle of a training step, whichever backend runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["through_host"]

#: What is called: arrays, and arrays of rows with their numbers, to as many of both.
HostFunction = Callable[[Sequence[Any], Sequence[tuple[Any, Any]]], tuple[list[Any], list[tuple[Any, Any]]]]


def through_host(function: HostFunction, values: Sequence[Any]) -> list[Any]:
    """Replace tensors by what `function` makes of their values, once a step, in the order of the steps.

    Arrays keep their shapes; of what names its rows (TensorFlow's gradients of embeddings do) there may be more.
    """
    import keras

    return _BY_BACKEND[keras.backend.backend()](function, values)


def _tensorflow(function: HostFunction, values: Sequence[Any]) -> list[Any]:
    import tensorflow as tf

    of_rows = [value for value in values if isinstance(value, tf.IndexedSlices)]
    whole = [tf.convert_to_tensor(value) for value in values if not isinstance(value, tf.IndexedSlices)]
    sent = [*whole, *(value.values for value in of_rows), *(tf.cast(value.indices, tf.int64) for value in of_rows)]

    def call(*arrays: Any) -> list[Any]:
        rows = arrays[len(whole) :]
        dense, sparse = function(arrays[: len(whole)], list(zip(rows[: len(of_rows)], rows[len(of_rows) :])))
        return [*dense, *(row for row, _ in sparse), *(number for _, number in sparse)]

    results = list(tf.numpy_function(call, sent, [value.dtype for value in sent]))
    for place, (result, value) in enumerate(zip(results, sent)):
        result.set_shape(value.shape if place < len(whole) else [None, *value.shape[1:]])
    rows = results[len(whole) :]
    slices = iter(
        tf.IndexedSlices(row, number, value.dense_shape)
        for row, number, value in zip(rows[: len(of_rows)], rows[len(of_rows) :], of_rows)
    )
    tensors = iter(results[: len(whole)])
    return [next(slices) if isinstance(value, tf.IndexedSlices) else next(tensors) for value in values]


def _jax(function: HostFunction, values: Sequence[Any]) -> list[Any]:
    import jax
    from jax.experimental import io_callback

    shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in values]
    return list(
        io_callback(lambda *arrays: function([np.asarray(a) for a in arrays], [])[0], shapes, *values, ordered=True)
    )


def _torch(function: HostFunction, values: Sequence[Any]) -> list[Any]:
    import torch

    dense = [value.to_dense() if value.is_sparse else value for value in values]
    results, _ = function([value.detach().cpu().numpy() for value in dense], [])
    return [torch.from_numpy(result).to(value.device) for result, value in zip(results, dense)]


_BY_BACKEND = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}
