"""How long after a death its caller is told, and whether of the right cause: ours beside xgboost.dask.

From the moment of the deed, as the doer wrote it down, until the caller has the error in hand. Deadlines are the
defaults, except where the case names another. Right is how often the error named the true cause: the member that was
lost, or the exception that it raised. Loopback is a bridge without a framework, with members in the workers and in
child processes of theirs.

It is bound by how a death is noticed: an exception is told at once, of a process its parent or the scheduler tells
that it is gone, and silence takes its deadline.

Run: python benchmarks/detection.py [--seeds 20] [--quick] [--patience 90]
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
from results import missing, show

WORKERS = 3
ROUNDS = 100_000
PARAMS = {"objective": "binary:logistic", "max_depth": 3, "eta": 0.5}
OURS, THEIRS, LOOPBACK = "dask_xgboost", "xgboost.dask", "loopback"


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

    #: After so many seconds a caller that has not been told is not waited for any longer.
    patience: float
    times: list[float] = field(default_factory=list)
    right: int = 0
    asked: int = 0

    @property
    def notes(self) -> dict[str, str]:
        said = {"max": f"{max(self.times):.2f}", "right": f"{self.right} of {self.asked}"}
        if untold := self.times.count(self.patience):
            said["not told"] = f"{untold} of {self.asked}, given up after {self.patience:.0f} s"
        return said


def tell(case: str, rows: dict[str, Row], *, head: bool = True) -> None:
    """Show what was measured of one kind of death, by who trained."""
    found = {name: row.times for name, row in rows.items()}
    notes = {name: row.notes for name, row in rows.items()}
    show(case, "s", found, ours=[name for name in rows if name != THEIRS], turns=False, notes=notes, head=head)


def measure(
    train: Callable[..., Any], action: Callable[[], None], seeds: int, patience: float, **deadlines: str
) -> Row:
    """One kind of death, once a seed; a new cluster where the last caller was not told."""
    row, seed = Row(patience), 0
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
    return row


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
            training.result(row.patience)
        except TimeoutError:
            row.times.append(row.patience)
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


def killed_callers(seeds: int, patience: float) -> Row:
    """Until the places of a killed client's gang are free."""
    row = Row(patience)
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
    return row


def killed_schedulers(seeds: int, patience: float) -> Row:
    row = Row(patience)
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
                training.result(patience)
            except TimeoutError:
                row.times.append(patience)
            except Exception as error:
                row.times.append(time.time() - start)
                row.right += isinstance(error, MemberLost) and "scheduler is gone" in str(error)
    return row


def see_lost_host(client: Client, up: Path, told: Path) -> None:
    try:
        call(client, up)
    except (MemberLost, MemberFailed) as error:
        told.write_text(f"{time.time()!r} {'host does not answer' in str(error)}")


def silent_hosts(case: str, seeds: int, patience: float) -> None:
    row = Row(patience)
    if lacking := missing_for_networks():
        missing(case, LOOPBACK, lacking)
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
            process.wait(patience)
            when, right = told.read_text().split()
            row.times.append(float(when) - start)
            row.asked, row.right = row.asked + 1, row.right + (right == "True")
    tell(case, {LOOPBACK: row}, head=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="leave out what takes a default deadline of 30 s")
    parser.add_argument("--patience", type=float, default=90, help="seconds after which a caller is given up")
    options = parser.parse_args()
    many, some, few = options.seeds, max(1, options.seeds // 2), max(1, options.seeds // 5)
    cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    trains = {OURS: ours, LOOPBACK: in_worker, f"{LOOPBACK}, child processes": in_child}
    patience = options.patience
    for case, action, seeds, deadlines in (
        ("a member raises", trouble, many, {}),
        ("a worker is killed by SIGKILL", die, some, {}),
        ("a segfault", crash, some, {}),
        ("os._exit(0)", vanish, some, {}),
        ("frozen, hang-timeout 3 s", freeze, few, {"hang_timeout": "3s"}),
    ):
        rows = {name: measure(train, action, seeds, patience, **deadlines) for name, train in trains.items()}
        if action in (trouble, die):
            rows[THEIRS] = measure(theirs, action, many if action is trouble else few, patience)
        tell(case, rows, head=THEIRS in rows)
    if not options.quick:
        loopbacks = {name: train for name, train in trains.items() if train is not ours}
        rows = {name: measure(train, freeze, 2, patience) for name, train in loopbacks.items()}
        tell("frozen, hang-timeout 30 s", rows, head=False)
    tell("the client is killed: places are free", {LOOPBACK: killed_callers(some, patience)}, head=False)
    tell("the scheduler is killed: the caller is told", {LOOPBACK: killed_schedulers(few, patience)}, head=False)
    silent_hosts("a host is silent, host-timeout 10 s", few, patience)


if __name__ == "__main__":
    main()
