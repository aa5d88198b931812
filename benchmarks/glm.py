"""Logistic regression by L-BFGS: a gang with an all-reduce beside dask-glm, dask.array by hand, and SciPy alone.

All run SciPy's L-BFGS-B from zeros on the same rows, to the same loss. Ours is the bridge of
``notebooks/5-your-own-bridge.ipynb``. By hand is what dask-glm does, without it: one graph an evaluation. The
contenders take turns, so that what slows the machine down slows all of them. Beside the time stands the white space:
the share of the workers' time in which they compute nothing.

What bounds it is one evaluation of loss and gradient over all rows, from memory, times some twenty. What comes on top
is white space: a graph an evaluation goes through the scheduler, an all-reduce does not.

Run: python benchmarks/glm.py [--rows 1000000] [--columns 20] [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
from distributed import Client, LocalCluster, get_task_stream, wait
from scipy.optimize import minimize
from scipy.special import expit
from threadpoolctl import threadpool_limits

from dask_bridges.events import Event, Span
from results import missing, show

WORKERS = 2
OURS, ALONE = "a gang, all-reduce", "SciPy, one process and thread"
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "5-your-own-bridge.ipynb"

#: Weights of a run, and the seconds that workers computed in it, all together; None where no worker takes part.
Outcome = tuple[np.ndarray, float | None]


def bridge() -> Callable[..., Any]:
    """The function `logistic` of the notebook."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    (source,) = ["".join(cell["source"]) for cell in cells if "def logistic(" in "".join(cell["source"])]
    # As of a program's main module, what is defined here goes to the workers by value.
    names: dict[str, Any] = {"__name__": "__main__", "np": np}
    exec(compile(source, str(NOTEBOOK), "exec"), names)
    logistic: Callable[..., Any] = names["logistic"]
    return logistic


def make(client: Client, rows: int, columns: int) -> tuple[Any, Any, Any, Any]:
    """The data: distributed, and the same in this process."""
    chunk = rows // (4 * WORKERS)
    X = da.random.default_rng(0).normal(size=(rows, columns), chunks=(chunk, columns))
    chance = 1 / (1 + da.exp(-X @ np.linspace(-1, 1, columns)))
    y = (da.random.default_rng(1).random(rows, chunks=chunk) < chance).astype(float)
    X, y = client.persist([X, y])
    wait([X, y])
    return (*client.gather(client.compute([X, y])), X, y)


def loss_and_gradient(weights: Any, X: Any, y: Any) -> tuple[Any, Any]:
    """Of the rows of NumPy arrays."""
    z = X @ weights
    return np.logaddexp(0, z).sum() - y @ z, X.T @ (expit(z) - y)


def computing(stream: Any) -> float:
    """Seconds that tasks have computed, of what Dask's task stream has seen."""
    parts = (part for task in stream.data for part in task["startstops"])
    return float(sum(part["stop"] - part["start"] for part in parts if part["action"] == "compute"))


def contenders(case: str, client: Client, data: tuple[Any, Any, Any, Any]) -> dict[str, Callable[[], Outcome]]:
    X, y, dX, dy = data
    logistic = bridge()

    def ours() -> Outcome:
        events: list[Event] = []
        weights, _ = logistic(client, dX, dy, listen=events.append)
        return weights, sum(event.seconds for event in events if isinstance(event, Span) and event.kind == "compute")

    def by_hand() -> Outcome:
        def evaluate(weights: Any) -> Any:
            z = dX @ weights
            return dask.compute(da.logaddexp(0, z).sum() - dy @ z, dX.T @ (1 / (1 + da.exp(-z)) - dy))

        with get_task_stream(client) as stream:
            found = minimize(evaluate, np.zeros(dX.shape[1]), jac=True, method="L-BFGS-B")
        return found.x, computing(stream)

    def alone() -> Outcome:
        with threadpool_limits(1):
            found = minimize(loss_and_gradient, np.zeros(X.shape[1]), (X, y), jac=True, method="L-BFGS-B")
        return found.x, None

    run: dict[str, Callable[[], Outcome]] = {OURS: ours}
    if (theirs := dask_glm(case, client, dX, dy)) is not None:
        run["dask-glm, lbfgs"] = theirs
    return {**run, "dask.array by hand, a graph an evaluation": by_hand, ALONE: alone}


def dask_glm(case: str, client: Client, X: Any, y: Any) -> Callable[[], Outcome] | None:
    """Its lbfgs; None where it is missing, or does not run with this Dask."""
    try:
        from dask_glm.algorithms import lbfgs
    except ImportError as error:
        missing(case, "dask-glm, lbfgs", error)
        return None

    def fit() -> Outcome:
        with warnings.catch_warnings(), get_task_stream(client) as stream:
            warnings.simplefilter("ignore")  # it uses options that Dask and SciPy have renamed
            weights = lbfgs(X, y)
        return weights, computing(stream)

    try:
        fit()
    except Exception as error:  # whatever has changed under it
        missing(
            case, "dask-glm, lbfgs", f"it does not run with Dask {dask.__version__}: {type(error).__name__}: {error}"
        )
        return None
    return fit


def compare(case: str, run: dict[str, Callable[[], Outcome]], data: tuple[Any, ...], repeats: int) -> None:
    """Time the contenders in turn, and show also white space and loss."""
    for call in run.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in run}
    white: dict[str, list[float]] = {name: [] for name in run}
    weights: dict[str, Any] = {}
    for _ in range(repeats):
        for name, call in run.items():
            start = time.perf_counter()
            weights[name], busy = call()
            times[name].append(time.perf_counter() - start)
            if busy is not None:
                white[name].append(1 - busy / (WORKERS * times[name][-1]))
    losses = {name: loss_and_gradient(weights[name], *data[:2])[0] / len(data[1]) for name in run}
    notes = {name: {"loss": f"{loss:.9f}"} for name, loss in losses.items()}
    space = {name: statistics.median(shares) for name, shares in white.items() if shares}
    show(case, "s", times, ours=OURS, limits=[ALONE], notes=notes, white=space)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--columns", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with (
        LocalCluster(n_workers=WORKERS, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        data = make(client, options.rows, options.columns)
        case = f"{options.rows:,} x {options.columns}, L-BFGS to the same loss"
        compare(case, contenders(case, client, data), data, options.repeats)


if __name__ == "__main__":
    main()
