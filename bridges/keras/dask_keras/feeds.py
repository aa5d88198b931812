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
        """The step after some, the numbers of rows in these, and their rows, stacked."""
        counts, rows = batches.together(step, min(most, last - step)) if step < last else ([], example)
        stacked = [_stacked(array, counts) for array in keras.tree.flatten(rows)]
        return [np.int64(step + len(counts)), np.array(counts, np.int64), *stacked]

    def some(step: Any, _: Any) -> Any:
        kinds = [np.int64, np.int64, *(array.dtype for array in arrays)]
        after, counts, *found = tf.numpy_function(lambda at: read_some(int(at)), [step], kinds)
        after.set_shape(())
        counts.set_shape((None,))
        return after, (counts, made(found, None))

    def trimmed(count: Any, found: Any) -> Any:
        return keras.tree.map_structure(lambda rows: rows[:count], found)

    groups = tf.data.Dataset.counter().scan(np.int64(first), some).take_while(lambda counts, _: tf.size(counts) > 0)
    if batches.shares.even:
        return groups.map(lambda _, found: found).prefetch(1).unbatch().prefetch(_READY)
    return groups.prefetch(1).unbatch().map(trimmed).prefetch(_READY)


def _stacked(array: Any, counts: list[int]) -> Any:
    """The rows of each step, filled up to the longest; on a new first axis."""
    most = max(counts, default=0)
    if len(counts) * most == sum(counts):
        return array[: sum(counts)].reshape(len(counts), most, *array.shape[1:])
    stacked = np.zeros((len(counts), most, *array.shape[1:]), array.dtype)
    for at, (count, end) in enumerate(zip(counts, np.cumsum(counts))):
        stacked[at, :count] = array[end - count : end]
    return stacked


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
