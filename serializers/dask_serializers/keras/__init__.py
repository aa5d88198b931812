"""Keras objects: models, layers, optimizers, metrics and variables."""

from __future__ import annotations

from dask_serializers.keras.moving import rebuild, teach, unteach

__all__ = ["rebuild", "teach", "unteach"]
