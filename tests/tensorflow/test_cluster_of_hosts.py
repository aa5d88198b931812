"""A TensorFlow cluster whose tasks are on two hosts, each with an interface that leads nowhere."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import dask.array as da
import numpy as np
import pytest
from distributed import Client

from dask_bridges.testing.clusters import cluster_of_hosts
from dask_bridges.testing.hosts import missing_for_networks, network

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs TensorFlow"),
]

#: Runs on a host of the network: opens a client and calls what the file holds.
_PART = """
import sys, cloudpickle
from distributed import Client
with open(sys.argv[2], "rb") as file:
    function, arguments = cloudpickle.load(file)
with Client(sys.argv[1], timeout=60) as client:
    function(client, *arguments)
"""


@pytest.mark.slow  # TensorFlow is imported on two new hosts
def test_tasks_on_two_hosts_advertise_what_reaches_them_and_a_chief_trains_across(tmp_path: Path) -> None:
    if missing := missing_for_networks():
        pytest.skip(missing)
    with network("one", "two") as hosts, cluster_of_hosts(hosts, "one", ["one", "two"]) as address:
        file = tmp_path / "part"
        ours = {host: hosts.address(host) for host in ("one", "two")}
        file.write_bytes(cloudpickle.dumps((_start_across, (ours,))))
        command = hosts.on("one", [sys.executable, "-c", _PART, address, str(file)])
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=150)
        assert done.returncode == 0, done.stderr


def _start_across(client: Client, hosts: dict[str, str]) -> None:
    from dask_tf import start_tensorflow

    client.wait_for_workers(2, timeout=60)
    with start_tensorflow(client, ps=1, worker=1, chief=1, share=True) as cluster:
        places = {row["task"]: row["worker"] for row in cluster.status()}
        for row in cluster.status():
            host = row["worker"].removeprefix("tcp://").rpartition(":")[0]
            assert host in hosts.values()
            assert row["address"].rpartition(":")[0] == host
        assert places["ps:0"] != places["worker:0"]
        cluster.feed(da.from_array(np.arange(100.0, dtype="float32"), chunks=10))
        [found] = client.gather(cluster.run("chief", _train, cluster))
        assert found == (3.0, float(np.arange(100.0).sum()), "/job:ps/replica:0/task:0/device:CPU:0")


def _train(cluster: Any) -> tuple[float, float, str]:
    """A variable on the parameter server is assigned and read, and a worker sums its rows into another."""
    import tensorflow as tf

    spec = tf.train.ClusterSpec({role: cluster.tf_spec.job_tasks(role) for role in ("ps", "worker")})
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(spec, rpc_layer="grpc")
    strategy = tf.distribute.ParameterServerStrategy(resolver)
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    with strategy.scope():
        variable, total = tf.Variable(1.0), tf.Variable(0.0)
    variable.assign(3.0)

    def add(iterator: Any) -> None:
        total.assign_add(tf.reduce_sum(next(iterator)))

    rows = coordinator.create_per_worker_dataset(lambda: cluster.dataset("train", 100))
    coordinator.schedule(tf.function(add), args=(iter(rows),))
    coordinator.join()
    return float(variable.numpy()), float(total.numpy()), variable.device
