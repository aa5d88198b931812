"""A TensorFlow cluster in Dask workers: what starting, feeding and steps cost, beside the same servers started by hand.

The servers by hand are processes of their own on fixed ports, and train with the same code on rows in their memory;
ours belong to Dask workers and read rows that were fed from Dask arrays. Starting is from the call until all servers
answer.

A step is bound by the messages between chief, worker and parameter server; batches are bound by copies in memory.

Run: python benchmarks/tf_cluster.py [--runs 3]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dask.array as da
import numpy as np
from distributed import Client, LocalCluster

import dask_tf
from dask_bridges.events import Progress
from results import show

ROWS, COLUMNS, BATCH = 400_000, 128, 1024
ROUNDS, PASSES, CLOSURE = 6, 5, 20
STEPS, UNITS = 3000, 64
OURS, HAND = "start_tensorflow, feed", "servers started by hand"
MEMORY = "from_tensor_slices in memory, in order"


# Starting


def starts(client: Client) -> None:
    up, down = [], []
    client.restart()
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        cluster = dask_tf.start_tensorflow(client, ps=1, worker=2)
        middle = time.perf_counter()
        cluster.close()
        up.append(middle - start)
        down.append(time.perf_counter() - middle)
    found = {"start": up[1:], "the first, TensorFlow is imported": up[:1], "stop": down}
    show("ps=1, worker=2, and a chief, on 3 Dask workers", "s", found)


async def lag(seconds: float, pause: float = 0.005) -> list[float]:
    """How late a worker's event loop is, again and again, in milliseconds."""
    late, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        await asyncio.sleep(pause)
        late.append(1000 * (time.perf_counter() - start - pause))
    return late


def lags(client: Client) -> None:
    def during(work: Callable[[], Any], seconds: float) -> list[float]:
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(client.run, lag, seconds)
            work()
            return [float(np.percentile(late, 99)) for late in found.result().values()]

    def start_and_train() -> None:
        with dask_tf.start_tensorflow(client, ps=1, worker=2) as cluster:
            X = da.random.random((8 * BATCH, COLUMNS), chunks=(BATCH, COLUMNS)).astype("float32")
            cluster.feed(X, X[:, 0])
            dask_tf.fit(cluster, new_model(), batch_size=32, steps_per_epoch=1500, progress=False)

    idle, ours = "idle", "while TensorFlow is imported, and trains"
    found = {ours: during(start_and_train, 20.0), idle: during(lambda: None, 3.0)}
    case = "lag of a Dask worker's event loop, 99th percentile, 3 workers"
    show(case, "ms", found, ours=ours, limits=[idle], turns=False, head=False)


# Feeding


def rate(step: Callable[[], int]) -> float:
    """Millions of rows a second."""
    start = time.perf_counter()
    rows = step()
    return rows / (time.perf_counter() - start) / 1e6


def rates_in_role(cluster: Any, shuffle: bool) -> list[float]:
    """In the process of a task: passes over its feed, beside the same rows in memory."""
    import tensorflow as tf

    def one_pass(batches: Any) -> int:
        return sum(int(x.shape[0]) for x, _ in batches)

    rng = np.random.default_rng(0)
    X, y = rng.random((ROWS, COLUMNS), dtype="float32"), rng.random(ROWS, dtype="float32")
    local = tf.data.Dataset.from_tensor_slices((X, y)).batch(BATCH)
    ours = cluster.dataset("train", BATCH, shuffle=shuffle, seed=0)
    found = []
    for _ in range(PASSES + 1):
        found += [rate(lambda: one_pass(local)), rate(lambda: one_pass(ours))]
    return found[2:]


def rates_in_server(cluster: Any, shuffle: bool) -> list[float]:
    """In the chief: batches that a parameter-server worker takes, so many a closure."""
    import tensorflow as tf

    from dask_tf.training import connect

    with connect(cluster.tf_spec.as_dict()) as coordinator:
        iterator, _ = coordinator.iterate(lambda: cluster.dataset("train", BATCH, shuffle=shuffle, seed=0, repeat=None))

        @tf.function
        def take(batches: Any) -> Any:
            total = tf.constant(0, tf.int32)
            for _ in range(CLOSURE):
                x, y = next(batches)
                total += tf.shape(x)[0] + 0 * tf.cast(y[0], tf.int32)
            return total

        def one_pass() -> int:
            sent = [coordinator.cluster.schedule(take, args=(iterator,)) for _ in range(ROWS // BATCH // CLOSURE)]
            return sum(int(value.fetch()) for value in sent)

        return [rate(one_pass) for _ in range(PASSES + 1)][1:]


def feeding(client: Client) -> None:
    X = da.random.random((ROWS, COLUMNS), chunks=(ROWS // 8, COLUMNS)).astype("float32").persist()
    y = X[:, 0].persist()
    with dask_tf.start_tensorflow(client, ps=1, worker=1) as cluster:
        start = time.perf_counter()
        cluster.feed(X, y, to="worker:0")
        size = ROWS * (COLUMNS + 1) * 4 / 1e6
        show(f"{size:.0f} MB fed", "s", {"feed": [time.perf_counter() - start]}, head=False)
        for shuffle, how in ((False, "in order"), (True, "shuffled by row")):
            found = client.gather(cluster.run("worker:0", rates_in_role, cluster, shuffle))[0]
            local, ours = found[::2], found[1::2]
            there = client.gather(cluster.run("chief:0", rates_in_server, cluster, shuffle))[0]
            ways = {"in a role function": ours, f"in a parameter-server worker, {CLOSURE} a closure": there}
            for where, rates in ways.items():
                case = f"batches of {BATCH} x {COLUMNS} float32, {how}, {where}"
                both = {"feed": rates, MEMORY: local}
                turns = rates is ours
                show(case, "Mrows/s", both, ours="feed", limits=[MEMORY], more=True, turns=turns, head=False)
            cluster.restart("chief", 0)


# Steps


def new_model() -> Any:
    import keras

    keras.utils.set_random_seed(0)
    layers = [keras.layers.Input((COLUMNS,)), keras.layers.Dense(UNITS, activation="relu"), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile("sgd", "mse")
    return model


#: The same servers without Dask, and the same training with the same code.
_BY_HAND = """
import sys, time
import tensorflow as tf
if sys.argv[1] != "chief":
    role, port = sys.argv[1], sys.argv[2]
    tf.distribute.Server(tf.train.ClusterSpec({role: ["127.0.0.1:" + port]}), job_name=role, task_index=0)
    print("up", flush=True)
    sys.stdin.read()
else:
    sys.path.insert(0, sys.argv[5])
    import numpy as np
    from tf_cluster import BATCH, COLUMNS, STEPS, new_model
    from dask_tf.training import connect, fit
    rng = np.random.default_rng(0)
    X = rng.random((8 * BATCH, COLUMNS), dtype="float32")
    spec = {"ps": ["127.0.0.1:" + sys.argv[2]], "worker": ["127.0.0.1:" + sys.argv[3]],
            "chief": ["127.0.0.1:" + sys.argv[4]]}
    with connect(spec) as coordinator:
        def data():
            return tf.data.Dataset.from_tensor_slices((tf.constant(X), tf.constant(X[:, 0]))).batch(32)
        marks = []
        def report(kind, **fields):
            if kind == "progress":
                marks.append((fields["done"], time.perf_counter()))
        fit(coordinator, new_model(), data, steps_per_epoch=STEPS, report=report)
    later = [mark for mark in marks if mark[0] >= STEPS // 4]
    print((later[-1][0] - later[0][0]) / (later[-1][1] - later[0][1]), flush=True)
"""


def steps_by_hand() -> float:
    import socket

    held = []
    for _ in range(3):
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        one.bind(("", 0))
        held.append(one)
    ports = [str(one.getsockname()[1]) for one in held]
    environment = {**os.environ, "TF_GRPC_REUSE_PORT": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    servers = [
        subprocess.Popen(
            [sys.executable, "-c", _BY_HAND, role, port], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=environment,
        )
        for role, port in zip(("ps", "worker"), ports)
    ]  # fmt: skip
    try:
        for server in servers:
            assert server.stdout is not None
            server.stdout.readline()
        command = [sys.executable, "-c", _BY_HAND, "chief", *ports, os.path.dirname(os.path.abspath(__file__))]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return float(done.stdout.split()[-1])
    finally:
        for server in servers:
            server.kill()
            server.wait()


def steps_on_dask(client: Client) -> float:
    X = da.random.random((8 * BATCH, COLUMNS), chunks=(BATCH, COLUMNS)).astype("float32")
    marks: list[tuple[int, float]] = []

    def listener(event: Any) -> None:
        if isinstance(event, Progress):
            marks.append((event.done, event.time))

    with dask_tf.start_tensorflow(client, ps=1, worker=1) as cluster:
        cluster.feed(X, X[:, 0])
        cluster.listen(listener)
        dask_tf.fit(cluster, new_model(), batch_size=32, steps_per_epoch=STEPS, shuffle=False, progress=False)
    later = [mark for mark in marks if mark[0] >= STEPS // 4]
    return (later[-1][0] - later[0][0]) / (later[-1][1] - later[0][1])


def steps(client: Client, runs: int) -> None:
    hand, ours = zip(*[(steps_by_hand(), steps_on_dask(client)) for _ in range(runs)])
    case = "a small Keras model on 1 parameter server and 1 worker, batches of 32"
    show(case, "steps/s", {OURS: ours, HAND: hand}, ours=OURS, more=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3, help="of the trainings")
    options = parser.parse_args()
    with (
        LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        lags(client)
        starts(client)
        feeding(client)
        steps(client, options.runs)


if __name__ == "__main__":
    main()
