"""Control groups with little memory, where the kernel kills whoever uses more."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["control_group", "use_too_much"]


@contextlib.contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """A control group of that many bytes."""
    for root, setting in (
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),  # version 1
        ("/sys/fs/cgroup", "memory.max"),
    ):
        group = Path(root, f"dask-bridges-{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / setting).exists():
                (group / setting).write_text(str(limit))
                yield group
                return
        finally:
            group.rmdir()
    pytest.skip("needs the right to make a control group with a limit of memory")


def use_too_much(group: str) -> None:
    """Move this process into a control group, and use more than is allowed there."""
    Path(group, "cgroup.procs").write_text(str(os.getpid()))
    bytearray(b"x") * 200_000_000
