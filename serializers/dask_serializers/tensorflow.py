"""TensorFlow's own tensors and variables."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from dask_serializers import tensors
from dask_serializers.hooks import forget
from dask_serializers.hooks import teach as teach_dispatcher
from dask_serializers.parcel import Parcel, arrive, leave

__all__ = ["rebuild", "teach", "unteach"]


#: Named, and not taken from a tensor: the first tensor would settle devices and collectives.
TYPES = (tf.__internal__.EagerTensor, tf.Variable)


def teach(serialize: Any, deserialize: Any, sizeof: Any) -> None:
    """Let Dask send tensors and variables as their bytes."""
    teach_dispatcher(serialize, TYPES, dumps)
    teach_dispatcher(deserialize, TYPES, arrive)
    teach_dispatcher(sizeof, TYPES, size)


def unteach(serialize: Any, deserialize: Any, sizeof: Any) -> None:
    """Undo :func:`teach`."""
    for dispatcher in (serialize, deserialize, sizeof):
        forget(dispatcher, TYPES)


def dumps(tensor: Any) -> tuple[dict[str, Any], list[Any]]:
    """Header and frames of a tensor or variable; one of the user's own type, or spread over devices, by pickle."""
    if isinstance(tensor, tf.Variable) and type(tensor).__name__ != "ResourceVariable":
        raise NotImplementedError
    return leave(lambda: take_apart(tensor), f"TensorFlow's {type(tensor).__name__}")


def take_apart(tensor: Any) -> Parcel:
    """The bytes of a tensor or variable."""
    described: dict[str, Any] = {"serialized": tensor.dtype in (tf.string, tf.variant)}
    if isinstance(tensor, tf.Variable):
        described["variable"] = {"trainable": tensor.trainable, "name": tensor.name.partition(":")[0]}
        tensor = tensor.read_value()
    array = np.frombuffer(tf.io.serialize_tensor(tensor).numpy(), np.uint8) if described["serialized"] else tensor
    return Parcel(
        kind="tensorflow",
        description={**described, "dtype": tensor.dtype.name},
        arrays=[tensors.host(array, "tensorflow")],
        versions={"tensorflow": tf.__version__},
    )


def rebuild(parcel: Parcel) -> Any:
    """The tensor or variable of a parcel."""
    assert parcel.stream is not None
    described = parcel.description
    ((dtype, shape),) = parcel.stream.specs
    if described["serialized"]:
        text = tensors.read_array(parcel.stream, dtype, shape).tobytes()
        value = tf.io.parse_tensor(text, described["dtype"])
    else:
        value = tensors.read_tensor(parcel.stream, dtype, shape, "tensorflow")
    return tf.Variable(value, **described["variable"]) if "variable" in described else value


def size(tensor: Any) -> int:
    """Bytes of a tensor or variable."""
    elements = int(np.prod(tensor.shape.as_list()))
    return 500 + (tensor.dtype.size or 50) * elements
