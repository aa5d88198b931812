"""Keras 3 on Dask: train, evaluate and predict on the machines that hold the data."""

from dask_bridges import __version__

__all__ = ["__version__"]
