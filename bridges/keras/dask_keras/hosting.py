"""A rank as its Dask worker hosts it: its partitions go to files that its process reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dask_bridges.devices.members import Wanted, leased_together
from dask_bridges.partitions import Part, take
from dask_bridges.processes import Child, Environment
from dask_bridges.processes.memberspool import member_spool
from dask_bridges.task import WorkerMember
from dask_keras import replica
from dask_keras.replica import FOLDER, Fit, Set, Trained
from dask_tf import encoding
from dask_tf.events import Spooled

__all__ = ["Rank", "host_rank"]


@dataclass(frozen=True)
class Rank:
    """What one rank is told.

    Attributes
    ----------
    fit : Fit
        The same for all.
    keys : dict of str to dict
        Of each set, by its name, the keys of this rank's partitions by their number.
    environment : Environment
    devices : Wanted or None
        Of which its process sees those that it has leased, and no others; None to leave it as it is.
    """

    fit: Fit
    keys: Mapping[str, Mapping[int, Any]]
    environment: Environment
    devices: Wanted | None = None


def host_rank(member: WorkerMember, rank: Rank) -> Trained | None:
    """The function of a member."""
    with leased_together(member, rank.devices) as lease, member_spool(member) as (spool, descriptor):
        for found in (rank.fit.training, rank.fit.validation):
            if found is not None:
                with member.span("receive"), spool.writer(found.name) as writer:
                    encoding.write(_taken(member, found, rank.keys[found.name]), found.schema, writer)
        locks, variables = (lease.descriptors, lease.variables) if lease else ({}, {})
        with Child(member, rank.environment, {FOLDER: descriptor, **locks}, variables=variables) as child:
            result: Trained | None = child.run(replica.fit_here, (rank.fit, member.worker.state.nthreads))
            return result


def _taken(member: WorkerMember, found: Set, keys: Mapping[int, Any]) -> Iterator[Part]:
    for number, key in keys.items():
        member.check()
        yield take(member.worker, key)
        member.emit(Spooled, ticket=found.name, part=number)
