"""Clusters for tests."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distributed import Client

from dask_bridges.testing.hosts import Network

__all__ = ["CommandLineCluster", "cluster_of_hosts", "command_line_cluster"]


@dataclass(frozen=True)
class CommandLineCluster:
    """A cluster of separate processes.

    Attributes
    ----------
    client : Client
    scheduler : subprocess.Popen
    workers : list of subprocess.Popen
        Each a nanny with its worker, or a worker alone.
    """

    client: Client
    scheduler: subprocess.Popen[bytes]
    workers: list[subprocess.Popen[bytes]]


@contextlib.contextmanager
def command_line_cluster(
    *, workers: int = 2, threads: int = 1, nanny: bool = True, bare_scheduler: bool = False, bare_workers: int = 0
) -> Iterator[CommandLineCluster]:
    """A cluster started as operators do, by ``dask scheduler`` and ``dask worker``, with a client.

    Parameters
    ----------
    workers, threads : int
        Worker processes, and threads of each.
    nanny : bool
        Whether a nanny watches each worker.
    bare_scheduler : bool
        Whether the scheduler runs without this package and the frameworks.
    bare_workers : int
        More workers, that do.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        file = str(Path(folder) / "scheduler.json")
        common = ["--scheduler-file", file, "--interface", "lo", "--dashboard-address", ":0"]
        if bare_scheduler:
            scheduler = _run(stack, "-c", _BARE + _SCHEDULER, file)
        else:
            scheduler = _run(stack, "-m", "dask", "scheduler", "--port", "0", *common)
        watched = "--nanny" if nanny else "--no-nanny"
        each = ["worker", "--nthreads", str(threads), "--local-directory", folder, watched, *common]
        started = [_run(stack, "-m", "dask", *each) for _ in range(workers)]
        started += [_run(stack, "-c", _BARE + _WORKER, file, folder) for _ in range(bare_workers)]
        client = stack.enter_context(Client(scheduler_file=file))
        client.wait_for_workers(workers + bare_workers, timeout=60)
        yield CommandLineCluster(client, scheduler, started)


@contextlib.contextmanager
def cluster_of_hosts(
    hosts: Network, scheduler: str, workers: Sequence[str], environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """A cluster whose parts run on hosts of a network: the address of its scheduler.

    Parameters
    ----------
    hosts : Network
    scheduler : str
        The host it runs on.
    workers : sequence of str
        The host of each worker, which has one thread and is named after its host.
    environment : mapping, optional
        More for theirs.
    """
    address = f"tcp://{hosts.address(scheduler)}:8786"
    start = functools.partial(_start_on, hosts, {**os.environ, **(environment or {})})
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        listen = ["--host", hosts.address(scheduler), "--port", "8786", "--dashboard-address", "127.0.0.1:0"]
        start(stack, scheduler, ["scheduler", *listen])
        for host in workers:
            listen = ["--host", hosts.address(host), "--dashboard-address", "127.0.0.1:0", "--name", host]
            start(stack, host, ["worker", address, *listen, "--nthreads", "1", "--local-directory", folder])
        yield address


def _start_on(
    hosts: Network, environment: dict[str, str], stack: contextlib.ExitStack, host: str, arguments: list[str]
) -> None:
    command = hosts.on(host, [sys.executable, "-m", "dask", *arguments])
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    stack.callback(_end, process)


#: Begins a process that can import neither the bridges nor what they bridge to.
_BARE = """
import asyncio, sys
from distributed import Scheduler, Worker

class Missing:
    def find_spec(self, name, path=None, target=None):
        ours = {"dask_bridges", "dask_xgboost", "dask_tf", "dask_keras", "dask_serializers"}
        if name.partition(".")[0] in ours | {"xgboost", "tensorflow", "keras"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""
_SCHEDULER = """
async def main():
    async with Scheduler(host="127.0.0.1", port=0, dashboard_address=":0", scheduler_file=sys.argv[1]) as scheduler:
        await scheduler.finished()

asyncio.run(main())
"""
_WORKER = """
async def main():
    options = {"local_directory": sys.argv[2], "dashboard_address": ":0", "nthreads": 1}
    async with Worker(scheduler_file=sys.argv[1], host="127.0.0.1", **options) as worker:
        await worker.finished()

asyncio.run(main())
"""


def _run(stack: contextlib.ExitStack, *arguments: str) -> subprocess.Popen[bytes]:
    """Start Python, to be ended with the stack; killed where it does not end."""
    process = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.DEVNULL)
    stack.callback(_end, process)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
