"""What is installed where a process runs. Sent by value: what is looked for includes this package itself."""

from __future__ import annotations

import asyncio
import os
import platform
from typing import Any

from dask_bridges.probe import versions

__all__ = ["look", "look_aside", "look_at_scheduler"]


def look(packages: tuple[str, ...], variables: tuple[str, ...]) -> dict[str, Any]:
    """Python and its place, versions as the installation tells them, and environment variables; nothing is imported."""
    found = versions(packages, False)
    return {
        "release": platform.python_version(),
        "python": found.pop("python"),
        "packages": found,
        "variables": {name: os.environ.get(name) for name in variables},
    }


async def look_aside(packages: tuple[str, ...], variables: tuple[str, ...]) -> dict[str, Any]:
    """`look` in a thread: the event loop stays free."""
    return await asyncio.to_thread(look, packages, variables)


def look_at_scheduler(packages: tuple[str, ...], variables: tuple[str, ...], dask_scheduler: Any) -> dict[str, Any]:
    """`look`, and which calls the scheduler "refuses"."""
    return {**look(packages, variables), "refuses": list(dask_scheduler.blocked_handlers)}
