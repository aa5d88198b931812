"""Training and prediction with XGBoost: dask_xgboost beside xgboost.dask and beside one process.

All three get the same rows, the same parameters and as many threads in all. The
contenders take turns, so that what slows the machine down slows all of them.

Run: python benchmarks/xgboost_train.py [--rows 300000] [--columns 50] [--rounds 30] [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import dask.array as da
import numpy as np
import xgboost as xgb
from distributed import Client, LocalCluster, wait
from xgboost import dask as dxgb

import dask_xgboost

WORKERS = 2
PARAMS = {"objective": "binary:logistic", "eval_metric": "logloss", "max_depth": 6, "tree_method": "hist"}


def make(client: Client, rows: int, columns: int) -> tuple[Any, Any, Any, Any]:
    """The data: distributed, and the same in this process."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(rows, columns)).astype("float32")
    y = (X[:, :5].sum(axis=1) + rng.normal(size=rows) > 0).astype("float32")
    chunk = rows // (4 * WORKERS)
    dX, dy = client.persist([da.from_array(X, chunks=(chunk, columns)), da.from_array(y, chunks=chunk)])
    wait([dX, dy])
    return X, y, dX, dy


def contenders(client: Client, data: tuple[Any, Any, Any, Any], rounds: int) -> dict[str, Callable[[], Any]]:
    X, y, dX, dy = data

    def ours() -> Any:
        return dask_xgboost.train(
            client, PARAMS, dX, dy, num_boost_round=rounds, evals=[(dX, "train")], evals_result={}, progress=False
        )

    def theirs(matrix: Any) -> Callable[[], Any]:
        def train() -> Any:
            dtrain = matrix(client, dX, dy)
            result = dxgb.train(client, PARAMS, dtrain, num_boost_round=rounds, evals=[(dtrain, "train")])
            return result["booster"]

        return train

    def alone() -> Any:
        dtrain = xgb.QuantileDMatrix(X, y, nthread=WORKERS)
        params = {**PARAMS, "nthread": WORKERS}
        return xgb.train(params, dtrain, rounds, evals=[(dtrain, "train")], verbose_eval=False)

    return {
        "dask_xgboost": ours,
        "xgboost.dask, QuantileDMatrix": theirs(dxgb.DaskQuantileDMatrix),
        "xgboost.dask, DMatrix": theirs(dxgb.DaskDMatrix),
        f"one process, {WORKERS} threads": alone,
    }


def predictors(client: Client, data: tuple[Any, Any, Any, Any], booster: xgb.Booster) -> dict[str, Callable[[], Any]]:
    X, _, dX, _ = data

    def done(collection: Any) -> None:
        wait(client.persist(collection))

    return {
        "dask_xgboost": lambda: done(dask_xgboost.predict(client, booster, dX)),
        "xgboost.dask, inplace_predict": lambda: done(dxgb.inplace_predict(client, booster, dX)),
        f"one process, {WORKERS} threads": lambda: booster.inplace_predict(X),
    }


def compare(title: str, run: dict[str, Callable[[], Any]], repeats: int) -> None:
    """Time the contenders in turn; print medians, quartiles, and the ratio to the first, run by run."""
    for call in run.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(repeats):
        for name, call in run.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    first = next(iter(times.values()))
    print(f"\n{title:<48}{'median s':>10}{'q1':>8}{'q3':>8}{'of ours':>9}")
    for name, taken in times.items():
        low, _, high = statistics.quantiles(taken, n=4)
        ratio = statistics.median(b / a for a, b in zip(first, taken))
        print(f"  {name:<46}{statistics.median(taken):>10.3f}{low:>8.3f}{high:>8.3f}{ratio:>9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--columns", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with (
        LocalCluster(n_workers=WORKERS, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        data = make(client, options.rows, options.columns)
        run = contenders(client, data, options.rounds)
        compare(f"train {options.rows} x {options.columns}, {options.rounds} rounds", run, options.repeats)
        booster = run["dask_xgboost"]()
        compare(f"predict {options.rows} rows", predictors(client, data, booster), options.repeats)
        tiny = make(client, 2000, 10)
        compare("train 2000 x 10, 1 round", contenders(client, tiny, 1), 3 * options.repeats)


if __name__ == "__main__":
    main()
