"""Configuration: the defaults of ``dask-bridges.yaml``, read through ``dask.config``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.config
import yaml
from dask.utils import parse_timedelta

__all__ = ["get", "seconds", "set_defaults"]

_DEFAULTS = Path(__file__).with_name("dask-bridges.yaml")


def set_defaults() -> None:
    """Give ``dask.config`` our defaults; the user's files and environment win."""
    dask.config.update_defaults(yaml.safe_load(_DEFAULTS.read_text()))


def get(key: str, override: Any = None) -> Any:
    """The value of ``dask-bridges.<key>``, or `override` where that is not None.

    >>> from dask_bridges import config
    >>> config.get("allow-plaintext")
    False
    """
    return dask.config.get(f"dask-bridges.{key}") if override is None else override


def seconds(key: str, override: str | float | None = None) -> float:
    """The duration of ``dask-bridges.<key>`` (or of `override`) in seconds.

    >>> from dask_bridges import config
    >>> config.seconds("wait-notice", "500ms")
    0.5
    """
    return float(parse_timedelta(get(key, override)))
