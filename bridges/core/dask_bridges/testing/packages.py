"""Workers on which a package is missing, or is another version."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from typing import Any

from distributed import Client

from dask_bridges import placement

__all__ = ["another_version", "package_missing"]


def package_missing(client: Client, worker: str, package: str) -> contextlib.AbstractContextManager[None]:
    """Meanwhile, a worker cannot import a package, loaded before or not."""
    return _changed(client, worker, partial(_hide, package), partial(_show, package))


def another_version(client: Client, worker: str, package: str, version: str) -> contextlib.AbstractContextManager[None]:
    """Meanwhile, a worker has a version of a package and its builds, as far as its metadata says."""
    return _changed(client, worker, partial(_pretend, package, version), _tell_truth)


@contextlib.contextmanager
def _changed(client: Client, worker: str, change: Callable[[], None], back: Callable[[], None]) -> Iterator[None]:
    """A worker's process is changed, and the client knows nothing of what is installed there."""
    client.run(change, workers=[worker])
    placement._probed.pop(client, None)
    try:
        yield
    finally:
        client.run(back, workers=[worker])
        placement._probed.pop(client, None)


class _Missing:
    """A package is not installed."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.loaded = sys.modules.pop(package, None)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _hide(package: str) -> None:
    sys.meta_path.insert(0, _Missing(package))


def _show(package: str) -> None:
    (missing,) = [finder for finder in sys.meta_path if isinstance(finder, _Missing)]
    sys.meta_path.remove(missing)
    if missing.loaded is not None:
        sys.modules[package] = missing.loaded


def _pretend(package: str, version: str) -> None:
    real = metadata.version
    patched: Any = lambda name: version if package in name else real(name)  # noqa: E731
    patched.real = real
    vars(metadata)["version"] = patched


def _tell_truth() -> None:
    vars(metadata)["version"] = vars(metadata)["version"].real
