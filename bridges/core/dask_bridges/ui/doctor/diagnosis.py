"""Asking a cluster, or this machine alone, how it is."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
from distributed import Client

from dask_bridges import config, plugins, probe
from dask_bridges.placement import WorkerInfo, all_workers
from dask_bridges.ports import port_range
from dask_bridges.ui.doctor import checks, installed, surroundings
from dask_bridges.ui.doctor.checks import Problem
from dask_bridges.ui.doctor.surroundings import Surroundings

__all__ = ["Diagnosis", "Problem", "cluster", "this_machine"]

cloudpickle.register_pickle_by_value(probe)
cloudpickle.register_pickle_by_value(installed)

#: What all workers need, and what they need in the same version if they have it.
NEEDED = ("dask_bridges", "dask", "distributed", "numpy")
COMPARED = ("cloudpickle", "msgpack", "pandas", "pyarrow")
COLLECTIVE = "collective-port"
#: So many others each worker connects to, so that a large cluster is looked at in seconds, too.
CALLS = 32


@dataclass(frozen=True)
class Diagnosis:
    """How a cluster is.

    Attributes
    ----------
    title : str
    packages : tuple of str
        Import names of what was looked for.
    installed : dict
        What is installed, by process: "client", "scheduler", and addresses of workers.
    workers : list of WorkerInfo
    around : dict
        What workers, by address, or "client", found around them.
    ports : dict of str to range
        What is configured.
    calls : int
        Connections tried between workers.
    problems : list of Problem
    """

    title: str
    packages: tuple[str, ...]
    installed: dict[str, dict[str, Any]]
    workers: list[WorkerInfo] = field(default_factory=list)
    around: dict[str, Surroundings] = field(default_factory=dict)
    ports: dict[str, range] = field(default_factory=dict)
    calls: int = 0
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class _Questions:
    """What the bridges that are installed here want to know."""

    checkups: tuple[plugins.Checkup, ...]
    ports: dict[str, range]
    problems: list[Problem]

    @property
    def packages(self) -> tuple[str, ...]:
        theirs = [name for checkup in self.checkups for name in (*checkup.packages, *checkup.versions)]
        return tuple(dict.fromkeys((*NEEDED, *COMPARED, *theirs)))

    @property
    def variables(self) -> tuple[str, ...]:
        return tuple(name for checkup in self.checkups for name in checkup.variables)

    @classmethod
    def ask(cls) -> _Questions:
        found, complaints = plugins.installed()
        problems = [Problem("client", complaint, "Install it again, or remove it") for complaint in complaints]
        checkups = tuple(plugin.checkup for plugin in found if plugin.checkup)
        ports = {}
        for setting in (COLLECTIVE, *(name for checkup in checkups for name in checkup.ports)):
            try:
                ports[setting] = port_range(config.get(setting), f"dask-bridges.{setting}")
            except ValueError as error:
                problems.append(Problem("client", str(error), "Correct it in Dask's configuration"))
        return cls(checkups, ports, problems)


def this_machine() -> Diagnosis:
    """How this machine is, without a cluster."""
    asked = _Questions.ask()
    here = installed.look(asked.packages, asked.variables)
    around = surroundings.look(asked.ports, {})
    problems = [
        *asked.problems,
        *checks.frameworks(here, asked.checkups),
        *checks.spool_memory({"this machine": around}, {}),
        *checks.drivers({"this machine": around}),
        *checks.ports({"this machine": around}, asked.ports, {"this machine": ["client"]}, COLLECTIVE),
    ]
    return Diagnosis("This machine", asked.packages, {"client": here}, [], {"client": around}, asked.ports, 0, problems)


async def cluster(client: Client) -> Diagnosis:
    """How a cluster is: each worker alone, and all of them beside the client."""
    asked = _Questions.ask()
    problems = list(asked.problems)
    workers = await all_workers(client)
    here = installed.look(asked.packages, asked.variables)
    problems += checks.frameworks(here, asked.checkups) + checks.states(client.scheduler.address, workers)
    problems += checks.traffic(client)
    foreign = checks.of_other_pythons(here, await client.get_versions())
    problems += checks.pythons(here, foreign)
    looks = {"client": here}
    if "scheduler" not in foreign:
        looks |= await _scheduler(client, asked, problems)
    addresses = [worker.address for worker in workers if worker.address not in foreign]
    looks |= await _each(client, addresses, problems, installed.look_aside, asked.packages, asked.variables)
    problems += checks.versions(looks, NEEDED, COMPARED, asked.checkups)
    able = [worker for worker in workers if checks.has_this_package(looks, worker.address)]
    around = await _around(client, asked, able, problems)
    calls = await _call_each_other(client, [worker.address for worker in able], problems)
    title = f"Cluster at {client.scheduler.address}"
    return Diagnosis(title, asked.packages, looks | foreign, workers, around, asked.ports, calls, problems)


async def _scheduler(client: Client, asked: _Questions, problems: list[Problem]) -> dict[str, dict[str, Any]]:
    """What is installed on the scheduler, where it says so."""
    try:
        look = await client.run_on_scheduler(installed.look_at_scheduler, asked.packages, asked.variables)
    except Exception as error:  # whatever was raised there
        problems.append(checks.scheduler_is_silent(error))
        return {}
    problems += checks.scheduler_refuses(look["refuses"])
    return {"scheduler": look}


async def _around(
    client: Client, asked: _Questions, workers: Sequence[WorkerInfo], problems: list[Problem]
) -> dict[str, Surroundings]:
    """What workers find around them, by address."""
    around = await _each(client, [w.address for w in workers], problems, surroundings.look_around, asked.ports)
    hosts: dict[str, list[str]] = {}
    for worker in workers:
        hosts.setdefault(worker.host, []).append(worker.address)
    problems += checks.spool_memory(around, {worker.address: worker.memory_limit for worker in workers})
    problems += checks.drivers(around)
    seen_on = {host: around[there[0]] for host, there in hosts.items() if there[0] in around}
    problems += checks.ports(seen_on, asked.ports, hosts, COLLECTIVE)
    return around


async def _each(
    client: Client, workers: Sequence[str], problems: list[Problem], function: Any, *args: Any
) -> dict[str, Any]:
    """What a function gives on each worker; of one that raises or is lost, a problem."""
    if not workers:
        return {}
    answers = await client.run(function, *args, workers=list(workers), on_error="return")
    wrong = {worker: found for worker, found in answers.items() if isinstance(found, BaseException)}
    problems += [checks.does_not_answer(worker, error) for worker, error in wrong.items()]
    return {worker: found for worker, found in answers.items() if worker not in wrong}


async def _call_each_other(client: Client, workers: Sequence[str], problems: list[Problem]) -> int:
    """Let workers connect to each other as members do; how many connections were tried."""
    if len(workers) < 2 or not client.scheduler.address.startswith(("tcp", "tls", "ws")):
        return 0
    token = secrets.token_hex(8)
    try:
        port = config.get(COLLECTIVE)
        doors = await client.run(surroundings.answer, token, port, workers=list(workers), on_error="ignore")
        calls = {worker: _ahead(worker, workers, doors) for worker in workers}
        heard = await _each(client, workers, problems, surroundings.knock, token, calls)
        problems += checks.reach(heard)
        return sum(map(len, calls.values()))
    finally:
        await client.run(surroundings.stop_answering, token, workers=list(workers), on_error="ignore")


def _ahead(worker: str, workers: Sequence[str], doors: dict[str, Any]) -> dict[str, Any]:
    """The doors of those after a worker, in a ring of all."""
    at = list(workers).index(worker)
    ring = [*workers[at + 1 :], *workers[:at]]
    return {other: doors[other] for other in ring[:CALLS] if other in doors}
