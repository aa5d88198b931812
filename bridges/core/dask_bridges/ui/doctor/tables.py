"""A diagnosis as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dask.utils import format_bytes

from dask_bridges.placement import WorkerInfo
from dask_bridges.ui.doctor.diagnosis import Diagnosis
from dask_bridges.ui.doctor.surroundings import Surroundings
from dask_bridges.ui.text import table

__all__ = ["render"]

NOTHING = "-"
#: Of so many hosts it is told how many ports are free.
HOSTS = 8


def render(diagnosis: Diagnosis) -> str:
    """All of it, as lines of text."""
    parts = [diagnosis.title, _versions(diagnosis), _machines(diagnosis), _ports(diagnosis), _problems(diagnosis)]
    return "\n\n".join(part for part in parts if part)


def _versions(diagnosis: Diagnosis) -> str:
    """What is installed: a column for the client, the scheduler, and all workers that have the same."""
    columns: dict[str, dict[str, Any]] = {}
    alike: dict[str, tuple[list[str], dict[str, Any]]] = {}
    names = {worker.address: worker.name for worker in diagnosis.workers}
    for who, look in diagnosis.installed.items():
        if who in ("client", "scheduler"):
            columns[who] = look
        else:
            kept = alike.setdefault(repr({**look, "packages": _of(look, diagnosis.packages)}), ([], look))
            kept[0].append(names[who])
    for those, look in alike.values():
        columns[_workers(those, all_alike=len(alike) == 1)] = look
    rows = [["", *columns], ["python", *(look["release"] for look in columns.values())]]
    for package in diagnosis.packages:
        row = [_of(look, [package])[0] for look in columns.values()]
        if any(cell != NOTHING for cell in row):
            rows.append([package, *row])
    variables = dict.fromkeys(name for look in columns.values() for name in look["variables"])
    for name in variables:
        row = [look["variables"].get(name) or NOTHING for look in columns.values()]
        if any(cell != NOTHING for cell in row):
            rows.append([name, *row])
    return table(rows)


def _of(look: dict[str, Any], packages: Sequence[str]) -> list[str]:
    found = [look["packages"].get(package, {}) for package in packages]
    return [one["version"] or "there" if "version" in one else NOTHING for one in found]


def _workers(names: Sequence[str], all_alike: bool) -> str:
    if len(names) > 1 and (all_alike or len(names) > 3):
        return f"{len(names)} workers"
    return f"worker{'s' if len(names) > 1 else ''} {', '.join(name.partition('://')[2] or name for name in names)}"


def _machines(diagnosis: Diagnosis) -> str:
    """What each worker has; without a cluster, what this machine has."""
    if "client" in diagnosis.around:
        seen = diagnosis.around["client"]
        return table([["devices", _devices(seen)], ["/dev/shm", _memory(seen)]])
    if not diagnosis.workers:
        return ""
    rows = [["worker", "name", "state", "threads", "memory limit", "devices", "/dev/shm"]]
    rows += [_worker(worker, diagnosis.around.get(worker.address)) for worker in diagnosis.workers]
    return table(rows)


def _worker(worker: WorkerInfo, seen: Surroundings | None) -> list[str]:
    limit = format_bytes(worker.memory_limit) if worker.memory_limit else "none"
    around = [_devices(seen), _memory(seen)] if seen else ["?", "?"]
    name = NOTHING if worker.name == worker.address else worker.name
    return [worker.address, name, worker.status, str(worker.nthreads), limit, *around]


def _devices(seen: Surroundings) -> str:
    told = [
        device.name[:12] + (f" ({format_bytes(device.memory)})" if device.memory else "") for device in seen.devices
    ]
    return ", ".join(told) or "none"


def _memory(seen: Surroundings) -> str:
    if not seen.memory_size:
        return "not of use"
    return f"{format_bytes(seen.memory_free)} of {format_bytes(seen.memory_size)}"


def _ports(diagnosis: Diagnosis) -> str:
    lines = [
        f"dask-bridges.{setting}: {_span(span)}; {_free(diagnosis, setting)}"
        for setting, span in diagnosis.ports.items()
        if span[0]
    ] or ["ports: any that are free, since no setting names one"]
    if diagnosis.calls:
        lines.append(f"{diagnosis.calls} connections between workers were tried, as members make them")
    return "\n".join(lines)


def _span(span: range) -> str:
    return str(span[0]) if len(span) == 1 else f"{span[0]} to {span[-1]}"


def _free(diagnosis: Diagnosis, setting: str) -> str:
    """Of how many hosts how many ports are free."""
    hosts = {worker.address: f"on {worker.host}" for worker in diagnosis.workers}
    free = {hosts.get(who, "here"): seen.free_ports[setting] for who, seen in diagnosis.around.items()}
    told = ", ".join(f"{count} {where}" for where, count in list(free.items())[:HOSTS])
    return f"free: {told or '?'}{', …' if len(free) > HOSTS else ''}"


def _problems(diagnosis: Diagnosis) -> str:
    if not diagnosis.problems:
        return "Nothing is wrong."
    count = len(diagnosis.problems)
    lines = [f"{count} problem{'' if count == 1 else 's'}:"]
    for number, problem in enumerate(diagnosis.problems, 1):
        lines += [f"{number:3}. {problem.finding}."]
        lines += [f"     {problem.remedy}."] if problem.remedy else []
    return "\n".join(lines)
