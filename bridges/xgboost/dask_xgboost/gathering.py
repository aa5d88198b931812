"""Arrays of all ranks, through XGBoost's communicator."""

from __future__ import annotations

from typing import Any

import numpy as np
from xgboost import collective

__all__ = ["all_gather"]


def all_gather(values: Any) -> Any:
    """Arrays of one dimension of all ranks, one after the other."""
    rank, world = collective.get_rank(), collective.get_world_size()
    if world == 1:
        return values
    lengths = np.zeros(world, dtype="int64")
    lengths[rank] = len(values)
    lengths = collective.allreduce(lengths, collective.Op.SUM)
    gathered = np.zeros(int(lengths.sum()), dtype=values.dtype)
    start = int(lengths[:rank].sum())
    gathered[start : start + len(values)] = values
    return collective.allreduce(gathered, collective.Op.SUM)
