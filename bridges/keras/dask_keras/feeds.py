"""Batches as `model.fit` takes them: a `tf.data.Dataset` on TensorFlow, a `PyDataset` elsewhere."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from dask_keras.rows import Batches

__all__ = ["endless", "once"]

#: Batches that are ready before they are asked for.
_READY = 2
#: A call into Python takes as long as a small batch: of batches below so many bytes, it reads about so many bytes.
_SMALL, _GROUP = 2**18, 2**20


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
    together = 1 if size >= _SMALL else min(last - first, _GROUP // size)

    def read(step: int) -> list[Any]:
        """The rows of some steps, and where those of each begin and end."""
        found = [keras.tree.flatten(batches[at]) for at in range(step, min(step + together, last))]
        ends = np.cumsum([0, *(len(flat[0]) for flat in found)])
        return [*(np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*found)), ends]

    def tensors(step: Any) -> tuple[list[Any], Any]:
        kinds = [*(array.dtype for array in arrays), np.int64]
        *found, ends = tf.numpy_function(lambda at: read(int(at)), [step], kinds)
        ends.set_shape((None,))
        for tensor, array in zip(found, arrays):
            tensor.set_shape((None, *array.shape[1:]))
        return found, ends

    def one(step: Any) -> Any:
        return keras.tree.pack_sequence_as(example, tensors(step)[0])

    def some(step: Any) -> Any:
        found, ends = tensors(step)

        def of_step(at: Any) -> Any:
            return keras.tree.pack_sequence_as(example, [tensor[ends[at] : ends[at + 1]] for tensor in found])

        return tf.data.Dataset.range(tf.shape(ends, tf.int64)[0] - 1).map(of_step)

    steps_of_calls = tf.data.Dataset.range(first, last, together)
    return (steps_of_calls.map(one) if together == 1 else steps_of_calls.flat_map(some)).prefetch(_READY)


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
