"""Batches as `model.fit` takes them: a `tf.data.Dataset` on TensorFlow, a `PyDataset` elsewhere."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from dask_keras.rows import Batches

__all__ = ["endless", "once"]

#: Batches that are ready before they are asked for.
_READY = 2
#: A call into Python takes as long as a small batch: of batches below so many bytes, it reads about so many bytes, and
#: so many batches at most.
_SMALL, _GROUP, _MOST = 2**18, 2**21, 256


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
    last = np.iinfo(np.int64).max if steps is None else first + steps
    size = max(1, sum(array.nbytes for array in arrays))
    most = 1 if size >= _SMALL else min(_GROUP // size, _MOST)

    def made(found: Any, *leading: None) -> Any:
        for tensor, array in zip(found, arrays):
            tensor.set_shape((*leading, None, *array.shape[1:]))
        return keras.tree.pack_sequence_as(example, found)

    def read(step: Any) -> Any:
        return tf.numpy_function(lambda at: keras.tree.flatten(batches[int(at)]), [step], [a.dtype for a in arrays])

    if most == 1:
        return tf.data.Dataset.range(first, last).map(lambda step: made(read(step))).prefetch(_READY)

    def read_some(step: int) -> list[Any]:
        """How many steps they are, none at the end; and their rows, stacked."""
        if step >= last:
            return [np.int64(0), *(array[:0, np.newaxis] for array in arrays)]
        steps, rows = batches.together(step, min(most, last - step))
        found = keras.tree.flatten(rows)
        return [np.int64(steps), *(array.reshape(steps, len(array) // steps, *array.shape[1:]) for array in found)]

    def some(step: Any, _: Any) -> Any:
        steps, *found = tf.numpy_function(
            lambda at: read_some(int(at)), [step], [np.int64, *(array.dtype for array in arrays)]
        )
        steps.set_shape(())
        return step + steps, (steps, made(found, None))

    groups = tf.data.Dataset.counter().scan(np.int64(first), some).take_while(lambda steps, _: steps > 0)
    return groups.map(lambda _, found: found).prefetch(1).unbatch().prefetch(_READY)


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
