"""GPUs for the tasks of a cluster: how many each role gets, and on which Dask workers there are so many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distributed import Client

from dask_bridges import config
from dask_bridges.devices.finding import Group, find_groups
from dask_bridges.devices.members import Wanted, check_count, what_there_is
from dask_bridges.errors import PlacementError
from dask_bridges.placement import WorkerInfo
from dask_tf.roles import Task, assign

__all__ = ["HIDDEN", "check_gpus", "per_task", "place_with_gpus"]

VISIBLE = "CUDA_VISIBLE_DEVICES"
#: Variables of a task that gets no GPU where others do: TensorFlow takes all that it sees.
HIDDEN = {VISIBLE: ""}


def check_gpus(gpus: Any, roles: Sequence[str], environment: Mapping[str, str] | None) -> None:
    """See that `gpus` is a number, or numbers by roles that there are.

    Raises
    ------
    ValueError
        Saying what is not.
    """
    if gpus is None:
        return
    if VISIBLE in (environment or {}):
        raise ValueError(f"gpus={gpus!r} says which GPUs a task sees, and so does {VISIBLE} in environment=")
    if not isinstance(gpus, Mapping):
        check_count(gpus, "gpus")
        return
    for role, count in gpus.items():
        if role not in roles:
            raise ValueError(f"gpus={dict(gpus)!r}: no task {role!r} was asked for, but {', '.join(roles)}")
        check_count(count, f"gpus[{role!r}]")


def per_task(gpus: Any, tasks: Sequence[Task]) -> list[int]:
    """How many each task gets."""
    return [gpus.get(task.role, 0) if isinstance(gpus, Mapping) else int(gpus) for task in tasks]


async def place_with_gpus(
    client: Client,
    workers: Sequence[WorkerInfo],
    tasks: Sequence[Task],
    gpus: Any,
    *,
    share: bool,
    timeout: float | str | None,
) -> tuple[list[str], list[Wanted | None]]:
    """A Dask worker for each task, and the devices that it wants: of its host, which has enough for all of its tasks.

    Raises
    ------
    PlacementError
        If there are too few Dask workers, or devices; it says what there is.
    """
    assign(tasks, [worker.address for worker in workers], share)
    groups, needs = await find_groups(client, workers, None), per_task(gpus, tasks)
    places = assign_devices(needs, groups, [worker.address for worker in workers], share)
    if not places:
        asked = ", ".join(f"{need} for {task.name}" for task, need in zip(tasks, needs) if need)
        alone, or_share = ("", "") if share else (" by itself", ", or let tasks share a Dask worker with share=True")
        raise PlacementError(
            f"gpus={gpus!r} is {asked}, of the host of the Dask worker that the task is on{alone}, and "
            f"{what_there_is(groups, workers)}. Ask for fewer{or_share}"
        )
    group_of = {address: group for group in groups for address in group.workers}
    limit = config.seconds("timeout", timeout)
    wanted = [
        Wanted(need, tuple(group_of[place].devices), limit, frozenset(group_of[place].pids)) if need else None
        for need, place in zip(needs, places)
    ]
    return places, wanted


def assign_devices(needs: Sequence[int], groups: Sequence[Group], workers: Sequence[str], share: bool) -> list[str]:
    """Dask workers for tasks that need so many devices each, by rank; empty where that cannot be.

    The largest need comes first, to where least is left over; where Dask workers are shared, to the one
    that has least to do.

    >>> two, one = Group("a", ["a:1", "a:2"], ["0", "1"]), Group("b", ["b:1"], ["0"])
    >>> assign_devices([0, 1, 2], [two, one], ["a:1", "a:2", "b:1"], share=False)
    ['a:2', 'b:1', 'a:1']
    """
    group_of = {address: at for at, group in enumerate(groups) for address in group.workers}
    left = [len(group.devices) for group in groups]
    load, places = dict.fromkeys(workers, 0), [""] * len(needs)

    def left_at(worker: str) -> int:
        return left[group_of[worker]] if worker in group_of else 0

    for rank in sorted(range(len(needs)), key=lambda rank: -needs[rank]):
        fit = [worker for worker in workers if (share or not load[worker]) and left_at(worker) >= needs[rank]]
        if not fit:
            return []
        places[rank] = worker = min(fit, key=lambda worker: (load[worker], left_at(worker)))
        load[worker] += 1
        if needs[rank]:
            left[group_of[worker]] -= needs[rank]
    return places
