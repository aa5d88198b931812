"""The contract between hosts: addresses, and hosts that go silent with all connections open."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from distributed import Client

from dask_bridges import MemberLost
from dask_bridges.testing.clusters import cluster_of_hosts
from dask_bridges.testing.contract.base import Contract, make_data
from dask_bridges.testing.hosts import Network, missing_for_networks, network
from dask_bridges.testing.traces import wait_until_free

__all__ = ["HostContract"]

#: Seconds after which a silent host is found in these tests.
HOST_TIMEOUT = 3
#: Dask's own time-out for connections that are silent, in seconds: the shortest that it takes.
TCP_TIMEOUT = 11

#: Runs on a host of the network: opens a client and calls what the file holds.
_PART = """
import sys, cloudpickle
from distributed import Client
with open(sys.argv[2], "rb") as file:
    function, arguments = cloudpickle.load(file)
with Client(sys.argv[1], timeout=60) as client:
    function(client, *arguments)
"""


class HostContract(Contract):
    """It trains between hosts, and does not wait for those that are gone."""

    def test_trains_between_hosts_with_two_interfaces_of_which_one_leads_nowhere(self, tmp_path: Path) -> None:
        with _hosts("one", "two") as hosts, cluster_of_hosts(hosts, "one", ["one", "two"]) as address:
            part = _Part(hosts, "one", address, tmp_path / "trains")
            part.start(_train_on_all, self)
            part.finish()

    def test_a_host_that_goes_silent_is_found_and_the_next_training_runs(self, tmp_path: Path) -> None:
        with _hosts("one", "two", "lost") as hosts, cluster_of_hosts(hosts, "one", ["one", "two", "lost"]) as address:
            part = _Part(hosts, "one", address, tmp_path / "finds")
            part.start(_lose_one, self, str(tmp_path / "held"))
            part.wait_for(tmp_path / "held")
            hosts.unplug("lost")
            part.finish()

    @pytest.mark.slow  # it waits for a connection to be given up
    def test_members_end_when_the_host_of_their_caller_goes_silent(self, tmp_path: Path) -> None:
        quick = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": f"{TCP_TIMEOUT}s"}
        with (
            _hosts("one", "two", "caller") as hosts,
            cluster_of_hosts(hosts, "one", ["one", "two"], quick) as address,
        ):
            caller = _Part(hosts, "caller", address, tmp_path / "calls")
            caller.start(_train_until_gone, self, str(tmp_path / "held"))
            try:
                caller.wait_for(tmp_path / "held")
                hosts.unplug("caller")
                part = _Part(hosts, "one", address, tmp_path / "sees")
                part.start(_see_them_end, self)
                part.finish()
            finally:
                caller.kill()


@contextlib.contextmanager
def _hosts(*names: str) -> Iterator[Network]:
    if missing := missing_for_networks():
        pytest.skip(missing)
    with network(*names) as hosts:
        yield hosts


class _Part:
    """A process with a client, on a host."""

    def __init__(self, hosts: Network, host: str, address: str, file: Path) -> None:
        self._file = file
        self._command = hosts.on(host, [sys.executable, "-c", _PART, address, str(file)])

    def start(self, function: Callable[..., None], *arguments: Any) -> None:
        """Start it; it calls ``function(client, *arguments)``."""
        self._file.write_bytes(cloudpickle.dumps((function, arguments)))
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)

    def wait_for(self, file: Path) -> None:
        """Wait until it has made a file."""
        deadline = time.monotonic() + 120  # it imports frameworks, as do all workers
        while not file.exists():
            assert self._process.poll() is None, self._process.communicate()[1]
            assert time.monotonic() < deadline, f"no {file} after 120 s"
            time.sleep(0.05)  # its host and theirs have these processors, too

    def finish(self) -> None:
        """Wait for its end; what it raised is an assertion here."""
        try:
            errors = self._process.communicate(timeout=90)[1]
        finally:
            self.kill()
        assert self._process.returncode == 0, errors

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


# What parts do


def _train_on_all(client: Client, contract: Contract) -> None:
    client.wait_for_workers(2, timeout=60)
    X, y = make_data()
    contract.check(contract.train(client, X, y), X, y)
    wait_until_free(client, timeout=5)


def _lose_one(client: Client, contract: Contract, held: str) -> None:
    """Train on all hosts; the rank on the lost one is named, in time, and the others go on."""
    import dask.config

    client.wait_for_workers(3, timeout=60)
    names = {worker["name"]: address for address, worker in client.scheduler_info(n_workers=-1)["workers"].items()}
    X, y = make_data()
    hold = Announced(held)
    deadlines = {"dask-bridges.host-timeout": f"{HOST_TIMEOUT}s", "dask-bridges.stop-timeout": "5s"}
    with dask.config.set(deadlines), pytest.raises(MemberLost, match="host does not answer") as caught:
        contract.train(client, X, y, fault=hold, rounds=1_000_000)
    assert caught.value.worker == names["lost"]
    wait_until_free(client, timeout=5)
    contract.check(contract.train(client, X, y), X, y)


def _train_until_gone(client: Client, contract: Contract, held: str) -> None:
    client.wait_for_workers(2, timeout=60)
    X, y = make_data()
    contract.train(client, X, y, fault=Announced(held), rounds=1_000_000)


def _see_them_end(client: Client, contract: Contract) -> None:
    """Within the TCP timeout and 10 seconds; then the next training runs."""
    wait_until_free(client, timeout=TCP_TIMEOUT + 10)
    X, y = make_data()
    contract.check(contract.train(client, X, y), X, y)


class Announced:
    """A fault that says by a file that the training runs, and lets it."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __call__(self, rank: int, round: int) -> None:
        """Called by the bridge's member after each round."""
        if (rank, round) == (0, 0):
            Path(self.file).touch()
