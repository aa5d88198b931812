"""Move Keras models, TensorFlow tensors and XGBoost boosters through Dask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dask_serializers.standin import CannotMove

if TYPE_CHECKING:
    from dask_serializers.registration import register, unregister

__all__ = ["CannotMove", "register", "unregister"]


def __getattr__(name: str) -> Any:
    # Dask imports this package while it is itself half imported (entry point `dask.sizeof`).
    if name in ("register", "unregister"):
        from dask_serializers import registration

        return getattr(registration, name)
    raise AttributeError(name)
