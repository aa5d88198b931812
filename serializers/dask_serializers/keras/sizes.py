"""How much memory Keras objects take, as Dask asks it: counted, nothing copied."""

from __future__ import annotations

from typing import Any

import keras

from dask_serializers.parcel import nbytes

__all__ = ["size"]

OBJECT = 2000  # bytes; roughly what a layer's or variable's Python objects take


def size(obj: Any) -> int:
    """Bytes of the weights, states, optimizer slots and metrics of a Keras object."""
    if isinstance(obj, keras.Variable):
        return OBJECT + nbytes(str(obj.dtype), tuple(obj.shape))
    variables = {id(v): v for v in (*obj.variables, *_of_optimizers(obj))}
    return OBJECT + sum(OBJECT + nbytes(keras.backend.standardize_dtype(v.dtype), v.shape) for v in variables.values())


def _of_optimizers(obj: Any) -> list[Any]:
    found = list(vars(obj).values()) if isinstance(obj, keras.Model) else []
    return [v for each in found if isinstance(each, keras.Optimizer) for v in each.variables]
