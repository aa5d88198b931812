"""Which roles a TensorFlow cluster has, on how many tasks each, and what each of them is told."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dask_bridges.devices.members import Wanted
from dask_bridges.errors import PlacementError
from dask_bridges.processes import Environment

__all__ = ["ESSENTIAL", "ClusterSpec", "RoleSpec", "RoleWork", "Task", "assign", "parse_roles", "per_role"]

#: Order of the roles of one cluster: the one that leads first.
ORDER = ("chief", "ps", "worker", "evaluator", "scorer")
#: Without one of these nothing can go on. Others are started again where they are lost.
ESSENTIAL = ("chief", "ps")
#: Those that TensorFlow knows, and may be told of.
KNOWN = ("chief", "ps", "worker")


@dataclass(frozen=True)
class Task:
    """One task of a role: "worker:1"."""

    role: str
    index: int

    @property
    def name(self) -> str:
        """As TensorFlow and people write it."""
        return f"{self.role}:{self.index}"


class ClusterSpec:
    """Addresses of all tasks by role, as `tf.train.ClusterSpec` has them, and without TensorFlow.

    Parameters
    ----------
    addresses : mapping of str to sequence of str
        ``"host:port"`` of each task, by role.

    Examples
    --------
    >>> spec = ClusterSpec({"ps": ["a:1"], "worker": ["b:2", "c:3"]})
    >>> spec.num_tasks("worker"), spec.task_address("worker", 1)
    (2, 'c:3')
    """

    def __init__(self, addresses: Mapping[str, Sequence[str]]) -> None:
        self._addresses = {role: list(tasks) for role, tasks in addresses.items()}

    def as_dict(self) -> dict[str, list[str]]:
        """Addresses by role: what `tf.train.ClusterSpec` takes."""
        return {role: list(tasks) for role, tasks in self._addresses.items()}

    @property
    def jobs(self) -> list[str]:
        """The roles."""
        return list(self._addresses)

    def num_tasks(self, job_name: str) -> int:
        """How many tasks a role has."""
        return len(self._addresses[job_name])

    def task_indices(self, job_name: str) -> list[int]:
        """The indices of a role's tasks."""
        return list(range(self.num_tasks(job_name)))

    def task_address(self, job_name: str, task_index: int) -> str:
        """``"host:port"`` of a task."""
        return self._addresses[job_name][task_index]

    def job_tasks(self, job_name: str) -> list[str]:
        """``"host:port"`` of each of a role's tasks."""
        return list(self._addresses[job_name])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClusterSpec) and self._addresses == other._addresses

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"ClusterSpec({self._addresses})"


@dataclass(frozen=True)
class RoleSpec:
    """What the Dask worker of a task is told.

    Attributes
    ----------
    tasks : tuple of Task
        All of the cluster, by rank.
    serves : bool
        Whether a `tf.distribute.Server` is started in its process.
    threads : int or None
        Of TensorFlow's pools; None for as many as its Dask worker has.
    host : str or None
        The host to advertise; None for that of the Dask worker.
    ports : range
        To take one of.
    replaceable : bool
        Whether the others go on without it while it is started again.
    environment : Environment
        What its process finds imported.
    devices : Wanted or None
        Which the task leases as long as it lives; its process sees these and no others.
    variables : mapping of str to str
        Of its process, where it leases none.
    """

    tasks: tuple[Task, ...]
    serves: bool
    threads: int | None
    host: str | None
    ports: range
    replaceable: bool
    environment: Environment
    devices: Wanted | None = None
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RoleWork:
    """What the process of a task is told.

    Attributes
    ----------
    cluster : str
        Id of the cluster.
    task : Task
    addresses : dict of str to list of str
        Of all tasks, by role.
    serves : bool
    threads : int
    feeds : dict
        Schema of each feed that there is already, by name.
    """

    cluster: str
    task: Task
    addresses: dict[str, list[str]]
    serves: bool
    threads: int
    feeds: dict[str, Any] = field(default_factory=dict)

    @property
    def tf_config(self) -> str:
        """The value of ``TF_CONFIG`` for this task."""
        known = {role: tasks for role, tasks in self.addresses.items() if role in KNOWN}
        return json.dumps({"cluster": known, "task": {"type": self.task.role, "index": self.task.index}})


def parse_roles(counts: Mapping[str, Any], workers: int) -> tuple[Task, ...]:
    """The tasks that were asked for, by rank; one "worker" on each Dask worker where nothing was.

    Raises
    ------
    TypeError
        If a number of tasks is no whole number.
    ValueError
        If it is negative, or if all are 0.
    """
    asked = {role: count for role, count in counts.items() if count is not None}
    for role, count in asked.items():
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"{role}={count!r}: pass the number of tasks with this role, such as {role}=1")
        if count < 0:
            raise ValueError(f"{role}={count}: a number of tasks cannot be negative")
    if not asked:
        asked = {"worker": workers}
    if not sum(asked.values()):
        raise ValueError(f"no task at all was asked for: {', '.join(f'{role}=0' for role in asked)}")
    names = [*(role for role in ORDER if role in asked), *(role for role in asked if role not in ORDER)]
    return tuple(Task(role, index) for role in names for index in range(asked[role]))


def per_role(setting: Any, role: str, default: Any = None) -> Any:
    """The value of a setting for a role: one for all, or a mapping by role."""
    if isinstance(setting, Mapping):
        return setting.get(role, default)
    return default if setting is None else setting


def assign(tasks: Sequence[Task], workers: Sequence[str], share: bool) -> list[str]:
    """Dask workers to place the tasks on, by rank; more of them than tasks where there are.

    Raises
    ------
    PlacementError
        If there are fewer than tasks, and they may not share.
    """
    if len(workers) >= len(tasks):
        return list(workers)
    if not share:
        counts = {role: len(list(group)) for role, group in itertools.groupby(task.role for task in tasks)}
        asked = " + ".join(f"{role}={count}" for role, count in counts.items())
        raise PlacementError(
            f"{asked} is {len(tasks)} tasks, one a Dask worker, and there are {len(workers)} Dask workers: "
            "start more (cluster.scale), ask for fewer tasks, or let tasks share a worker with share=True"
        )
    return list(itertools.islice(itertools.cycle(workers), len(tasks)))
