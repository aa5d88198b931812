"""What people are told of a gang beside its events: what it was asked to do, with what, on which data."""

from __future__ import annotations

import html
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

__all__ = ["About", "card"]

#: Longest text of a parameter.
LONGEST = 300


@dataclass(frozen=True)
class About:
    """What a report tells of a gang.

    Attributes
    ----------
    run : str
        What the attempts of one call have in common.
    params : mapping
        What the caller has asked for.
    packages : sequence of str
        Import names of those whose versions matter.
    sets : mapping of str to mapping
        Where the partitions of each set lie, see `Partitions.lying`.
    """

    run: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    packages: Sequence[str] = ()
    sets: Mapping[str, Mapping[str, list[int]]] = field(default_factory=dict)

    @property
    def told(self) -> dict[str, str]:
        """The parameters as text; those that are None are left out."""
        return {str(name): _short(value) for name, value in self.params.items() if value is not None}

    @property
    def versions(self) -> dict[str, str]:
        """Versions here, which those of the workers are checked against before a gang starts."""
        found = {"python": platform.python_version()}
        for package in ("dask_bridges", "dask", "distributed", *self.packages):
            found[package] = _version(package)
        return found


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _version(package: str) -> str:
    """Of a package, imported or not, in its light build or the other."""
    if (module := sys.modules.get(package)) is not None and hasattr(module, "__version__"):
        return str(module.__version__)
    for name in (package, f"{package}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def card(caption: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table for notebooks."""
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><caption>{html.escape(caption)}</caption><tr>{top}</tr>{body}</table>"
