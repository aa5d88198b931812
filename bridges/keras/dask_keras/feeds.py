"""Batches as `model.fit` takes them: a `tf.data.Dataset` on TensorFlow, a `PyDataset` elsewhere."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from dask_keras.rows import Batches

__all__ = ["endless", "once"]

#: Batches that are ready before they are asked for.
_READY = 2


def endless(batches: Batches, first: int) -> Any:
    """The batches of all steps from the first one on."""
    return _made(batches, first, None)


def once(batches: Batches, steps: int) -> Any:
    """The batches of so many steps."""
    return _made(batches, 0, steps)


def _made(batches: Batches, first: int, steps: int | None) -> Any:
    if keras.backend.backend() == "tensorflow":
        return _dataset(batches, first, steps)
    return _Steps(batches, first, steps)


def _dataset(batches: Batches, first: int, steps: int | None) -> Any:
    """On TensorFlow, where an iterator of Python's would cost more than a batch."""
    import tensorflow as tf

    example = batches[first]
    arrays = keras.tree.flatten(example)

    def read(step: Any) -> Any:
        tensors = tf.numpy_function(lambda at: keras.tree.flatten(batches[int(at)]), [step], [a.dtype for a in arrays])
        for tensor, array in zip(tensors, arrays):
            tensor.set_shape((None, *array.shape[1:]))
        return keras.tree.pack_sequence_as(example, tensors)

    last = np.iinfo(np.int64).max if steps is None else first + steps
    return tf.data.Dataset.range(first, last).map(read).prefetch(_READY)


class _Steps(keras.utils.PyDataset):  # type: ignore[misc]
    def __init__(self, batches: Batches, first: int, steps: int | None) -> None:
        super().__init__()
        self._batches, self._first, self._steps = batches, first, steps

    @property
    def num_batches(self) -> int | None:
        """None for an endless one."""
        return self._steps

    def __getitem__(self, index: int) -> Any:
        return self._batches[self._first + index]
