"""Keras 3 on Dask: train, evaluate and predict on the machines that hold the data."""

from dask_bridges import __version__
from dask_keras.fitting import fit

__all__ = ["__version__", "fit"]
