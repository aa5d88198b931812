"""Training on parameter servers that are started by hand: no Dask, the chief's code only.

Importing TensorFlow takes seconds, so one process imports it and never wakes it; servers and chiefs are forked from it.
This file is also that process's program, and holds the functions that run in a chief: module level, named ``chief_*``,
called with the cluster's spec and a ``report``.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("dask_tf.training")

# ---------------------------------------------------------------------------------------------- the process that forks


def _send(stream: Any, message: Any) -> None:
    data = pickle.dumps(message)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def _receive(stream: Any) -> Any:
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    return pickle.loads(stream.read(struct.unpack("<Q", head)[0]))


class Nursery:
    """The client's side of the process that has imported TensorFlow."""

    def __init__(self) -> None:
        env = dict(os.environ, TF_CPP_MIN_LOG_LEVEL="3", TF_GRPC_REUSE_PORT="1", CUDA_VISIBLE_DEVICES="-1")
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
        )
        self.lock = threading.Lock()

    def ask(self, *message: Any) -> Any:
        with self.lock:
            _send(self.process.stdin, message)
            return _receive(self.process.stdout)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Cluster:
    """Servers on ports that are held for them, which can be killed and started again there."""

    def __init__(self, nursery: Nursery, ps: int = 2, worker: int = 2) -> None:
        self.nursery = nursery
        self.held = {"ps": [_hold() for _ in range(ps)], "worker": [_hold() for _ in range(worker)], "chief": [_hold()]}
        self.spec = {role: [f"127.0.0.1:{s.getsockname()[1]}" for s in held] for role, held in self.held.items()}
        self.pids: dict[tuple[str, int], int] = {}

    def start(self, *servers: tuple[str, int]) -> Cluster:
        for role, n in servers or [(role, n) for role in ("ps", "worker") for n in range(len(self.spec[role]))]:
            self.pids[role, n] = self.nursery.ask("serve", self.spec, role, n)
        return self

    def kill(self, role: str, n: int) -> None:
        self.nursery.ask("kill", self.pids.pop((role, n)))

    def chief(self, function: Callable[..., Any], *args: Any) -> Chief:
        return Chief(self.nursery, function.__name__, self.spec, args)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.chief(function, *args).result()

    def close(self) -> None:
        for role, n in list(self.pids):
            self.kill(role, n)
        for held in self.held.values():
            for each in held:
                each.close()


class Chief:
    """A function that runs in a chief: what it reports, its result, what it wrote to stderr."""

    def __init__(self, nursery: Nursery, name: str, spec: Any, args: Any) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("")
        listener.listen()
        self.pid = nursery.ask("chief", listener.getsockname(), name, spec, args)
        self.nursery = nursery
        connection, _ = listener.accept()
        self.stream = connection.makefile("rb")
        self.stderr = ""

    def reports(self) -> Iterator[tuple[str, dict[str, Any]]]:
        while True:
            kind, value = _receive(self.stream)
            if kind != "report":
                self.ended = (kind, value)
                return
            yield value

    def after(self, done: int) -> None:
        """Wait until so many steps are done."""
        for kind, fields in self.reports():
            if kind == "progress" and fields["done"] >= done:
                return
        pytest.fail(f"the chief ended before step {done}: {self.ended}")

    def result(self) -> Any:
        for _ in self.reports():
            pass
        kind, (value, self.stderr) = self.ended
        self.nursery.ask("reap", self.pid)
        if kind == "raised":
            pytest.fail(value)
        return value


def _hold() -> socket.socket:
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("127.0.0.1", 0))
    return held


def _main() -> None:
    """Fork on demand until stdin ends; then all children go, with this process at the latest."""
    answers, commands = os.fdopen(os.dup(1), "wb"), sys.stdin.buffer
    os.dup2(2, 1)
    import keras  # noqa: F401
    import tensorflow as tf

    children: set[int] = set()

    def fork(child: Callable[[], None]) -> int:
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            child()
            os._exit(0)
        children.add(pid)
        return pid

    def serve(spec: Any, role: str, n: int) -> None:
        tf.distribute.Server(tf.train.ClusterSpec(spec), job_name=role, task_index=n, protocol="grpc").join()

    def chief(address: Any, name: str, spec: Any, args: Any) -> None:
        path = f"/tmp/chief-{os.getpid()}.err"
        noise = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.unlink(path)
        os.dup2(noise, 2)
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address)
        stream = connection.makefile("wb")
        outcome: list[Any] = []

        def report(kind: str, **fields: Any) -> None:
            _send(stream, ("report", (kind, fields)))

        def run() -> None:
            try:
                outcome.append(("returned", globals()[name](spec, report, *args)))
            except BaseException:
                outcome.append(("raised", traceback.format_exc()))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        sys.stderr.flush()
        os.lseek(noise, 0, os.SEEK_SET)
        kind, value = outcome[0]
        _send(stream, (kind, (value, os.read(noise, 1 << 20).decode(errors="replace"))))

    while True:
        try:
            command, *args = _receive(commands)
        except EOFError:
            break
        if command == "serve":
            answer = fork(lambda args=args: serve(*args))
        elif command == "chief":
            answer = fork(lambda args=args: chief(*args))
        else:
            pid = args[0]
            if command == "kill":
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            children.discard(pid)
            answer = None
        _send(answers, answer)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def cluster(nursery: Nursery) -> Iterator[Cluster]:
    """Two parameter servers and two workers that no test harms."""
    cluster = Cluster(nursery).start()
    yield cluster
    cluster.close()


@pytest.fixture
def doomed(nursery: Nursery) -> Iterator[Cluster]:
    """Two parameter servers and two workers for a test that kills."""
    cluster = Cluster(nursery).start()
    yield cluster
    cluster.close()


# ------------------------------------------------------------------------------------------------------ models and data


def ones(batch: int = 4, width: int = 3) -> Any:
    """Batches of ones with targets of ones: the gradient of a linear loss is the same at every step."""
    import tensorflow as tf

    x, y = tf.ones((batch, width)), tf.ones((batch, 1))
    return tf.data.Dataset.from_tensors((x, y))


def classes(seed: int = 0, rows: int = 512) -> Any:
    """Two classes that a small network learns."""
    import tensorflow as tf

    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 8)).astype("float32")
    y = (x.sum(axis=1) > 0).astype("int64")
    return tf.data.Dataset.from_tensor_slices((x, y)).shuffle(rows, seed=seed).batch(32)


def linear(lr: float = 1 / 1024, width: int = 3, **compiled: Any) -> Any:
    """A model whose gradient is exactly -1 in each weight on :func:`ones`, in numbers that add without rounding."""
    import keras

    model = keras.Sequential([keras.Input((width,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    compiled = {"optimizer": keras.optimizers.SGD(lr), "loss": lambda y, p: -keras.ops.mean(y * p), **compiled}
    model.compile(**compiled)
    return model


def network(optimizer: Any = "adam") -> Any:
    import keras

    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(2),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


# -------------------------------------------------------------------------------------------------------- exact updates


def chief_counts(spec: Any, report: Any, steps: int) -> Any:
    from dask_tf.training import connect, fit

    began = time.time()
    with connect(spec, timeout=30) as coordinator:
        connected = time.time() - began
        import keras

        metrics = ["mse", keras.metrics.Precision(), keras.metrics.AUC(num_thresholds=3)]
        model = linear(metrics=metrics)
        history = fit(coordinator, model, ones, steps_per_epoch=steps, report=report)
        tracker, precision, auc = model.metrics[0], metrics[1], metrics[2]
        return {
            "connected": connected,
            "steps": history.steps,
            "repeated": history.repeated,
            "history": history.history,
            "iterations": int(model.optimizer.iterations.numpy()),
            "weights": model.get_weights()[0].tolist(),
            "samples": float(tracker.count.numpy()),
            "positives": float(precision.true_positives.numpy()[0] + precision.false_positives.numpy()[0]),
            "auc": float(auc.true_positives.numpy()[0] + auc.false_negatives.numpy()[0]),
            "devices": sorted({v.value.device for v in model.variables}),
        }


def counts_are_exact(seen: Any, steps: int) -> None:
    assert seen["steps"] == seen["iterations"] == steps
    assert seen["repeated"] == 0
    assert seen["weights"] == [[steps / 1024]] * 3
    assert seen["samples"] == 4 * steps
    assert seen["auc"] == 4 * steps


def test_no_update_and_no_sample_is_lost(cluster: Cluster) -> None:
    counts_are_exact(cluster.run(chief_counts, 2000), 2000)


if __name__ == "__main__":
    _main()
