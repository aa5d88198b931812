"""Members that work with TensorFlow in children of their workers keep the contract of all bridges."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from distributed import Client

from dask_bridges import clients, config, partitions, placement
from dask_bridges.gang import Gang, GangPlan
from dask_bridges.processes import ChildMember, Environment
from dask_bridges.processes.host import Child
from dask_bridges.processes.spool import Spool
from dask_bridges.task import WorkerMember
from dask_bridges.testing.contract import BridgeContract, FailureContract, RunContract
from dask_bridges.testing.contract.base import Contract
from dask_bridges.testing.faults import call_at
from dask_tf import encoding
from dask_tf.schema import Schema

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(sys.platform != "linux", reason="child processes need Linux"),
    pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs TensorFlow"),
]

TENSORFLOW = Environment(("tensorflow",), (("TF_CPP_MIN_LOG_LEVEL", "3"),))
FOLDER = 200


@dataclass(frozen=True)
class Spec:
    keys: tuple[Any, ...]
    schema: Schema
    rounds: int
    fault: Callable[..., None] | None


@dataclass(frozen=True)
class Result:
    """The sum of X times y over all rows and rounds, the rounds, and the rows of each rank."""

    total: float
    rounds: int
    rows: list[int]


def host(member: WorkerMember, spec: Spec) -> tuple[float, int]:
    """A member's function: its partitions go to files that its child reads."""
    budget = functools.partial(int, 2**30)
    with Spool(f"{member.gang}-{member.rank}", budget=budget, overflow=member.worker.local_directory) as spool:
        with spool.writer("train") as writer:
            encoding.write((partitions.take(member.worker, key) for key in spec.keys), spec.schema, writer)
        descriptor = os.open(spool.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with Child(member, TENSORFLOW, {FOLDER: descriptor}) as child:
                result: tuple[float, int] = child.run(work, spec)
                return result
        finally:
            os.close(descriptor)


def work(member: ChildMember, spec: Spec) -> tuple[float, int]:
    """In the child: TensorFlow sums what it reads."""
    import tensorflow as tf

    from dask_tf.datasets import dataset

    rows = dataset(f"/proc/self/fd/{FOLDER}/train", spec.schema, 32)
    start = (tf.zeros((), tf.float64), tf.zeros((), tf.int64))
    total, count = 0.0, 0
    call_at(spec.fault, member.rank, -1)
    for round_ in range(spec.rounds):
        member.check()
        local, counted = rows.reduce(start, add)
        count = int(counted.numpy())
        total += sum(member.exchange(float(local.numpy())))
        if member.rank == 0:
            member.progress(round_ + 1, spec.rounds)
        call_at(spec.fault, member.rank, round_)
    return total, count


def add(state: Any, batch: Any) -> Any:
    import tensorflow as tf

    (total, count), (X, y) = state, batch
    return total + tf.cast(tf.reduce_sum(X * y[:, None]), tf.float64), count + tf.shape(y, tf.int64)[0]


class TensorFlowMembers(Contract):
    ends_within = 5

    def train(
        self,
        client: Client | None,
        X: Any,
        y: Any,
        *,
        rounds: int = 1,
        workers: str | Sequence[str] | None = None,
        fault: Callable[..., None] | None = None,
        timeout: float | str | None = None,
        **options: Any,
    ) -> Any:
        client = clients.current(client)
        prepared = partitions.prepare(client, {"X": X, "y": y})

        async def run() -> Result:
            chosen = await placement.usable_workers(client, workers, config.seconds("timeout", timeout))
            places = [worker.address for worker in chosen]
            parts = await partitions.load(client, prepared, workers=workers and places, inspect=encoding.look)
            places = [worker.address for worker in await placement.usable_workers(client, workers)]
            await placement.check_packages(client, places, ["dask_bridges"])
            await parts.spread(client, places)
            schema = encoding.merge([info.extra for info in parts.infos], ("X", "y"))
            ranks = parts.holding()
            specs = [Spec(parts.keys_on(worker), schema, rounds, fault) for worker in ranks]
            plan = GangPlan("TensorFlow members", host, specs, ranks, timeout=timeout, **options)
            results = await Gang(client, plan).run()
            return Result(results[0][0], rounds, [rows for _, rows in results])

        return clients.call(client, run)

    def check(self, result: Any, X: Any, y: Any) -> None:
        alone, labels = X.compute(), y.compute()
        assert result.total == result.rounds * float((alone * labels[:, None]).sum())
        assert sum(result.rows) == len(alone)
        assert all(result.rows)


@pytest.mark.slow
class TestTensorFlowMembers(TensorFlowMembers):
    """The heart of the contract, on the shared workers."""

    test_trains_on_worker_processes = RunContract.test_trains_on_worker_processes
    test_trains_on_partitions_as_they_come = RunContract.test_trains_on_partitions_as_they_come
    test_the_root_cause_is_raised = FailureContract.test_the_root_cause_is_raised_and_the_workers_are_free
    test_sys_exit_fails_the_member = FailureContract.test_sys_exit_fails_the_member_and_kills_no_worker


@pytest.mark.slow  # most of it is importing TensorFlow on the workers of new clusters
class TestTensorFlowMembersEverywhere(TensorFlowMembers, BridgeContract):
    """All of it, but for one test that holds members where the scheduler has no address for their children."""

    test_a_worker_that_joins_later_is_left_out = None
