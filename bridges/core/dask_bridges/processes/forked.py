"""A child process that is there and waits for its work: who needs it then has it at once."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from concurrent.futures import Future
from multiprocessing import Pipe

from distributed import Worker

from dask_bridges.processes.forkserver import Environment, ForkServer, Process, fork_server
from dask_bridges.processes.output import Output
from dask_bridges.processes.server import pass_descriptors

__all__ = ["Forked"]


class Forked:
    """A child of a worker from its fork, which takes its server some milliseconds, until it has work.

    Parameters
    ----------
    worker : distributed.Worker
    environment : Environment
    server : ForkServer, optional
        The worker's one for that environment, by who has just asked for it.

    Attributes
    ----------
    server : ForkServer
    process : Future of Process
        `PlacementError` if the modules of the environment cannot be imported; `OSError` without a process.
    pipe : Connection
    output : Output
    """

    def __init__(self, worker: Worker, environment: Environment, server: ForkServer | None = None) -> None:
        self.output = Output()
        self.pipe, theirs = Pipe()
        try:
            self.server = server or fork_server(worker, environment)
            self.process: Future[Process] = self.server.fork([theirs.fileno(), *self.output.theirs])
        finally:
            theirs.close()
            self.output.started()

    @property
    def alive(self) -> bool:
        """Whether it is there, or may still come."""
        if not self.process.done():
            return True
        return self.process.exception() is None and not self.process.result().ended.done()

    def begin(self, work: bytes, descriptors: Mapping[int, int], variables: Mapping[str, str]) -> None:
        """Give it its work, some of this process's descriptors by their numbers there, and more variables.

        Raises
        ------
        OSError
            If it has ended.
        """
        setting = (sys.path, {**self.server.variables, **variables}, os.getcwd(), tuple(descriptors))
        self.pipe.send(setting)
        pass_descriptors(self.pipe, tuple(descriptors.values()))
        self.pipe.send_bytes(work)

    def discard(self) -> None:
        """Nobody needs it: it ends, at once or when it has come."""
        self.process.add_done_callback(_kill)
        self.output.end()
        with contextlib.suppress(OSError):
            self.pipe.close()


def _kill(process: Future[Process]) -> None:
    if process.exception() is None:
        process.result().kill()
