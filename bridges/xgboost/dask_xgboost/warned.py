"""What is warned of before a training: models that depend on how rows are spread, and memory that will not do."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from dask.utils import format_bytes

from dask_bridges.placement import WorkerInfo
from dask_xgboost.datasets import Datasets

__all__ = ["warn_of_memory", "warn_of_objective"]

#: Objectives whose leaves XGBoost fits rank by rank and then averages.
_ADAPTIVE = ("reg:absoluteerror", "reg:quantileerror")


def warn_of_objective(objective: str, sets: Datasets, ranks: int) -> None:
    """Warn where XGBoost does with the rows of each rank what one process does with all."""
    if objective in _ADAPTIVE and ranks > 1:
        warnings.warn(
            f"{objective} on {ranks} workers: XGBoost fits leaf values on each worker's rows and averages "
            "them, so the model depends on how rows are spread. Shuffle the rows, or train on one worker "
            "(workers=[...]).",
            UserWarning,
            stacklevel=2,
        )
    if objective.startswith("rank:") and sets.matrix.has("weight") and ranks > 1:
        warnings.warn(
            f"{objective} with weights on {ranks} workers: XGBoost scales the weights of each worker's groups "
            "to a mean of 1, so the model depends on how groups are spread. Shuffle the groups, or train on one "
            "worker (workers=[...]).",
            UserWarning,
            stacklevel=2,
        )


def warn_of_memory(sets: Datasets, workers: Sequence[WorkerInfo]) -> None:
    """Warn of workers on which what is to be binned does not fit beside the partitions."""
    for worker in workers:
        parts = [matrix.parts for matrix in sets.each if not matrix.options.external_memory]
        # Binned, a matrix takes about as much again as its partitions; half of that with few bins.
        need = sum(p.nbytes_on(worker.address) for p in parts)
        free = worker.memory_limit - worker.memory
        if worker.memory_limit and need > free:
            warnings.warn(
                f"worker {worker.address} holds {format_bytes(need)} of partitions; their matrices need about "
                f"as much again, and {format_bytes(max(0, free))} of its {format_bytes(worker.memory_limit)} "
                "are free. Use more or larger workers, or it may be killed.",
                UserWarning,
                stacklevel=2,
            )
