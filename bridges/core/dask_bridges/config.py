"""Configuration: the defaults of ``dask-bridges.yaml``, read through ``dask.config``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask.config
import yaml
from dask.utils import parse_timedelta

__all__ = ["Deadlines", "get", "seconds", "set_defaults"]

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


@dataclass(frozen=True)
class Deadlines:
    """How long a gang waits for what, in seconds, each from the setting of its name.

    Attributes
    ----------
    start_timeout : float
        For all members to start.
    stop_timeout : float
        For a member in the worker's process to end; then its worker is restarted.
    child_stop_timeout : float
        For a member in a child process to end; then the child is killed.
    hang_timeout : float
        Without a heartbeat and without processor time; then a worker or child is taken for frozen.
    hang_timeout_without_nanny : float
        Without a heartbeat, where nobody can tell the worker's processor time.
    host_timeout : float
        Without a heartbeat and without an answer to connections; then the host is taken for gone.
    """

    start_timeout: float
    stop_timeout: float
    child_stop_timeout: float
    hang_timeout: float
    hang_timeout_without_nanny: float
    host_timeout: float

    @classmethod
    def configured(cls, **overrides: float | str | None) -> Deadlines:
        """From the configuration, but for those `overrides` that are not None."""
        return cls(**{name: seconds(name.replace("_", "-"), overrides.get(name)) for name in cls.__dataclass_fields__})
