"""TensorFlow clusters on the Dask workers that all tests share."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import psutil
import pytest
from distributed import Client, LocalCluster

from dask_bridges.events import Event
from dask_bridges.testing import leftovers


def _missing() -> str:
    if sys.platform != "linux":
        return "tasks need Linux"
    return "" if importlib.util.find_spec("tensorflow") else "needs TensorFlow"


@pytest.fixture(scope="module")
def tensorflow_cluster(bridges_cluster: LocalCluster) -> Iterator[Any]:
    """A cluster of one parameter server and two workers that the tests of a file share."""
    if missing := _missing():
        pytest.skip(missing)
    from dask_tf import start_tensorflow

    with Client(bridges_cluster, set_as_default=False) as client:
        client.wait_for_workers(3, timeout=60)
        with start_tensorflow(client, ps=1, worker=2, environment={"GREETING": "hello"}) as cluster:
            yield cluster
        assert leftovers(client) == {}


@pytest.fixture
def start(bridges_client: Client) -> Callable[..., Any]:
    """``start(ps=1, worker=2)`` starts a cluster; to be closed."""
    if missing := _missing():
        pytest.skip(missing)
    from dask_tf import start_tensorflow

    def started(client: Client = bridges_client, /, **options: Any) -> Any:
        return start_tensorflow(client, **options)

    return started


class Watch:
    """Waits for what a cluster tells."""

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster
        self._changed = threading.Condition()
        cluster.listen(self._hear)

    def _hear(self, event: Event) -> None:
        with self._changed:
            self._changed.notify_all()

    def until(self, predicate: Callable[[], Any], timeout: float = 60) -> Any:
        """Wait until `predicate()` holds, looked at after every event; what it gave."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not (found := predicate()):
                assert time.monotonic() < deadline, f"not within {timeout} s: {self.cluster.status()}"
                self._changed.wait(0.2)
        return found

    def row(self, task: str) -> Mapping[str, Any]:
        """The status of a task."""
        found: Mapping[str, Any] = next(row for row in self.cluster.status() if row["task"] == task)
        return found

    def until_back(self, task: str, restarts: int = 1) -> Mapping[str, Any]:
        """Wait until a task has been lost so often and is up."""
        self.until(lambda: self.row(task)["restarts"] >= restarts and self.row(task)["state"] == "up")
        return self.row(task)

    def until_ended(self) -> None:
        """Wait until the cluster has."""
        self.until(lambda: {row["state"] for row in self.cluster.status()} == {"ended"})

    def processes(self) -> list[psutil.Process]:
        """Those of all tasks."""
        return [psutil.Process(row["pid"]) for row in self.cluster.status() if row["pid"]]


@pytest.fixture
def watch() -> type[Watch]:
    """``watch(cluster)`` waits for what it tells."""
    return Watch


@pytest.fixture
def gone() -> Callable[[Sequence[psutil.Process]], None]:
    """``gone(processes)`` asserts that they end within seconds."""

    def gone(processes: Sequence[psutil.Process]) -> None:
        alive = [process for process in processes if process.is_running()]
        assert psutil.wait_procs(alive, timeout=5)[1] == []

    return gone
