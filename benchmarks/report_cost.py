"""What a report costs: trainings with one beside trainings without, in turn, on the same workers.

While a training runs, it is the processor time of all workers and of the client. One per cent of that is less than
what it differs by from one training to the next, so members also tell MORE times as often as they do, and the
difference is divided by that. The page is written at the end, once, by the client.

It is bound by the messages of the members to the client: each tells what it did twice a second at most, and for not
more than a set share of its time.

Run: python benchmarks/report_cost.py [--pairs 5]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array as da
import psutil
from distributed import Client, LocalCluster

import dask_xgboost
from dask_bridges import tally, task
from dask_bridges.reporting import Recorder
from dask_bridges.testing import loopback
from results import show

ROWS, COLUMNS = 100_000, 30
#: How much more often members tell, so that it can be measured.
MORE = 50


class Watched(Recorder):
    """A recorder that takes down when the run was over, and what its page took."""

    over = 0.0
    used = 0.0
    page = 0.0

    def write(self, error: BaseException | None = None) -> None:
        self.over, self.used = time.perf_counter(), processor_time()
        super().write(error)
        self.page = time.perf_counter() - self.over


def processor_time() -> float:
    """Seconds of this process and of all its children, which are the workers and theirs."""
    me = psutil.Process(os.getpid())
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        times = process.cpu_times()
        total += times.user + times.system
    return total


def xgboost(client: Client, X: Any, y: Any) -> None:
    params = {"objective": "binary:logistic", "max_depth": 6, "nthread": 1, "eval_metric": "logloss"}
    dask_xgboost.train(client, params, X, y, evals=[(X, "train")], num_boost_round=80)


def small_rounds(client: Client, X: Any, y: Any) -> None:
    """The dearest for its length: two spans and some reads a round, which take a few milliseconds."""
    loopback.train(client, X, y, rounds=200)


def tell(times: float) -> None:
    """Have the members on this worker tell so many times as often."""
    tally.PERIOD, tally.SHARE = 0.5 / times, 1 / 400 / times
    task.WEIGH, task.WEIGH_SHARE = 0.5 / times, 1 / 200 / times


def measure(case: str, train: Callable[..., None], client: Client, X: Any, y: Any, folder: Path, pairs: int) -> None:
    """Trainings without a report, with one, and with one that is told much more, in turn."""
    used: dict[float, list[float]] = {0: [], 1: [], MORE: []}
    pages: list[float] = []
    train(client, X, y)
    for _ in range(pairs):
        for times in used:
            client.run(tell, times or 1)
            before = processor_time()
            if times:
                with Watched(folder / "run.html") as recorder:
                    train(client, X, y)
                used[times].append(recorder.used - before)
                if times == 1:
                    pages.append(recorder.page)
            else:
                train(client, X, y)
                used[times].append(processor_time() - before)
    without, with_one, with_more = (statistics.median(values) for values in used.values())
    ours, bare = "with a report", "without"
    told = {
        "costs": f"{100 * (with_one / without - 1):+.2f} %",
        f"costs, from {MORE} times as much": f"{100 * (with_more / without - 1) / MORE:+.3f} %",
        "page written in": f"{statistics.median(pages):.2f} s",
    }
    show(f"processor time of {case}", "s", {ours: used[1], bare: used[0]}, ours=ours, limits=[bare], notes={ours: told})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        rng = da.random.default_rng(0)
        X = rng.random((ROWS, COLUMNS), chunks=(ROWS // 8, COLUMNS)).astype("float32")
        y = (X[:, 0] + X[:, 1] * X[:, 2] > 0.8).astype("float32")
        X, y = client.persist([X, y])
        cases = {f"XGBoost, {ROWS:,} x {COLUMNS}, 80 rounds": xgboost, "200 rounds of a few milliseconds": small_rounds}
        for case, train in cases.items():
            measure(case, train, client, X, y, Path(folder), options.pairs)


if __name__ == "__main__":
    main()
