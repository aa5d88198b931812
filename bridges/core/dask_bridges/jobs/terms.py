"""What a job asks for beside its call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dask.utils import parse_bytes

__all__ = ["Terms"]


@dataclass(frozen=True)
class Terms:
    """See `DevicePool.submit`.

    Attributes
    ----------
    gpus : float
    memory : int or str, optional
    priority, retries : int
    env : mapping of str to str, optional

    Raises
    ------
    ValueError
        If `gpus` or `memory` is no such number.
    """

    gpus: float
    memory: int | str | None
    priority: int
    retries: int
    env: Mapping[str, str] | None

    def __post_init__(self) -> None:
        if not _can_be_had(self.gpus):
            raise ValueError(f"gpus={self.gpus!r}: pass how many devices, or 1/2, 1/4, 1/8, … for a share of one")
        if self.limit < 0:
            raise ValueError(f"memory={self.memory!r}: pass a number of bytes, or a text such as '8 GiB'")

    @property
    def limit(self) -> int:
        """Most bytes of each device; 0 for no limit."""
        try:
            return int(parse_bytes(self.memory)) if self.memory is not None else 0
        except (ValueError, TypeError, AttributeError):
            return -1


def _can_be_had(gpus: Any) -> bool:
    if not isinstance(gpus, int | float) or isinstance(gpus, bool) or not math.isfinite(gpus) or gpus <= 0:
        return False
    return bool(gpus == int(gpus) if gpus > 1 else gpus == 1 or math.frexp(gpus)[0] == 0.5)
