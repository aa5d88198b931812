"""Which workers a gang may use: alive, not paused, with the packages it needs."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
from dask.utils import format_bytes
from distributed import Client

from dask_bridges import config, probe
from dask_bridges.errors import PlacementError, WorkerLeft

__all__ = [
    "WorkerInfo",
    "all_workers",
    "check_packages",
    "check_version",
    "refuse_plaintext",
    "usable_workers",
    "workers_back",
]

cloudpickle.register_pickle_by_value(probe)

_probed: weakref.WeakKeyDictionary[Client, dict[tuple[str, str], dict[str, Any]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class WorkerInfo:
    """What the scheduler knows of a worker; memory in bytes, 0 where it has no limit."""

    address: str
    name: str
    host: str
    status: str
    nthreads: int
    memory: int
    memory_limit: int
    resources: dict[str, float] = field(default_factory=dict, hash=False)

    def describe(self) -> str:
        """One line for an error message."""
        limit = format_bytes(self.memory_limit) if self.memory_limit else "no limit"
        return f"{self.address} ({self.status}): {format_bytes(self.memory)} of {limit}"


async def all_workers(client: Client) -> list[WorkerInfo]:
    """The workers of the cluster, whatever state they are in."""
    identity = await client.scheduler.identity(n_workers=-1)
    return [
        WorkerInfo(
            address=address,
            name=str(info.get("name", address)),
            host=info["host"],
            status=info.get("status", "running"),
            nthreads=info["nthreads"],
            memory=int(info.get("metrics", {}).get("memory", 0)),
            memory_limit=int(info.get("memory_limit") or 0),
            resources=dict(info.get("resources") or {}),
        )
        for address, info in identity["workers"].items()
    ]


async def usable_workers(
    client: Client, workers: str | Iterable[str] | None = None, timeout: float | None = None
) -> list[WorkerInfo]:
    """The workers a gang may be placed on; waits for the first one.

    Parameters
    ----------
    client : Client
    workers : str or iterable of str, optional
        Addresses or names to choose from; all by default.
    timeout : float, optional
        Seconds to wait for a first worker (``dask-bridges.timeout``).

    Raises
    ------
    PlacementError
        If there is none, if a named one is not there, or if all are paused.
    """
    there = await all_workers(client)
    if not there:
        await _first_worker(client, config.seconds("timeout", timeout))
        there = await all_workers(client)
    chosen = _choose(there, workers)
    running = [worker for worker in chosen if worker.status == "running"]
    if not running:
        table = "\n  ".join(worker.describe() for worker in chosen)
        raise PlacementError(
            f"none of the {len(chosen)} workers is running, so no task starts there:\n  {table}\n"
            "Paused workers have used up their memory: give them more, or free what they hold."
        )
    return running


async def workers_back(client: Client, names: Sequence[str], *, others: bool) -> list[WorkerInfo]:
    """The workers of before, in their order, once they are back; waits for ``dask-bridges.worker-return-timeout``.

    Parameters
    ----------
    client : Client
    names : sequence of str
        By which a nanny starts them again.
    others : bool
        Whether others may take the place of those that stay away.

    Raises
    ------
    PlacementError
        If there is none of them, and no other in their place, after ``dask-bridges.timeout``.
    """
    try:
        async with asyncio.timeout(config.seconds("worker-return-timeout")):
            while True:
                there = await _running(client)
                by_name = {worker.name: worker for worker in there}
                if all(name in by_name for name in names):
                    return [by_name[name] for name in names]
                spare = [worker for worker in there if worker.name not in names]
                if others and len(there) >= len(names):
                    return [by_name[name] if name in by_name else spare.pop(0) for name in names]
                await asyncio.sleep(0.1)
    except TimeoutError:
        there = await usable_workers(client)
        found = [worker for worker in there if worker.name in names]
        found += [worker for worker in there if others and worker not in found]
        if not found:
            raise PlacementError(f"none of the workers {[*names]} is left, and none came back") from None
        return found[: len(names)]


async def _running(client: Client) -> list[WorkerInfo]:
    return [worker for worker in await all_workers(client) if worker.status == "running"]


async def _first_worker(client: Client, timeout: float) -> None:
    """Wait until the cluster has a worker, with a task of ours queued so that an adaptive one grows."""
    future = client.submit(int, pure=False)
    try:
        await asyncio.wait_for(client.gather(future), timeout)
    except TimeoutError:
        raise PlacementError(
            f"the cluster at {client.scheduler.address} has no workers, and none came within {timeout:g} s. "
            "Start some (cluster.scale(2), or `dask worker ADDRESS`), or raise dask-bridges.timeout."
        ) from None
    finally:
        future.release()


def _choose(there: Sequence[WorkerInfo], workers: str | Iterable[str] | None) -> list[WorkerInfo]:
    if workers is None:
        return list(there)
    wanted = [workers] if isinstance(workers, str) else [str(worker) for worker in workers]
    by_name = {info.name: info for info in there} | {info.address: info for info in there}
    missing = [name for name in wanted if name not in by_name]
    if missing:
        raise PlacementError(
            f"workers={missing} are not in the cluster; there are "
            + ", ".join(f"{info.address} (name {info.name})" for info in there)
        )
    return list(dict.fromkeys(by_name[name] for name in wanted))


async def check_packages(
    client: Client, workers: Sequence[str], packages: Sequence[str], remedy: str = "", *, imports: bool = True
) -> None:
    """See that the workers have `packages`, in the client's versions. One that has is not asked again.

    Parameters
    ----------
    client : Client
    workers : sequence of str
        Addresses.
    packages : sequence of str
        By the names they are imported under.
    remedy : str
        What an error message says beside that a package is to be installed.
    imports : bool
        Whether they are imported to find out, which tells most; a framework that lives in child processes
        only is not.

    Raises
    ------
    PlacementError
        Naming worker, package, and both versions.
    """
    known = _probed.setdefault(client, {})
    here = _versions_here(tuple(packages), imports)
    new = [w for w in workers if any(known.get((w, p), {}).get("version") != here[p] for p in packages)]
    if new:
        answers = await client.run(probe.look, tuple(packages), imports, workers=new, on_error="return")
        for worker, found in answers.items():
            if isinstance(found, Exception):
                kind = WorkerLeft if isinstance(found, OSError) else PlacementError
                raise kind(f"worker {worker} does not say what is installed there: {found}") from found
            for package in packages:
                known[worker, package] = {**found[package], "python": found["python"]}
    for worker in workers:
        for package in packages:
            check_version(f"worker {worker}", package, here[package], known[worker, package], remedy)


def _versions_here(packages: tuple[str, ...], imports: bool) -> dict[str, str]:
    found = probe.versions(packages, imports)
    for package in packages:
        if error := found[package].get("error"):
            raise PlacementError(f"{package} cannot be imported here, on the client ({error}): install it")
    return {package: found[package]["version"] for package in packages}


def check_version(who: str, package: str, here: str, found: dict[str, Any], remedy: str = "") -> None:
    """See that what a probe `found` of a package is the client's version.

    Parameters
    ----------
    who : str
        Where it was looked for, for the error message.
    package : str
    here : str
        The client's version.
    found : dict
        Its "version", or the "error" of looking for it and the "python" that did.
    remedy : str
        What an error message says beside that the package is to be installed.

    Raises
    ------
    PlacementError
        If it is missing, or another version.
    """
    if "error" in found:
        raise PlacementError(
            f"{who} cannot import {package} ({found['error']}). Install it there, for {found['python']}{remedy}."
        )
    if found["version"] != here:
        raise PlacementError(
            f"{package} is {found['version']} on {who} and {here} on the client: "
            "install the same version in both places."
        )


def refuse_plaintext(client: Client, allow: bool | None, what: str) -> None:
    """On a ``tls://`` cluster, ask for a word of consent before `what` is sent in the clear.

    Raises
    ------
    PlacementError
        If the cluster uses TLS and neither `allow` nor the configuration consents.
    """
    address = client.scheduler.address
    if address.startswith("tls://") and not config.get("allow-plaintext", allow):
        raise PlacementError(
            f"the cluster at {address} is protected by TLS, and {what} is plain TCP between the workers. "
            "If their network is private, pass allow_plaintext=True "
            "(or set the Dask configuration dask-bridges.allow-plaintext: true)."
        )
