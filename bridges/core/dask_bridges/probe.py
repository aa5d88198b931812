"""What is installed on the workers: looked at before a gang is placed there.

Sent by value, since what it looks for includes this package itself.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from typing import Any

__all__ = ["look", "versions"]

#: Distributions by import name; by process, and by when the folders of `sys.path` were changed.
_found: dict[tuple[Any, ...], Any] = {}


def versions(packages: tuple[str, ...], imports: bool) -> dict[str, Any]:
    """For each package its "version" or the "error", and which "python" it was looked for with."""
    found: dict[str, Any] = {"python": sys.executable}
    importlib.invalidate_caches()  # what was missing may have been installed since
    for package in packages:
        try:
            found[package] = {"version": _imported(package) if imports else _installed(package)}
        except Exception as error:
            found[package] = {"error": f"{type(error).__name__}: {error}"}
    return found


def _imported(package: str) -> str:
    return str(getattr(importlib.import_module(package), "__version__", ""))


def _installed(package: str) -> str:
    """The version of a package that may not be imported here."""
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    # By process: this module is sent by value, with what was found where it comes from.
    asked = (os.getpid(), *(os.stat(folder).st_mtime_ns for folder in sys.path if os.path.isdir(folder)))
    if asked not in _found:  # it takes most of a second
        _found[asked] = importlib.metadata.packages_distributions()
    builds = sorted(_found[asked].get(package, [package]))  # an editable installation names none
    try:
        return importlib.metadata.version(builds[0])
    except importlib.metadata.PackageNotFoundError:
        return ""


async def look(packages: tuple[str, ...], imports: bool = True) -> dict[str, Any]:
    """`versions` here, found in a thread: the event loop stays free."""
    return await asyncio.to_thread(versions, packages, imports)
