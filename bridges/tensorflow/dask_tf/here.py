"""The process of a task, as the code that runs in it sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dask_bridges.errors import DataError
from dask_bridges.processes import ChildMember
from dask_tf.roles import ClusterSpec, RoleWork

if TYPE_CHECKING:
    import tensorflow as tf

    from dask_tf.schema import Schema

__all__ = ["SPOOL_FD", "RoleProcess", "current", "enter", "find"]

#: The descriptor at which every task's process has the folder of its partitions open.
SPOOL_FD = 250

_here: RoleProcess | None = None


class RoleProcess:
    """The cluster as the process of one of its tasks sees it.

    What `TensorFlowCluster` becomes where a function is sent to its tasks with it,
    and what `current` gives there.

    Attributes
    ----------
    role : str
    index : int
    tf_spec : ClusterSpec
    """

    def __init__(self, member: ChildMember, work: RoleWork) -> None:
        self.member = member
        self.id = work.cluster
        self.role = work.task.role
        self.index = work.task.index
        self.tf_spec = ClusterSpec(work.addresses)
        self.feeds: dict[str, Schema] = dict(work.feeds)

    @property
    def stopping(self) -> str | None:
        """Why this task is to end now; None while it may go on."""
        return self.member.stopping

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Send metric values to whoever listens to the cluster."""
        self.member.metrics(step, values)

    def log(self, text: str) -> None:
        """Write a line to the Dask worker's log and to the cluster's."""
        self.member.log(text)

    def folder(self, name: str) -> str:
        """Where the partitions of a feed lie, in this process and in every other task's.

        Raises
        ------
        DataError
            If nothing was fed under that name.
        """
        if name not in self.feeds:
            there = ", ".join(map(repr, self.feeds)) or "none"
            raise DataError(f"nothing was fed under the name {name!r} (there is {there}): cluster.feed(X, y, name=…)")
        return f"/proc/self/fd/{SPOOL_FD}/{name}"

    def dataset(self, name: str, batch_size: int, **options: Any) -> tf.data.Dataset:
        """What was fed under a name, as a dataset of this task's own partitions.

        Its graph is made of TensorFlow's own operations, so that it reads in the
        process that runs it: built by a coordinator, in its parameter servers' workers.

        Parameters
        ----------
        name : str
        batch_size : int
        options
            `shuffle`, `seed`, `repeat` and `drop_remainder`, see `dask_tf.datasets.dataset`.
        """
        from dask_tf.datasets import dataset

        return dataset(self.folder(name), self.feeds[name], batch_size, **options)


def enter(process: RoleProcess) -> None:
    """Note that the process at hand is that of a task."""
    global _here
    _here = process


def current() -> RoleProcess:
    """The cluster that the process at hand is a task of.

    Raises
    ------
    RuntimeError
        If it is none.
    """
    if _here is None:
        raise RuntimeError(
            "this process is no task of a TensorFlow cluster: call it in a function that cluster.run sends there"
        )
    return _here


def find(cluster: str) -> RoleProcess:
    """The cluster of that id, as a task of it sees it: how `TensorFlowCluster` travels.

    Raises
    ------
    RuntimeError
        If the process is no task of it.
    """
    if _here is None or _here.id != cluster:
        raise RuntimeError(
            "a TensorFlowCluster travels to its own tasks only (cluster.run); elsewhere use cluster.tf_spec.as_dict()"
        )
    return _here
