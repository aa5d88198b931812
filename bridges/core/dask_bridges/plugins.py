"""What the bridges add to the core, found by entry point: to the command line, and to the processes of jobs.

A bridge names one :class:`Plugin` in the entry-point group
``dask_bridges.plugins``. The core knows none of them by name, and a plugin says
by text where its code is, so that finding it loads no framework.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["GROUP", "Checkup", "Children", "Demo", "DemoOptions", "Extra", "Plugin", "Scores", "installed"]

GROUP = "dask_bridges.plugins"

Scores = dict[str, dict[str, float]]
"""How well the held-out rows are guessed: the value of each metric, by who guessed."""


@dataclass(frozen=True)
class Extra:
    """An extra of dask-bridges, and what a plugin needs from it."""

    name: str
    """As in ``pip install "dask-bridges[name]"``."""
    packages: tuple[str, ...]
    """Import names of the top-level packages that are needed from it."""

    def missing(self) -> tuple[str, ...]:
        """The packages that are not installed here; none is imported to find out."""
        return tuple(package for package in self.packages if find_spec(package) is None)


@dataclass(frozen=True)
class DemoOptions:
    """What the user asked of ``dask bridges demo``."""

    output: Path
    """Folder the demo writes to; it exists."""
    rows: int | None = None
    """About how many rows of the data to use; None for all."""
    rounds: int | None = None
    """At most how many boosting rounds to train; None for the demo's own number."""
    epochs: int | None = None
    """At most how many epochs to train; None for the demo's own number."""
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What the parts before this one returned, to be shown beside its own."""


@dataclass(frozen=True)
class Demo:
    """A bridge's part of ``dask bridges demo``."""

    summary: str
    """What it shows, for the help text: one line."""
    run: str
    """``"module:function"``, called with a client and :class:`DemoOptions`; it may return :data:`Scores`."""
    extras: tuple[Extra, ...] = ()
    """What has to be installed on the client."""
    place: int = 0
    """Parts run in the order of this number, and of their plugins' names where it is the same."""

    def unmet(self) -> str:
        """What is missing here and how to install it, in one line; empty when nothing is.

        Only the extras that are incomplete are named: who has a framework's
        CPU build is not told to install its other build over it.

        >>> from dask_bridges.plugins import Demo, Extra
        >>> Demo("", "", (Extra("demo", ("no_such_package",)),)).unmet()
        'no_such_package is not installed; run: pip install "dask-bridges[demo]"'
        """
        gaps = {extra.name: extra.missing() for extra in self.extras if extra.missing()}
        if not gaps:
            return ""
        packages = [package for missing in gaps.values() for package in missing]
        verb = "is" if len(packages) == 1 else "are"
        return f'{", ".join(packages)} {verb} not installed; run: pip install "dask-bridges[{",".join(gaps)}]"'

    def load(self) -> Callable[[Client, DemoOptions], Scores | None]:
        """Import the function that :attr:`run` names."""
        return cast("Callable[[Client, DemoOptions], Scores | None]", resolve_name(self.run))


@dataclass(frozen=True)
class Children:
    """How processes are set up in which a bridge's framework will work."""

    modules: tuple[str, ...]
    """What is imported before they are forked, where the client has imported it too."""
    variables: str = ""
    """``"module:function"``, called on the client: the environment variables for it, None for one to be removed."""
    memory: str = ""
    """``"module:function"``, called in the process with a number of bytes as soon as the first of `modules` is
    imported there: no more memory than that is used on each device."""


@dataclass(frozen=True)
class Checkup:
    """What ``dask bridges doctor`` looks at for a bridge."""

    packages: tuple[str, ...]
    """Import names of what the workers need, in the client's versions, where the client has it."""
    extra: str = ""
    """The extra of dask-bridges that brings them."""
    versions: tuple[str, ...] = ()
    """Import names of what they need not have, but in the client's version if they do."""
    variables: tuple[str, ...] = ()
    """Environment variables that must be the same on client and workers."""
    ports: tuple[str, ...] = ()
    """Settings below ``dask-bridges`` that name ports, of which one has to be free on a worker's host."""


@dataclass(frozen=True)
class Plugin:
    """What one bridge adds.

    Examples
    --------
    >>> from dask_bridges.plugins import Demo, Plugin
    >>> PLUGIN = Plugin("mine", demo=Demo("trains mine", "my_bridge.demo:run"))
    """

    name: str
    demo: Demo | None = None
    children: Children | None = None
    checkup: Checkup | None = None


def installed() -> tuple[list[Plugin], list[str]]:
    """The plugins installed here, by name, and a complaint for each that cannot be used.

    One bad plugin leaves the others usable, so what is wrong is returned, not
    raised.
    """
    plugins: list[Plugin] = []
    complaints: list[str] = []
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            plugin = entry.load()
        except Exception as error:  # whatever a foreign module raises while it is imported
            complaints.append(f"plugin {entry.name} ({entry.value}) cannot be loaded: {error}")
            continue
        if isinstance(plugin, Plugin):
            plugins.append(plugin)
        else:
            kind = type(plugin).__name__
            complaints.append(f"plugin {entry.name} ({entry.value}) is no dask_bridges Plugin but a {kind}")
    return plugins, complaints
