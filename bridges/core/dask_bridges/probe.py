"""What is installed on the workers: looked at before a gang is placed there.

Sent by value, since what it looks for includes this package itself.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from typing import Any

__all__ = ["look"]


def _versions(packages: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {"python": sys.executable}
    importlib.invalidate_caches()  # what was missing may have been installed since
    for package in packages:
        try:
            found[package] = {"version": getattr(importlib.import_module(package), "__version__", "")}
        except Exception as error:
            found[package] = {"error": f"{type(error).__name__}: {error}"}
    return found


async def look(packages: tuple[str, ...]) -> dict[str, Any]:
    """Versions (from the modules) of `packages` here, imported in a thread: the event loop stays free."""
    return await asyncio.to_thread(_versions, packages)
