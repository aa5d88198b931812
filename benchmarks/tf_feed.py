"""Rows a second from a spooled feed, beside TensorFlow's own datasets over arrays in memory.

320,000 rows of 128 float32 columns, in batches of 1024, once through, in this process. The feed reads them from files
in shared memory, as a role of a cluster has them; `from_tensor_slices` has them in one array of this process.

It is bound by copying a batch's rows, and by what TensorFlow spends on each batch. Shuffled, it is bound by random
access to memory: the feed draws from all rows, `shuffle` from a buffer of an eighth of them.

Run: python benchmarks/tf_feed.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dask_bridges.partitions import Part
from dask_bridges.processes.spool import Spool
from dask_tf.datasets import dataset
from dask_tf.encoding import look, merge, write
from results import show

PARTITIONS, ROWS, COLUMNS, BATCH = 8, 40_000, 128, 1024
REPEATS = 9
OURS, MEMORY = "feed", "from_tensor_slices"


def partitions() -> list[Part]:
    random = np.random.default_rng(0)
    return [
        {"X": random.random((ROWS, COLUMNS), dtype="float32"), "y": random.random(ROWS, dtype="float32")}
        for _ in range(PARTITIONS)
    ]


def in_memory(parts: Sequence[Part], shuffle: bool = False) -> Any:
    """What one process would use: all rows in one array."""
    import tensorflow as tf

    whole = tuple(np.concatenate([part[role] for part in parts]) for role in ("X", "y"))
    rows = tf.data.Dataset.from_tensor_slices(whole)
    return (rows.shuffle(ROWS) if shuffle else rows).batch(BATCH)


def one_pass(batches: Any) -> tuple[float, float]:
    """Millions of rows a second, and seconds of CPU time a million rows."""
    start, start_cpu, rows = time.perf_counter(), time.process_time(), 0
    for X, _ in batches:
        rows += X.shape[0]
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    assert rows == PARTITIONS * ROWS
    return rows / seconds / 1e6, cpu / rows * 1e6


def compare(ways: dict[str, Callable[[], Any]]) -> None:
    """Take turns, so that what else this machine does falls on all of them."""
    datasets = {label: make() for label, make in ways.items()}
    found: dict[str, list[tuple[float, float]]] = {label: [] for label in ways}
    for _ in range(REPEATS + 1):
        for label, batches in datasets.items():
            found[label].append(one_pass(batches))
    for how in ("", ", shuffled"):
        speeds, notes = {}, {}
        for label in (OURS + how, MEMORY + how):
            speeds[label], cpu = zip(*found[label][1:])
            notes[label] = {"CPU s a Mrow": f"{statistics.median(cpu):.2f}"}
        case = f"{COLUMNS} float32 columns, batches of {BATCH}{how}"
        show(case, "Mrows/s", speeds, ours=OURS + how, limits=[MEMORY + how], more=True, notes=notes)


def main() -> None:
    parts = partitions()
    schema = merge([look(part) for part in parts], ["X", "y"])
    with Spool("benchmark", budget=lambda: 2**31, overflow=tempfile.gettempdir()) as spool:
        start = time.perf_counter()
        with spool.writer("train") as writer:
            write(parts, schema, writer)
        seconds, size = time.perf_counter() - start, PARTITIONS * ROWS * schema.row_bytes
        print(f"spooled {size / 1e6:.0f} MB at {size / seconds / 1e6:.0f} MB/s\n")
        folder = str(spool.path / "train")
        compare(
            {
                MEMORY: lambda: in_memory(parts),
                f"{MEMORY}, shuffled": lambda: in_memory(parts, shuffle=True),
                OURS: lambda: dataset(folder, schema, BATCH),
                f"{OURS}, shuffled": lambda: dataset(folder, schema, BATCH, shuffle=True, seed=0),
            }
        )


if __name__ == "__main__":
    main()
