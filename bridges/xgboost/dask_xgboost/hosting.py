"""Where a rank trains: in its worker's own process, or in a child of it, on a GPU that the worker does not own."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from typing import Any

import numpy as np
from distributed.protocol.pickle import dumps

from dask_bridges import partitions
from dask_bridges.devices.members import leased_together
from dask_bridges.errors import MemberLost, MemberStopped
from dask_bridges.processes import Child, ChildMember, Environment
from dask_bridges.processes.inputs import Inputs
from dask_bridges.processes.memberspool import member_spool
from dask_bridges.processes.spool import Spool
from dask_bridges.task import WorkerMember
from dask_xgboost.devices import own_gpu
from dask_xgboost.matrices import FOLDER
from dask_xgboost.rank import TrainResult, TrainSpec, train_rank
from dask_xgboost.ready import MatricesSpec

__all__ = ["train_here", "train_in_child"]

ENVIRONMENT = Environment(("xgboost", "dask_xgboost.hosting"))


def train_here(member: WorkerMember, spec: TrainSpec) -> TrainResult | None:
    """The function of a member that trains in its worker's own process."""
    with own_gpu(member, spec.devices):
        return train_rank(member, spec.using(member.worker.state.nthreads))


def train_in_child(member: WorkerMember, spec: TrainSpec) -> bytes | None:
    """The function of a member that trains in a child process, on a GPU that it leases; rank 0's result, pickled.

    The worker does not open it: a booster that was trained on a GPU would take one there.
    """
    with leased_together(member, spec.devices) as lease, member_spool(member) as (spool, descriptor):
        with member.span("receive"):
            matrices = _spooled(member, spec.matrices, spool)
        work = replace(spec.using(member.worker.state.nthreads), matrices=matrices)
        locks, variables = (lease.descriptors, lease.variables) if lease else ({}, {})
        with Child(member, ENVIRONMENT, {FOLDER: descriptor, **locks}, variables=variables) as child:
            threading.Thread(target=_drop_when_built, args=(child, matrices, spool), daemon=True).start()
            result: bytes | None = child.run(_train, work)
            return result


def _spooled(member: WorkerMember, spec: MatricesSpec, spool: Spool) -> MatricesSpec:
    """The matrices of parts in files."""

    def written(key: Any, feed: str) -> Inputs:
        member.check()
        part = partitions.take(member.worker, key)
        # The bytes of others would go through the pipe.
        whole = {role: np.ascontiguousarray(b) if type(b) is np.ndarray else b for role, b in part.items()}
        return Inputs.of((whole,), spool, feed)

    each = tuple(
        replace(matrix, keys=tuple(written(key, f"{at}-{number}") for number, key in enumerate(matrix.keys)))
        for at, matrix in enumerate(spec.each)
    )
    return replace(spec, each=each)


def _drop_when_built(child: Child, matrices: MatricesSpec, spool: Spool) -> None:
    """Remove the files of parts that are binned."""
    with contextlib.suppress(MemberLost, MemberStopped):  # the spool goes with the member
        child.call(_wait_until_built)
        for matrix in matrices.each:
            for part in matrix.keys:
                if part.feed:
                    spool.drop(part.feed)


# In the child process

_built = threading.Event()


def _wait_until_built() -> None:
    _built.wait()


def _train(member: ChildMember, spec: TrainSpec) -> bytes | None:
    result = train_rank(member, spec, _built.set)
    return None if result is None else bytes(dumps(result))
