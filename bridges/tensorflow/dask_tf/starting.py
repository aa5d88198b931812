"""What `start_tensorflow` finds out before anything starts: where the tasks go, and what they are told."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from distributed import Client

from dask_bridges import placement
from dask_bridges.about import About
from dask_bridges.devices.members import Wanted
from dask_bridges.errors import PlacementError
from dask_bridges.gang import GangPlan
from dask_bridges.placement import WorkerInfo
from dask_bridges.ports import port_range
from dask_bridges.processes import Environment
from dask_tf.devices import HIDDEN, check_gpus, place_with_gpus
from dask_tf.hosting import host_task
from dask_tf.roles import ESSENTIAL, RoleSpec, Task, assign, parse_roles, per_role

__all__ = ["LABEL", "Start", "keras_backend", "plan", "variables"]

LABEL = "TensorFlow cluster"

#: TensorFlow's C++ code is quiet unless `environment=` says otherwise. Not unless the client's own variables do:
#: importing JAX sets one of them.
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "GRPC_VERBOSITY": "ERROR"}


@dataclass(frozen=True)
class Start:
    """What `start_tensorflow` was asked for; see there."""

    counts: Mapping[str, Any]
    workers: str | Sequence[str] | None = None
    resources: Mapping[str, Any] | None = None
    gpus: int | Mapping[str, int] | None = None
    host: str | Mapping[str, str] | None = None
    ports: Any = 0
    threads: Any = None
    share: bool = False
    servers: bool | Sequence[str] | None = None
    environment: Mapping[str, str] | None = None
    timeout: float | str | None = None
    allow_plaintext: bool | None = None

    def check(self) -> None:
        """Refuse what can be seen to be wrong without a cluster."""
        if sys.platform == "win32":
            raise NotImplementedError("TensorFlow clusters need Dask workers on Linux, and a client that is no Windows")
        roles = list(dict.fromkeys(task.role for task in parse_roles(self.counts, 1)))
        check_gpus(self.gpus, roles, self.environment)
        for role in self.counts:
            port_range(per_role(self.ports, role, 0), "ports")
            threads = per_role(self.threads, role)
            if threads is not None and (not isinstance(threads, int) or threads < 1):
                raise ValueError(f"threads={self.threads!r}: pass a number of threads of 1 or more, or one by role")


async def plan(client: Client, start: Start) -> tuple[tuple[Task, ...], GangPlan]:
    """The tasks, and the gang that they are the members of.

    Raises
    ------
    PlacementError
        If there are too few workers, or one lacks TensorFlow or has another version.
    """
    placement.refuse_plaintext(client, start.allow_plaintext, "TensorFlow's traffic")
    workers = await placement.usable_workers(client, start.workers)
    workers = _with_resources(workers, start.resources)
    tasks = parse_roles(start.counts, len(workers))
    devices: list[Wanted | None] = [None] * len(tasks)
    if start.gpus is None:
        places = assign(tasks, [worker.address for worker in workers], start.share)
    else:
        places, devices = await place_with_gpus(
            client, workers, tasks, start.gpus, share=start.share, timeout=start.timeout
        )
    if {task.role for task in tasks} >= {"ps", "worker"} and Task("chief", 0) not in tasks:
        tasks = (*tasks, Task("chief", 0))  # the coordinator, which has little to do: it may share
        places, devices = [*places, places[0]], [*devices, None]
    await placement.check_packages(client, sorted(set(places)), ["dask_bridges"])
    await placement.check_packages(
        client, sorted(set(places)), ["tensorflow", "keras"], ': pip install "dask-bridges[tensorflow]"', imports=False
    )
    environment = _environment(start.environment)
    specs = [
        RoleSpec(
            tasks=tasks,
            serves=_serves(task, tasks, start.servers),
            threads=per_role(start.threads, task.role),
            host=per_role(start.host, task.role),
            ports=port_range(per_role(start.ports, task.role, 0), "ports"),
            replaceable=task.role not in ESSENTIAL,
            environment=environment,
            devices=wanted,
            variables={} if start.gpus is None else HIDDEN,
        )
        for task, wanted in zip(tasks, devices)
    ]
    return tasks, GangPlan(
        LABEL,
        host_task,
        specs,
        places,
        exclusive=False,
        timeout=start.timeout,
        names=[task.name for task in tasks],
        replaceable=[rank for rank, spec in enumerate(specs) if spec.replaceable],
        about=About(params=_asked(start), packages=("tensorflow", "keras")),
    )


def _asked(start: Start) -> dict[str, Any]:
    """What `start_tensorflow` was asked for, where that is more than nothing."""
    given = {field.name: getattr(start, field.name) for field in fields(start) if field.name != "counts"}
    return {**start.counts, **{name: value for name, value in given.items() if value not in (None, False, 0)}}


def _with_resources(workers: Sequence[WorkerInfo], resources: Mapping[str, Any] | None) -> list[WorkerInfo]:
    """The workers that have the Dask resources that every task needs."""
    wanted = dict(resources or {})
    fit = [w for w in workers if all(w.resources.get(name, 0) >= amount for name, amount in wanted.items())]
    if not fit:
        there = "\n  ".join(f"{worker.address}: {worker.resources or 'none'}" for worker in workers)
        raise PlacementError(f"no Dask worker has the resources {wanted}; there are:\n  {there}")
    return fit


def _serves(task: Task, tasks: Sequence[Task], servers: bool | Sequence[str] | None) -> bool:
    """Whether a task gets a `tf.distribute.Server`: those that a parameter-server coordinator connects to do."""
    if servers is None:
        return task.role in ("ps", "worker") and any(other.role == "ps" for other in tasks)
    return servers if isinstance(servers, bool) else task.role in servers


def variables() -> dict[str, str | None]:
    """The environment variables with which TensorFlow is imported in child processes; None for one to be removed."""
    return {
        "KERAS_BACKEND": keras_backend(),
        # Dask's nannies set it: every buffer of tf.data would be given back to the system and fetched again.
        "MALLOC_TRIM_THRESHOLD_": None,
        # PyTorch's other way to ask for devices is the end of forking.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        **QUIET,
    }


def _environment(more: Mapping[str, str] | None) -> Environment:
    # A task's Dask worker holds its port.
    settings = {**variables(), "TF_GRPC_REUSE_PORT": "1", **(more or {})}
    return Environment(("tensorflow", "keras"), tuple(sorted(settings.items(), key=lambda item: item[0])))


def keras_backend() -> str:
    """The Keras backend of this process, whether or not Keras is imported."""
    if "keras" in sys.modules:
        return str(sys.modules["keras"].backend.backend())
    if "KERAS_BACKEND" in os.environ:
        return os.environ["KERAS_BACKEND"]
    file = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "keras.json"
    try:
        return str(json.loads(file.read_text())["backend"])
    except (OSError, ValueError, KeyError):
        return "tensorflow"
