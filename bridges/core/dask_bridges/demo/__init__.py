"""What the bridges' parts of ``dask bridges demo`` share: the flights, a stopwatch and a table.

The workers import this package for :mod:`~dask_bridges.demo.flights`, so that it
loads nothing here.
"""

__all__: list[str] = []
