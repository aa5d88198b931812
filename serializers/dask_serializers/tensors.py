"""A backend's tensors as bytes, and back.

===========  ==============================================  ==================================================
Backend      leaving                                         arriving
===========  ==============================================  ==================================================
TensorFlow   aliased; a variable that is updated meanwhile   copied once, into memory TensorFlow aliases (64-byte
             copies itself first                             aligned); a variable copies itself at its first update
JAX          aliased; its arrays never change                copied once, into memory JAX aliases (64-byte aligned)
Torch        aliased: an update meanwhile is seen            copied once, into memory Torch aliases
===========  ==============================================  ==================================================

Tensors on a GPU are copied to the host on leaving, and to the default device on arriving.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from dask_serializers.parcel import Stream, nbytes, np_dtype

__all__ = ["host", "read_array", "read_tensor"]


def host(tensor: Any, backend: str) -> tuple[str, tuple[int, ...], memoryview]:
    """Dtype, shape and bytes of a tensor or of an array; the bytes alias it where they can."""
    if backend == "torch" and hasattr(tensor, "detach"):
        import keras
        import torch

        dtype = keras.backend.standardize_dtype(tensor.dtype)
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        return dtype, tuple(tensor.shape), memoryview(flat.view(torch.uint8).numpy())
    # A variable of TensorFlow makes a copy for NumPy; the tensor read from it shares its memory.
    tensor = tensor.read_value() if hasattr(tensor, "read_value") else tensor
    if backend == "tensorflow" and tensor.ndim == 0 and not isinstance(tensor, np.ndarray):
        return of_array(np.asarray(tensor[None]).reshape(()))  # NumPy finds no array in a scalar of bfloat16
    return of_array(np.asarray(tensor))


def of_array(array: np.ndarray[Any, Any]) -> tuple[str, tuple[int, ...], memoryview]:
    """The same for a NumPy array."""
    if array.dtype.hasobject:
        raise TypeError(f"an array of dtype {array.dtype} holds Python objects")
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return array.dtype.name if array.dtype.kind != "U" else array.dtype.str, array.shape, memoryview(flat)


def read_array(stream: Stream, dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The stream's next array, for NumPy."""
    memory = stream.memory.take(nbytes(dtype, shape))
    stream.read(memory)
    array: np.ndarray[Any, Any] = memory.view(np_dtype(dtype)).reshape(shape)
    return array


def read_tensor(stream: Stream, dtype: str, shape: tuple[int, ...], backend: str) -> Any:
    """The stream's next array as a tensor of `backend`."""
    if backend == "tensorflow":
        return _read_tensorflow(stream, dtype, shape)
    if backend == "torch":
        return _read_torch(stream, dtype, shape)
    array = read_array(stream, dtype, shape)
    if backend == "jax":
        import jax.numpy

        return jax.numpy.asarray(array)
    return array


def _read_tensorflow(stream: Stream, dtype: str, shape: tuple[int, ...]) -> Any:
    import tensorflow as tf

    size = nbytes(dtype, shape)
    if size == 0 or dtype == "bool":
        return tf.constant(read_array(stream, dtype, shape))
    memory = stream.memory.take(size)
    stream.read(memory)
    tensor = tf.experimental.dlpack.from_dlpack(memory.__dlpack__())
    itemsize = size // prod(shape)
    return tf.bitcast(tf.reshape(tensor, [*shape, itemsize] if itemsize > 1 else shape), dtype)


def _read_torch(stream: Stream, dtype: str, shape: tuple[int, ...]) -> Any:
    import torch

    kind = getattr(torch, dtype)
    size = nbytes(dtype, shape)
    if size == 0:
        return torch.empty(shape, dtype=kind)
    memory = stream.memory.take(size)
    stream.read(memory)
    return torch.from_numpy(memory).view(kind).reshape(shape)
