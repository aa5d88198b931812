"""Workers that are lost while they train: clusters for tests that kill some, and who kills them."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask.config
import xgboost as xgb
from distributed import Client, LocalCluster, get_worker
from xgboost import collective

from dask_bridges.testing import wait_until_free

__all__ = ["DiesOnce", "die", "doomed_client"]

#: With fewer workers other rows are drawn, so a training waits for a killed one for as long as a busy machine needs.
DEADLINES = {"stop-timeout": "5s", "start-timeout": "60s", "timeout": "60s", "worker-return-timeout": "300s"}


@contextlib.contextmanager
def doomed_client(workers: int) -> Iterator[Client]:
    """A client of a cluster of its own, of which workers may be killed; afterwards no turn is held."""
    with (
        dask.config.set({f"dask-bridges.{name}": value for name, value in DEADLINES.items()}),
        LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.wait_for_workers(workers, timeout=60)
        yield client
        wait_until_free(client, timeout=10)


def die() -> None:
    """Be killed, as for memory: no goodbye."""
    os.kill(os.getpid(), signal.SIGKILL)


def _address() -> str:
    return str(get_worker().address)


class DiesOnce(xgb.callback.TrainingCallback):
    """Kills the worker of a rank after a round, once; leaves a note in `mark`, by default the worker's address."""

    def __init__(self, mark: Path, *, rank: int = 1, round_: int = 2, note: Callable[[], str] = _address) -> None:
        self.mark, self.rank, self.round, self.note = mark, rank, round_, note

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        if (collective.get_rank(), epoch) == (self.rank, self.round) and not self.mark.exists():
            self.mark.write_text(self.note())
            die()
        return False
