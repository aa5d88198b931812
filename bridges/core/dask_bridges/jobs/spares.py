"""Processes forked ahead, so that a job finds one that has its frameworks imported."""

from __future__ import annotations

import threading

from distributed import Worker

from dask_bridges.processes import Environment
from dask_bridges.processes.forked import Forked
from dask_bridges.processes.forkserver import end_servers, fork_server

__all__ = ["Spares"]

#: How many environments keep a fork server with their frameworks imported, on each worker: those last used.
SERVERS = 4


class Spares:
    """Processes that wait for the next jobs of a pool, of the environment that the last job had.

    Parameters
    ----------
    worker : distributed.Worker
    count : int
        How many wait at most.
    environment : Environment
        Of the first.
    """

    def __init__(self, worker: Worker, count: int, environment: Environment) -> None:
        self._worker = worker
        self.count = count
        self._lock = threading.Lock()
        self._waiting: list[Forked] = []
        self._environments: dict[Environment, None] = {}
        self._closed = False
        self.fill(environment)

    def take(self, environment: Environment) -> Forked:
        """A process for a job."""
        server = fork_server(self._worker, environment)
        with self._lock:
            fit = [spare for spare in self._waiting if spare.server is server and spare.alive]
            unfit = [spare for spare in self._waiting if spare not in fit]
            forked = fit.pop(0) if fit else None
            self._waiting = fit
        for spare in unfit:
            spare.discard()
        return forked or Forked(self._worker, environment, server)

    def fill(self, environment: Environment) -> None:
        """Fork those that are missing, while the job works that has taken one."""
        with self._lock:
            self._environments.pop(environment, None)
            self._environments[environment] = None  # the newest is last
            oldest = list(self._environments)[:-SERVERS]
            for name in oldest:
                del self._environments[name]
            if not self._closed and len(self._waiting) < self.count:
                server = fork_server(self._worker, environment)
                missing = self.count - len(self._waiting)
                self._waiting += [Forked(self._worker, environment, server) for _ in range(missing)]
        if oldest:
            arguments = self._worker, oldest
            threading.Thread(target=end_servers, args=arguments, name="jobs-servers", daemon=True).start()

    def close(self) -> None:
        """End them, and the fork servers; they are gone when this returns."""
        with self._lock:
            self._closed, waiting, self._waiting = True, self._waiting, []
        for spare in waiting:
            spare.discard()
        end_servers(self._worker, self._environments)
