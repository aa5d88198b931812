"""Training and prediction with XGBoost: dask_xgboost beside xgboost.dask and beside one process.

All get the same rows, the same parameters and as many threads in all, and take turns, so that what slows the machine
down slows all of them. CPU seconds are those of the workers and of this process together. *Cold*, nothing is on the
workers but the rows; *repeated*, what the training before has left: ours finds the binned matrix again, the others
are given their matrix ready. *Tiny* is what a training costs by itself.

Training is bound by XGBoost: binning the rows once, and a histogram over all rows for each level of each tree, from
memory; one process with all the threads does this without any network. Prediction is bound by walking the trees.

Run: python benchmarks/xgboost_train.py [--only cold,tiny,...] [--rows 1000000] [--repeats 5] [--workers 1,2,4]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from dask.utils import format_bytes
from distributed import Client, LocalCluster
from xgboost import dask as dxgb

from results import show
from xgboost_peers import (
    ALONE,
    DMATRIX,
    OURS,
    QUANTILE,
    Rows,
    arrays,
    dense_part,
    flights,
    ours,
    predictions,
    sparse_part,
    theirs,
    trainings,
    validations,
)

#: Of one thread each.
WORKERS = "2"

SECTIONS: dict[str, Callable[[Any], None]] = {}


def section(function: Callable[[Any], None]) -> Callable[[Any], None]:
    SECTIONS[function.__name__] = function
    return function


# Measuring


@contextmanager
def cluster(workers: int = 2) -> Iterator[Client]:
    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, memory_limit=0, dashboard_address=":0") as started,
        Client(started) as client,
    ):
        client.run(silence)
        yield client


def silence() -> None:
    """XGBoost says on every worker which rank it has, whatever its verbosity."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)


def cpu(client: Client) -> float:
    """Seconds that the workers, and this process, have computed for."""
    return sum(client.run(time.process_time).values()) + time.process_time()


def compare(title: str, client: Client, run: dict[str, Callable[[], Any]], repeats: int) -> None:
    """Time the contenders in turn, and show also processor time and log-loss."""
    times: dict[str, list[float]] = {name: [] for name in run}
    spent: dict[str, list[float]] = {name: [] for name in run}
    losses = {}
    for _ in range(1 + repeats):
        for name, call in run.items():
            before, start = cpu(client), time.perf_counter()
            losses[name] = call()
            times[name].append(time.perf_counter() - start)
            spent[name].append(cpu(client) - before)
            gc.collect()
    notes = {name: {"CPU s": f"{statistics.median(taken[1:]):.2f}"} for name, taken in spent.items()}
    for name, loss in losses.items():
        if isinstance(loss, float):
            notes[name]["log-loss"] = f"{loss:.5f}"
    found = {name: taken[1:] for name, taken in times.items()}
    show(title, "s", found, ours=OURS, limits=[name for name in found if ALONE in name], notes=notes)


def peak_begins() -> int:
    """Give free memory back, and count this process's peak from now on; what it has now, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _of_status("VmRSS")


def peak() -> int:
    return _of_status("VmHWM")


def _of_status(name: str) -> int:
    with open(f"/proc/{os.getpid()}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024


# Sections


def dense(client: Client, options: Any, parts: int = 8) -> Rows:
    return replace(arrays(client, dense_part, options.rows, options.columns, parts), rounds=options.rounds)


def compare_trainings(kind: str, options: Any, made: Callable[[Client], Rows], *, is_cold: bool = True) -> None:
    """On as many workers, of one thread each, as asked for, one number after the other."""
    for workers in map(int, options.workers.split(",")):
        with cluster(workers) as client:
            rows = replace(made(client), rounds=options.rounds, threads=workers)
            title = f"{kind}, {shape(rows)}, {rows.rounds} rounds"
            title += f", workers: {workers}" if options.workers != WORKERS else ""
            compare(title, client, trainings(rows, cold=is_cold), options.repeats)


@section
def cold(options: Any) -> None:
    """Nothing on the workers but the rows."""
    compare_trainings("cold", options, lambda client: dense(client, options))


@section
def repeated(options: Any) -> None:
    """The same data again."""
    compare_trainings("repeated", options, lambda client: dense(client, options), is_cold=False)


@section
def tiny(options: Any) -> None:
    """What a training costs by itself."""
    with cluster() as client:
        rows = replace(arrays(client, dense_part, 2000, 10, 8), rounds=1)
        repeats = 3 * options.repeats
        compare("tiny, 2000 x 10, 1 round, cold", client, trainings(rows), repeats)
        compare("tiny, 2000 x 10, 1 round, repeated", client, trainings(rows, cold=False), repeats)


@section
def memory(options: Any) -> None:
    """Peak of the workers above what they have once the rows are there; new workers for each."""
    found, notes = {}, {}
    contenders: dict[str, Callable[[Rows], Callable[[], float]]] = {
        OURS: ours,
        QUANTILE: lambda rows: theirs(rows, dxgb.DaskQuantileDMatrix),
        DMATRIX: lambda rows: theirs(rows, dxgb.DaskDMatrix),
    }
    for name, contender in contenders.items():
        with cluster() as client:
            contender(arrays(client, dense_part, 2000, 10, 8, here=False))()  # imports what there is to import
            rows = arrays(client, dense_part, options.rows, options.columns, 8, here=False)
            before = client.run(peak_begins)
            contender(replace(rows, rounds=options.rounds))()
            above = sum(client.run(peak).values()) - sum(before.values())
            raw = rows.features.nbytes
            found[name] = [above / 2**20]
            notes[name] = {"of the raw data": f"{above / raw:.2f}"}
    show(f"peak of the workers above the raw data, {format_bytes(raw)}", "MiB", found, ours=OURS, notes=notes)


@section
def predict(options: Any) -> None:
    """Predictions, left on the workers."""
    with cluster() as client:
        rows = dense(client, options)
        title = f"predict {shape(rows)}, {rows.rounds} trees"
        compare(title, client, predictions(rows, title), 3 * options.repeats)


@section
def wide(options: Any) -> None:
    """Many columns."""
    rows, columns = options.rows // 10, 40 * options.columns
    compare_trainings("wide", options, lambda client: arrays(client, dense_part, rows, columns, 8))


@section
def sparse(options: Any) -> None:
    """CSR, one value in a hundred."""
    columns = 20 * options.columns
    compare_trainings("sparse, 1 %", options, lambda client: arrays(client, sparse_part, options.rows, columns, 8))


@section
def categorical(options: Any) -> None:
    """Flights, with carriers and airports."""
    compare_trainings("categorical", options, lambda client: flights(client, options.copies))


@section
def cv(options: Any) -> None:
    """Five folds."""
    with cluster() as client:
        rows = dense(client, options, parts=10)
        compare(f"cv, 5 folds, {shape(rows)}, {rows.rounds} rounds", client, validations(rows, 5), options.repeats)


def shape(rows: Rows) -> str:
    return " x ".join(f"{size:,}" for size in rows.X.shape)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--columns", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--copies", type=int, default=20, help="of the flights")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", default=WORKERS, help="of the trainings; several numbers: how they grow")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"--only {','.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    for name in wanted:
        SECTIONS[name](options)


if __name__ == "__main__":
    main()
