"""Partitions written to the spool and read from it, beside one copy of the same bytes in memory.

A bridge with child processes writes the partitions of a worker once, to files in shared memory, and the children map
them. Here 256 MiB of float32 are written in partitions of 8 MiB, and read by one copy into a batch's memory.

It is bound by memory: by copies into pages that the process has not touched before, which the kernel has to clear
first, and by copies into pages that it has.

Run: python benchmarks/spool.py
"""

from __future__ import annotations

import mmap
import tempfile
import time
from collections.abc import Callable

import numpy as np

from dask_bridges.processes.spool import Spool, read_array
from results import show

REPEATS = 15
PART, PARTS = 8 * 2**20, 32
TOTAL = PART * PARTS
READ, TURNED = "read_array, and a copy to touched memory", "Writer.array, of Fortran order"


def partitions() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.random((PART // 4 // 128, 128), dtype="float32") for _ in range(PARTS)]


def to_fresh_memory(parts: list[np.ndarray]) -> list[mmap.mmap]:
    """One copy into memory that the process has not touched before, as any receiver has it."""
    copies = []
    for part in parts:
        memory = mmap.mmap(-1, part.nbytes)
        np.copyto(np.frombuffer(memory, part.dtype).reshape(part.shape), part)
        copies.append(memory)
    return copies


def to_touched_memory(parts: list[np.ndarray], touched: list[np.ndarray]) -> None:
    for part, target in zip(parts, touched):
        np.copyto(target, part)


def to_spool(parts: list[np.ndarray], spool: Spool) -> None:
    with spool.writer("train") as writer:
        for number, part in enumerate(parts):
            writer.array(f"X-{number}", part)


def from_spool(spool: Spool, into: list[np.ndarray]) -> None:
    """As a child reads it: mapped, and copied once into the memory of its batch."""
    for number, target in enumerate(into):
        np.copyto(target, read_array(spool.path / "train" / f"X-{number}", target.dtype, target.shape))


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    kept = function()
    passed = time.perf_counter() - start
    del kept  # with the clock stopped
    return passed


def main() -> None:
    parts, touched = partitions(), partitions()
    turned = [np.asfortranarray(part) for part in parts]
    rates: dict[str, list[float]] = {}
    with Spool("benchmark", budget=lambda: 4 * TOTAL, overflow=tempfile.gettempdir()) as spool:
        ways: dict[str, Callable[[], object]] = {
            "memcpy to fresh memory": lambda: to_fresh_memory(parts),
            "memcpy to touched memory": lambda: to_touched_memory(parts, touched),
            "Writer.array": lambda: to_spool(parts, spool),
            READ: lambda: from_spool(spool, touched),
            TURNED: lambda: to_spool(turned, spool),
        }
        for turn in range(REPEATS + 1):  # all ways in turn: the machine's moods are theirs alike
            for label, way in ways.items():
                if label.startswith("Writer"):
                    spool.drop("train")
                passed = seconds(way)
                if turn:
                    rates.setdefault(label, []).append(TOTAL / 2**30 / passed)
    pairs = [
        ("partitions written", "Writer.array", "memcpy to fresh memory", True),
        ("partitions written, column by column in memory", TURNED, "memcpy to fresh memory", False),
        ("partitions read", READ, "memcpy to touched memory", True),
    ]
    for case, ours, limit, head in pairs:
        both = {name: rates[name] for name in (ours, limit)}
        show(case, "GiB/s", both, ours=ours, limits=[limit], more=True, head=head)


if __name__ == "__main__":
    main()
