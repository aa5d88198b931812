"""`dask_keras.fit` on 2 processes: steps beside a MultiWorkerMirrored run by hand and one process; starts; batches.

Two dense networks are trained in batches of 256 rows, a half on each process. Each process computes with one thread,
and what starts and traces is not counted. Keras 3 under MultiWorkerMirroredStrategy fails at its first batch
(keras#20585): the run by hand has the two functions corrected that are at fault. Batches are counted in this process,
as a rank has them, from files in shared memory.

A step is bound by the products of the network, and by what Keras and TensorFlow spend on each batch whatever its
size; then by the sum of the gradients over both processes. Two processes of one thread give at most twice the steps
of one.

Run: python benchmarks/keras_fit.py [--runs 3] [--passes 9]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from results import show

PROCESSES, BATCH, COLUMNS = 2, 256, 64
#: Of two hidden layers: about 50,000 and 1 million parameters.
UNITS = (190, 958)
FIRST, STEPS = 20, 120
FEED_ROWS, FEED_COLUMNS = 200_000, 128
OURS, HAND, ALONE = "dask_keras.fit", "MultiWorkerMirroredStrategy by hand", "model.fit, 1 process"
FEED, UNEVEN = "feed", "feed of a rank with 4/7 of the rows"
MEMORY, GENERATOR = "from_tensor_slices", "from_generator, a row"


# Steps


def network(units: int) -> Any:
    keras.utils.set_random_seed(0)
    layers = [keras.Input((COLUMNS,))]
    layers += [keras.layers.Dense(units, activation="relu") for _ in range(2)]
    model = keras.Sequential([*layers, keras.layers.Dense(1)])
    # XLA cannot call back, so that ours goes without; nor do collectives of TensorFlow compile on a CPU.
    model.compile("adam", "mse", jit_compile=False)
    return model


def rows() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    X = rng.random((STEPS * BATCH, COLUMNS), dtype="float32")
    return X, X[:, 0].copy()


class Clock(keras.callbacks.Callback):
    """Steps a second, once all is traced and warm."""

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if batch == FIRST:
            self.start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == STEPS - 1:
            self.rate = (STEPS - FIRST) / (time.perf_counter() - self.start)


def held(client: Any) -> tuple[Any, Any]:
    """The rows on the workers, a half each."""
    import dask.array as da

    def half(array: Any, at: int) -> Any:
        future = client.scatter(array[at::PROCESSES], workers=[sorted(client.nthreads())[at]])
        return da.from_delayed(future, (STEPS * BATCH // PROCESSES, *array.shape[1:]), array.dtype)

    X, y = (da.concatenate([half(array, at) for at in range(PROCESSES)]) for array in rows())
    return X, y


def on_dask(client: Any, X: Any, y: Any, units: int) -> float:
    import dask_keras

    clock = Clock()
    dask_keras.fit(
        client, network(units), X, y, batch_size=BATCH, callbacks=[clock], workers=PROCESSES, shuffle=False, verbose=0
    )
    return float(clock.rate)


def by_hand(script: str, processes: int) -> list[float]:
    """What rank 0 of processes of this file's own prints, for each model."""
    held = [socket.socket() for _ in range(processes)]
    for one in held:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        one.bind(("", 0))
    hosts = [f"127.0.0.1:{one.getsockname()[1]}" for one in held]
    running = []
    for rank in range(processes):
        config = {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": rank}}
        environment = {**os.environ, "TF_GRPC_REUSE_PORT": "1"}
        if processes > 1:
            environment["TF_CONFIG"] = json.dumps(config)
        running.append(
            subprocess.Popen(
                [sys.executable, __file__, script],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            )
        )  # fmt: skip
    try:
        told = [one.communicate(timeout=180) for one in running]
    finally:
        for one in running:
            one.kill()
    if any(one.returncode for one in running):
        raise RuntimeError(told[0][1][-3000:])
    return [float(word) for word in told[0][0].split()]


def one_thread() -> None:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(2)  # as ours has


def alone() -> None:
    """In a process of its own: all rows, no strategy."""
    import tensorflow as tf

    one_thread()
    for units in UNITS:
        clock = Clock()
        data = tf.data.Dataset.from_tensor_slices(rows()).batch(BATCH).prefetch(2)
        network(units).fit(data, callbacks=[clock], verbose=0)
        print(clock.rate)


def mirrored() -> None:
    """In one of two processes: its half of the rows, under the strategy."""
    import tensorflow as tf

    one_thread()
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    correct_keras()

    def its_rows(context: Any) -> Any:
        X, y = (a[context.input_pipeline_id :: PROCESSES] for a in rows())
        size = context.get_per_replica_batch_size(BATCH)
        return tf.data.Dataset.from_tensor_slices((X, y)).batch(size).repeat().prefetch(2)

    for units in UNITS:
        with strategy.scope():
            model = network(units)
        clock, data = Clock(), strategy.distribute_datasets_from_function(its_rows)
        model.fit(data, steps_per_epoch=STEPS, callbacks=[clock], verbose=0)
        print(clock.rate, flush=True)


def correct_keras() -> None:
    """As keras#20585 would have it: inputs are not reduced, and scalars have no axis."""
    import tensorflow as tf
    from keras.src.backend.tensorflow import trainer

    def symbolic_build(self: Any, iterator: Any = None, data_batch: Any = None) -> None:
        strategy = self.distribute_strategy
        if iterator is not None:
            for _, _, batches in iterator:
                data_batch = tf.nest.map_structure(lambda x: strategy.experimental_local_results(x)[0], next(batches))
                break
        with strategy.scope():
            self._symbolic_build(data_batch=data_batch)

    def reduced(values: Any, strategy: Any, reduction: str) -> Any:
        return keras.tree.map_structure(lambda v: strategy.reduce("MEAN", v, axis=None), values)

    trainer.TensorFlowTrainer._maybe_symbolic_build = symbolic_build
    trainer.reduce_per_replica = reduced


def steps(client: Any, X: Any, y: Any, runs: int) -> None:
    found = []
    for _ in range(runs):  # in turns, so that what else this machine does falls on all
        ours = [on_dask(client, X, y, units) for units in UNITS]
        found.append((by_hand("mirrored", PROCESSES), ours, by_hand("alone", 1)))
    for at, units in enumerate(UNITS):
        hand, ours, one = ([rates[at] for rates in way] for way in zip(*found))
        case = f"fit, {network(units).count_params():,} parameters, batches of {BATCH}, Adam"
        show(case, "steps/s", {OURS: ours, HAND: hand, ALONE: one}, ours=OURS, limits=[ALONE], more=True)


# Starts


class Begun(keras.callbacks.Callback):
    """When the ranks have met, and their first batch is next."""

    def on_train_begin(self, logs: Any = None) -> None:
        self.at = time.time()


def starts(client: Any, X: Any, y: Any, runs: int) -> None:
    """The first training on new workers, which import TensorFlow, and those after it."""
    import dask_keras

    found = []
    for _ in range(1 + runs):
        begun, model, called = Begun(), network(UNITS[0]), time.time()
        dask_keras.fit(client, model, X, y, batch_size=BATCH, steps_per_epoch=1, callbacks=[begun], verbose=0)
        found.append(begun.at - called)
    first_and_later = {"first fit": found[:1], "fit after fit": found[1:]}
    show("from the call of fit until it trains", "s", first_and_later, head=False)


# Feeding


def one_pass(batches: Any) -> float:
    """Millions of rows a second."""
    start = time.perf_counter()
    count = sum(int(x.shape[0]) for x, _ in batches)
    return count / (time.perf_counter() - start) / 1e6


def feeding(passes: int) -> None:
    """In this process, as a rank has it: files in memory, read by `dask_keras.feeds`."""
    import tensorflow as tf

    from dask_bridges.processes.spool import Spool
    from dask_keras.feeds import once
    from dask_keras.layout import Layout
    from dask_keras.rows import Batches, Files, Order
    from dask_keras.shares import Shares
    from dask_tf.encoding import look, merge, write

    rng = np.random.default_rng(0)
    X, y = rng.random((FEED_ROWS, FEED_COLUMNS), dtype="float32"), rng.random(FEED_ROWS, dtype="float32")
    parts = [{"X": X[at : at + 25_000], "y": y[at : at + 25_000]} for at in range(0, FEED_ROWS, 25_000)]
    schema = merge([look(part) for part in parts], ["X", "y"])

    def by_row() -> Iterator[tuple[Any, Any]]:
        for at in range(FEED_ROWS // 40):  # it is slow enough
            yield X[at], y[at]

    signature = (tf.TensorSpec((FEED_COLUMNS,), tf.float32), tf.TensorSpec((), tf.float32))
    found: dict[str, dict[str, list[float]]] = {}
    by_rows: dict[str, Any] = {}
    with Spool("benchmark", budget=lambda: 2**31, overflow=tempfile.gettempdir()) as spool:
        with spool.writer("train") as writer:
            write(parts, schema, writer)
        folder = Path(spool.path) / "train"
        for size in (256, 1024):
            whole = Shares((FEED_ROWS,), size)
            uneven = Shares((FEED_ROWS, 150_001), round(size * (1 + 150_001 / FEED_ROWS)))

            def ours(shares: Shares, shuffle: bool = False) -> Any:
                batches = Batches(Files(folder, schema), Layout("X", "y"), shares, Order(shuffle))
                return once(batches, shares.steps)

            plain = tf.data.Dataset.from_tensor_slices((X, y))
            case = f"{FEED_COLUMNS} float32 columns, batches of {size}"
            found[case] = compare(
                {FEED: ours(whole), UNEVEN: ours(uneven), MEMORY: plain.batch(size).prefetch(2)}, passes
            )
            mixed = plain.shuffle(25_000).batch(size).prefetch(2)
            found[f"{case}, shuffled"] = compare({FEED: ours(whole, shuffle=True), MEMORY: mixed}, passes)
            by_rows[case] = tf.data.Dataset.from_generator(by_row, output_signature=signature).batch(size).prefetch(2)
        # Afterwards: in one process with it, the passes of the feed take twice as long.
        for case, batches in by_rows.items():
            found[case] |= compare({GENERATOR: batches}, 3)
    for case, rates in found.items():
        show(case, "Mrows/s", rates, ours=FEED, limits=[MEMORY], more=True, head=False)


def compare(ways: dict[str, Any], passes: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {label: [] for label in ways}
    for _ in range(passes + 1):
        for label, batches in ways.items():
            found[label].append(one_pass(batches))
    return {label: rates[1:] for label, rates in found.items()}


SCRIPTS: dict[str, Callable[[], None]] = {"alone": alone, "mirrored": mirrored}


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in SCRIPTS:
        SCRIPTS[sys.argv[1]]()
        return

    from distributed import Client, LocalCluster

    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3, help="of the trainings")
    parser.add_argument("--passes", type=int, default=9, help="over the batches")
    options = parser.parse_args()
    feeding(options.passes)
    with (
        LocalCluster(n_workers=PROCESSES, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        X, y = held(client)
        starts(client, X, y, options.runs)
        steps(client, X, y, options.runs)


if __name__ == "__main__":
    main()
