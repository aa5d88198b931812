"""Keras 3 on Dask: train, evaluate and predict on the machines that hold the data.

>>> import dask_keras
>>> dask_keras.fit(client, model, X, y, batch_size=1024, epochs=3)        # doctest: +SKIP
>>> dask_keras.predict(client, model, X, batch_size=1024)                 # doctest: +SKIP
>>> dask_keras.evaluate(client, model, X, y, batch_size=1024)             # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

from dask_bridges import __version__

if TYPE_CHECKING:
    from dask_keras.evaluation import evaluate
    from dask_keras.fitting import fit
    from dask_keras.prediction import predict
    from dask_keras.replica import current

__all__ = ["__version__", "current", "evaluate", "fit", "predict"]

_HOMES = {"current": "replica", "evaluate": "evaluation", "fit": "fitting", "predict": "prediction"}


def __getattr__(name: str) -> Any:
    """Load what is asked for: importing the package alone loads neither Keras nor dask.dataframe."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"dask_keras.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
