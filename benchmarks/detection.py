"""How long after a death its caller is told, and whether of the right cause: ours beside xgboost.dask.

From the moment of the deed, as the doer wrote it down, until the caller has the
error in hand. Deadlines are the defaults, except where the row names another.

Run: python benchmarks/detection.py [--seeds 20] [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle
import dask.config
import numpy as np
import xgboost as xgb
from distributed import Client, LocalCluster
from xgboost import collective
from xgboost import dask as dxgb

import dask_xgboost
from dask_bridges import MemberFailed, MemberLost
from dask_bridges.testing import Fault, command_line_cluster, leftovers, loopback
from dask_bridges.testing.clusters import cluster_of_hosts
from dask_bridges.testing.contract.base import make_data
from dask_bridges.testing.faults import Dated, crash, die, freeze, trouble, vanish
from dask_bridges.testing.hosts import missing_for_networks, network

WORKERS = 3
ROUNDS = 100_000
PARAMS = {"objective": "binary:logistic", "max_depth": 3, "eta": 0.5}
#: After so many seconds a caller that has not been told is not waited for any longer.
PATIENCE = 90


class Faulty(xgb.callback.TrainingCallback):
    """Calls a fault after each round."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        self.fault(rank=collective.get_rank(), round=epoch)
        return False


def in_worker(client: Client, X: Any, y: Any, fault: Any) -> Any:
    return loopback.train(client, X, y, rounds=ROUNDS, fault=fault)


def in_child(client: Client, X: Any, y: Any, fault: Any) -> Any:
    return loopback.train(client, X, y, rounds=ROUNDS, fault=fault, child=True)


def ours(client: Client, X: Any, y: Any, fault: Any) -> Any:
    callbacks = [Faulty(fault)]
    return dask_xgboost.train(
        client, PARAMS, X, y, num_boost_round=ROUNDS, callbacks=callbacks, progress=False, max_restarts=0
    )


def theirs(client: Client, X: Any, y: Any, fault: Any) -> Any:
    matrix = dxgb.DaskQuantileDMatrix(client, X, y)
    return dxgb.train(client, PARAMS, matrix, num_boost_round=ROUNDS, callbacks=[Faulty(fault)])


def is_cause(error: BaseException, rank: int, action: Callable[[], None]) -> bool:
    """Whether the error tells what was done: the user's exception, or the member that was lost."""
    if action is trouble:
        return "deliberate" in str(error) and getattr(error, "rank", rank) == rank
    return isinstance(error, MemberLost) and error.rank == rank


@dataclass
class Row:
    """What was measured of one kind of death."""

    label: str
    times: list[float] = field(default_factory=list)
    right: int = 0
    asked: int = 0

    def report(self) -> None:
        tell = sorted(self.times)
        figures = [np.median(tell), np.quantile(tell, 0.99), tell[-1]] if tell else [float("nan")] * 3
        print(f"{self.label:<58}" + "".join(f"{value:9.2f}" for value in figures) + f"{self.right:>7}/{self.asked}")
        sys.stdout.flush()


def measure(label: str, train: Callable[..., Any], action: Callable[[], None], seeds: int, **deadlines: str) -> None:
    """One kind of death, once a seed; a new cluster where the last caller was not told."""
    row, seed = Row(label), 0
    settings = {f"dask-bridges.{name.replace('_', '-')}": value for name, value in deadlines.items()}
    while seed < seeds:
        with dask.config.set(settings), cluster() as client, ThreadPoolExecutor(1) as pool:
            X, y = make_data()
            told = True
            while told and seed < seeds:
                told = once(row, client, pool, functools.partial(train, client, X, y), action, seed)
                seed += 1
                if told and train is not theirs:
                    assert leftovers(client) == {}
                client.wait_for_workers(WORKERS, timeout=60)
    row.report()


def once(
    row: Row, client: Client, pool: ThreadPoolExecutor, train: Callable[..., Any], action: Callable[[], None], seed: int
) -> bool:
    """Have it happen once; False if the caller was not told."""
    rank, round_ = random.Random(seed).randrange(WORKERS), random.Random(seed).randrange(4)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "when")
        row.asked += 1
        training = pool.submit(train, Fault(rank, round_, Dated(action, file)))
        try:
            training.result(PATIENCE)
        except TimeoutError:
            client.close()  # the thread ends with it
            with contextlib.suppress(BaseException):
                training.result(30)
            return False
        except Exception as error:
            row.times.append(time.time() - float(file.read_text()))
            row.right += is_cause(error, rank, action)
    return True


@contextlib.contextmanager
def cluster() -> Iterator[Client]:
    with (
        LocalCluster(
            n_workers=WORKERS, threads_per_worker=1, dashboard_address=":0", silence_logs=logging.CRITICAL
        ) as local,
        Client(local) as client,
    ):
        client.wait_for_workers(WORKERS, timeout=60)
        yield client


# Who calls, who schedules, and the network

_CALLER = """
import sys, cloudpickle
from distributed import Client
with open(sys.argv[2], "rb") as file:
    function = cloudpickle.load(file)
with Client(sys.argv[1], timeout=60) as client:
    function(client)
"""


def call(client: Client, up: Path) -> Any:
    """A training that says by a file when its first round is over."""
    client.wait_for_workers(2, timeout=60)
    X, y = make_data()
    return loopback.train(client, X, y, rounds=ROUNDS, fault=Fault(0, 0, Dated(int, up)))


def start_caller(address: str, folder: str) -> subprocess.Popen[bytes]:
    """A process that trains; back when it does."""
    file, up = Path(folder, "call"), Path(folder, "up")
    up.unlink(missing_ok=True)
    file.write_bytes(cloudpickle.dumps(functools.partial(call, up=up)))
    process = subprocess.Popen([sys.executable, "-c", _CALLER, address, str(file)], stderr=subprocess.DEVNULL)
    while not up.exists() and process.poll() is None:
        time.sleep(0.01)
    return process


def killed_callers(seeds: int) -> None:
    """Until the places of a killed client's gang are free."""
    row = Row("client killed: places free")
    with cluster() as client, tempfile.TemporaryDirectory() as folder:
        for _ in range(seeds):
            process = start_caller(client.scheduler.address, folder)
            start = time.time()
            process.kill()
            while leftovers(client):
                pass
            row.times.append(time.time() - start)
            row.asked, row.right = row.asked + 1, row.right + 1
            process.wait()
    row.report()


def killed_schedulers(seeds: int) -> None:
    row = Row("scheduler killed: caller told")
    for _ in range(seeds):
        with (
            command_line_cluster(workers=2) as killed,
            ThreadPoolExecutor(1) as pool,
            tempfile.TemporaryDirectory() as f,
        ):
            up = Path(f, "up")
            training = pool.submit(call, killed.client, up)
            while not up.exists():
                time.sleep(0.01)
            start = time.time()
            killed.scheduler.kill()
            row.asked += 1
            try:
                training.result(PATIENCE)
            except Exception as error:
                row.times.append(time.time() - start)
                row.right += isinstance(error, MemberLost) and "scheduler is gone" in str(error)
    row.report()


def see_lost_host(client: Client, up: Path, told: Path) -> None:
    try:
        call(client, up)
    except (MemberLost, MemberFailed) as error:
        told.write_text(f"{time.time()!r} {'host does not answer' in str(error)}")


def silent_hosts(seeds: int) -> None:
    row = Row("host silent (host-timeout 10 s)")
    if missing := missing_for_networks():
        print(f"{row.label}: not measured, {missing}")
        return
    for _ in range(seeds):
        with (
            network("one", "two") as hosts,
            cluster_of_hosts(hosts, "one", ["one", "two"]) as address,
            tempfile.TemporaryDirectory() as folder,
        ):
            file, up, told = (Path(folder, name) for name in ("call", "up", "told"))
            file.write_bytes(cloudpickle.dumps(functools.partial(see_lost_host, up=up, told=told)))
            process = subprocess.Popen(hosts.on("one", [sys.executable, "-c", _CALLER, address, str(file)]))
            while not up.exists() and process.poll() is None:
                time.sleep(0.01)
            start = time.time()
            hosts.unplug("two")
            process.wait(PATIENCE)
            when, right = told.read_text().split()
            row.times.append(float(when) - start)
            row.asked, row.right = row.asked + 1, row.right + (right == "True")
    row.report()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="leave out what takes a default deadline of 30 s")
    options = parser.parse_args()
    many, some, few = options.seeds, max(1, options.seeds // 2), max(1, options.seeds // 5)
    cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    print(f"{'seconds':<58}{'median':>9}{'p99':>9}{'max':>9}  right/asked")
    for place, train in (("loopback", in_worker), ("loopback in child processes", in_child), ("XGBoost", ours)):
        measure(f"{place}: a member raises", train, trouble, many)
        measure(f"{place}: SIGKILL", train, die, some)
        measure(f"{place}: segfault", train, crash, some)
        measure(f"{place}: os._exit(0)", train, vanish, some)
        measure(f"{place}: frozen (hang-timeout 3 s)", train, freeze, few, hang_timeout="3s")
    if not options.quick:
        measure("loopback: frozen (hang-timeout 30 s)", in_worker, freeze, 2)
        measure("loopback in child processes: frozen (hang-timeout 30 s)", in_child, freeze, 2)
    killed_callers(some)
    killed_schedulers(few)
    silent_hosts(few)
    measure("xgboost.dask: a member raises", theirs, trouble, many)
    measure("xgboost.dask: SIGKILL", theirs, die, few)


if __name__ == "__main__":
    main()
