"""``dask bridges demo``: which flights arrive late, learned by a cluster and by one process.

The workers import this package for :mod:`~dask_xgboost.demo.flights`, so that it
loads nothing here: plots and scores are the business of
:mod:`~dask_xgboost.demo.main` on the client.
"""

__all__: list[str] = []
