"""Training on parameter servers that are started by hand: no Dask, the chief's code only.

Importing TensorFlow takes seconds, so one process imports it and never wakes it; servers and chiefs are forked from it.
This file is also that process's program, and holds the functions that run in a chief: module level, named ``chief_*``,
called with the cluster's spec and a ``report``.
"""

from __future__ import annotations

import contextlib
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

#: What most of it is about is tested on Dask workers as well, in test_training.py.
pytestmark = pytest.mark.slow

# the process that forks


def _send(stream: Any, message: Any) -> None:
    data = pickle.dumps(message)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def _receive(stream: Any) -> Any:
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    return pickle.loads(stream.read(struct.unpack("<Q", head)[0]))


ONLY_IN_WORKER_0 = 100


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
        every = [(each, n) for each in ("ps", "worker") for n in range(len(self.spec[each]))]
        for role, n in servers or every:
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


class Line:
    """The chief's end of the line to the test: ``report``, and what the test sends."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __call__(self, kind: str, **fields: Any) -> None:
        _send(self.stream, ("report", (kind, fields)))

    def receive(self) -> Any:
        return _receive(self.stream)


class Chief:
    """A function that runs in a chief: what it reports, its result, what it wrote to stderr."""

    def __init__(self, nursery: Nursery, name: str, spec: Any, args: Any) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("")
        listener.listen()
        self.pid = nursery.ask("chief", listener.getsockname(), name, spec, args)
        self.nursery = nursery
        connection, _ = listener.accept()
        self.stream = connection.makefile("rwb")
        self.stderr = ""
        self.ended: Any = None

    def send(self, message: Any) -> None:
        _send(self.stream, message)

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
        if self.ended is None:
            for _ in self.reports():
                pass
        assert self.ended is not None
        kind, (value, self.stderr) = self.ended
        self.nursery.ask("reap", self.pid)
        if kind == "raised":
            pytest.fail(f"{value}\n{self.stderr}")
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
        if (role, n) == ("worker", 0):
            os.dup2(0, ONLY_IN_WORKER_0)
        tf.distribute.Server(tf.train.ClusterSpec(spec), job_name=role, task_index=n, protocol="grpc").join()

    def chief(address: Any, name: str, spec: Any, args: Any) -> None:
        path = f"/tmp/chief-{os.getpid()}.err"
        noise = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.unlink(path)
        os.dup2(noise, 2)
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address)
        stream = connection.makefile("rwb")
        outcome: list[Any] = []
        report = Line(stream)

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


# models and data


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


# exact updates


def chief_counts(spec: Any, report: Any, steps: int, corrected: bool = True) -> Any:
    import keras

    from dask_tf import upstream
    from dask_tf.training import connect, fit

    if not corrected:
        upstream.adds_exactly = lambda: True
    with connect(spec, timeout=30) as coordinator:
        metrics = ["mse", keras.metrics.AUC(num_thresholds=3)]
        model = linear(metrics=metrics)
        history = fit(coordinator, model, ones, steps_per_epoch=steps, steps_per_closure=20)
        auc = metrics[1]
        return {
            "steps": history.steps,
            "repeated": history.repeated,
            "iterations": int(model.optimizer.iterations.numpy()),
            "weights": model.get_weights()[0].ravel().tolist(),
            "samples": float(model.metrics[0].count.numpy()),
            "auc": float(auc.true_positives.numpy()[0] + auc.false_negatives.numpy()[0]),
        }


def exact(steps: int) -> dict[str, Any]:
    """What :func:`chief_counts` sees where nothing is lost: each weight has had `steps` times lr."""
    counts = {"samples": 4.0 * steps, "auc": 4.0 * steps}
    return {"steps": steps, "repeated": 0, "iterations": steps, "weights": [steps / 1024] * 3, **counts}


def test_no_update_and_no_sample_is_lost(cluster: Cluster) -> None:
    assert cluster.run(chief_counts, 2000) == exact(2000)


@pytest.mark.slow
def test_no_update_and_no_sample_is_lost_in_ten_thousand_steps(cluster: Cluster) -> None:
    assert cluster.run(chief_counts, 10_000) == exact(10_000)


def test_keras_still_loses_updates_where_it_is_not_corrected(cluster: Cluster) -> None:
    """When this fails, keras-team/keras#18668 is mended: `upstream.exact_additions` can go."""
    seen = cluster.run(chief_counts, 2000, False)
    assert seen["steps"] == 2000
    assert seen["iterations"] < 2000
    assert seen["samples"] < 8000


def chief_embeds(spec: Any, report: Any, steps: int) -> Any:
    import keras
    import tensorflow as tf

    from dask_tf.training import connect, fit

    def rows() -> Any:
        return tf.data.Dataset.from_tensors((tf.constant([[1], [1], [2]]), tf.ones((3, 1, 1))))

    with connect(spec) as coordinator:
        model = keras.Sequential([keras.Input((1,)), keras.layers.Embedding(4, 1, embeddings_initializer="zeros")])
        model.compile(keras.optimizers.SGD(3 / 1024), lambda y, p: -keras.ops.mean(y * p))
        fit(coordinator, model, rows, steps_per_epoch=steps)
        return model.get_weights()[0].ravel().tolist()


def test_sparse_updates_of_one_row_by_two_workers_are_all_applied(cluster: Cluster) -> None:
    assert cluster.run(chief_embeds, 500) == pytest.approx([0, 1000 / 1024, 500 / 1024, 0], abs=1e-5)


# learning


def chief_learns(spec: Any, report: Any, optimizer: str) -> Any:
    import keras

    from dask_tf.training import connect, fit

    seen: list[Any] = []

    class Spy(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            seen.append(("begin", epoch))

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            seen.append(("batch", batch, sorted(logs)))

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            values = [float(v) for v in self.model.predict(np.ones((1, 8), "float32"), verbose=0)[0]]
            seen.append(("end", epoch, sorted(logs), float(self.model.optimizer.learning_rate.numpy()), values))

        def on_train_end(self, logs: Any = None) -> None:
            seen.append(("over", sorted(logs)))

    with connect(spec) as coordinator:
        model = network(optimizer)
        halve = keras.callbacks.LearningRateScheduler(lambda epoch, lr: 0.01 / (epoch + 1))
        callbacks = [halve, Spy()]
        history = fit(
            coordinator, model, classes, epochs=3, steps_per_epoch=150, callbacks=callbacks, validation_data=classes(5)
        )
        scores = model.evaluate(classes(9), verbose=0, return_dict=True)
        return {"history": history, "seen": seen, "accuracy": scores["accuracy"], "keras": model.history.history}


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adamw"])
def test_a_model_learns_and_callbacks_see_what_fit_shows_them(cluster: Cluster, optimizer: str) -> None:
    told = cluster.run(chief_learns, optimizer)
    history = told["history"]
    assert told["accuracy"] > 0.9
    assert history.epoch == [0, 1, 2]
    assert history.steps == 3 * 150
    assert sorted(history.history) == ["accuracy", "learning_rate", "loss", "val_accuracy", "val_loss"]
    assert history.history["loss"][2] < history.history["loss"][0]
    assert told["keras"] == history.history
    names = ["accuracy", "loss"]
    ends = [each for each in told["seen"] if each[0] == "end"]
    assert [each[3] for each in ends] == pytest.approx([0.01, 0.005, 0.01 / 3])
    assert len({tuple(each[4]) for each in ends}) == 3, "predict in a callback used old weights"
    batches = [each[1] for each in told["seen"] if each[0] == "batch"]
    assert [batch for batch in batches if batch == 149] == [149] * 3
    assert max(batches) == 149
    assert all(each[2] == names for each in told["seen"] if each[0] == "batch")
    assert told["seen"][-1][0] == "over"


def chief_stops_early(spec: Any, report: Any, folder: str) -> Any:
    import keras

    from dask_tf.training import connect, fit

    with connect(spec) as coordinator:
        model = linear(lr=0.0)
        early = keras.callbacks.EarlyStopping(monitor="loss", patience=1)
        plateau = keras.callbacks.ReduceLROnPlateau(monitor="loss", patience=1)
        saved = keras.callbacks.ModelCheckpoint(f"{folder}/{{epoch}}.weights.h5", save_weights_only=True)
        history = fit(coordinator, model, ones, epochs=9, steps_per_epoch=8, callbacks=[plateau, saved, early])
        return history.epoch


def test_early_stopping_and_model_checkpoints(cluster: Cluster, tmp_path: Any) -> None:
    assert cluster.run(chief_stops_early, str(tmp_path)) == [0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.weights.h5", "2.weights.h5"]


def chief_fits_again(spec: Any, report: Any) -> Any:
    from dask_tf.training import connect, fit

    with connect(spec) as coordinator:
        model = linear()
        for _ in range(2):
            fit(coordinator, model, ones, steps_per_epoch=33)
        model.optimizer.learning_rate = 0.0
        model.fit(ones(), verbose=0)
        return int(model.optimizer.iterations.numpy()), model.get_weights()[0].ravel().tolist()


def test_a_model_is_trained_in_place_and_can_be_trained_on(cluster: Cluster) -> None:
    assert cluster.run(chief_fits_again) == (67, [66 / 1024] * 3)


def chief_subclass(spec: Any, report: Any) -> Any:
    import keras
    import tensorflow as tf

    from dask_tf.training import connect, fit

    class Own(keras.Model):
        """Not registered, built on its first batch, steps by itself and logs what no metric holds."""

        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
            self.seen = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x: Any) -> Any:
            return self.dense(x)

        def train_step(self, data: Any) -> Any:
            x, y = data
            with tf.GradientTape() as tape:
                loss = -tf.reduce_mean(y * self(x))
            self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
            self.seen.assign_add(1)
            return {"mine": loss, "vector": tf.stack([loss, loss])[0]}

    with connect(spec) as coordinator:
        model = Own()
        model.compile(keras.optimizers.SGD(1 / 1024))
        history = fit(coordinator, model, ones, steps_per_epoch=50)
        return sorted(history.history), float(model.seen.numpy()), model.dense.kernel.numpy().ravel().tolist()


def test_a_subclassed_model_with_a_step_of_its_own(cluster: Cluster) -> None:
    assert cluster.run(chief_subclass) == (["mine", "vector"], 50.0, [50 / 1024] * 3)


def chief_many_inputs(spec: Any, report: Any) -> Any:
    import keras
    import tensorflow as tf

    from dask_tf.training import connect, fit

    def named() -> Any:
        x = {"a": tf.ones((4, 2)), "b": tf.ones((4, 3))}
        y = {"sum": tf.ones((4, 1)), "other": tf.zeros((4,), tf.int64)}
        return tf.data.Dataset.from_tensors((x, y, {"sum": tf.ones((4,)), "other": tf.ones((4,))}))

    with connect(spec) as coordinator:
        inputs = {"a": keras.Input((2,), name="a"), "b": keras.Input((3,), name="b")}
        both = keras.layers.Concatenate()(list(inputs.values()))
        outputs = {"sum": keras.layers.Dense(1, name="sum")(both), "other": keras.layers.Dense(2, name="other")(both)}
        model = keras.Model(inputs, outputs)
        losses = {"sum": "mse", "other": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}
        model.compile("adam", losses, metrics={"other": ["accuracy"]})
        history = fit(coordinator, model, named, steps_per_epoch=60, epochs=2)
        return history.history


def test_named_inputs_and_outputs_with_sample_weights(cluster: Cluster) -> None:
    history = cluster.run(chief_many_inputs)
    assert sorted(history) == ["loss", "other_accuracy", "other_loss", "sum_loss"]
    assert history["loss"][1] < history["loss"][0]


def chief_mixes(spec: Any, report: Any, policy: str) -> Any:
    import keras

    from dask_tf.training import connect, fit

    keras.config.set_dtype_policy(policy)
    with connect(spec) as coordinator:
        model = network("sgd")
        history = fit(coordinator, model, classes, steps_per_epoch=60, epochs=2, steps_per_closure=5)
        return history, sorted({v.dtype for v in model.weights}), int(model.optimizer.iterations.numpy())


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "mixed_float16"])
def test_other_precisions(cluster: Cluster, policy: str) -> None:
    history, dtypes, iterations = cluster.run(chief_mixes, policy)
    assert history.steps == 120
    assert history.history["loss"][1] < history.history["loss"][0]
    assert dtypes == (["float32"] if policy.startswith("mixed") else ["bfloat16"])
    if policy != "mixed_float16":  # where a step may be left out on purpose
        assert (history.repeated, iterations) == (0, 120)


def chief_weighs(spec: Any, report: Any) -> Any:
    import keras
    import tensorflow as tf

    from dask_tf.training import connect, fit

    def two() -> Any:
        return tf.data.Dataset.from_tensors((tf.constant([[1.0], [1.0]]), tf.constant([0, 1])))

    with connect(spec) as coordinator:
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
        model.compile(keras.optimizers.SGD(1 / 1024), lambda y, p: -p)
        fit(coordinator, model, two, steps_per_epoch=64, class_weight={0: 1.0, 1: 3.0})
        return float(model.get_weights()[0].ravel()[0])


def test_class_weights(cluster: Cluster) -> None:
    assert cluster.run(chief_weighs) == 64 / 1024 * (1 + 3) / 2


# data


def chief_starves(spec: Any, report: Any, where: str) -> Any:
    import tensorflow as tf

    from dask_tf.training import connect, fit

    def some() -> Any:
        """One batch in the one worker that has `where`, which takes its time to find it."""
        there = tf.size(tf.io.matching_files(where), out_type=tf.int64)
        slow = tf.while_loop(lambda n: n < 500_000 * there, lambda n: n + 1, (tf.constant(0, tf.int64),))[0]
        return ones().take(tf.minimum(slow, 1))

    with connect(spec) as coordinator:
        return fit(coordinator, linear(), some, steps_per_epoch=200, epochs=2).steps


def test_a_worker_without_data_leaves_the_steps_to_the_others(cluster: Cluster) -> None:
    assert cluster.run(chief_starves, f"/proc/self/fd/{ONLY_IN_WORKER_0}") == 400


def chief_refuses(spec: Any, report: Any, what: str) -> Any:
    import keras
    import tensorflow as tf

    from dask_tf.training import connect, fit

    early = linear() if what == "before" else None
    partitioner = tf.distribute.experimental.partitioners.FixedShardsPartitioner(2) if what == "partitioner" else None
    with connect(spec, variable_partitioner=partitioner) as coordinator:
        models = {
            "before": lambda: early,
            "accumulation": lambda: linear(optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)),
            "uncompiled": lambda: keras.Sequential([keras.layers.Dense(1)]),
            "eager": lambda: linear(run_eagerly=True),
        }
        try:
            model = models.get(what, linear)()
            fit(coordinator, model, (lambda: ones().take(0)) if what == "empty" else ones, steps_per_epoch=4)
        except Exception as error:
            return type(error).__name__, str(error)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("before", "made before this process connected"),
        ("accumulation", "gradient_accumulation_steps has no meaning here"),
        ("uncompiled", "is not compiled"),
        ("eager", "run_eagerly"),
        ("empty", "empty in every worker"),
        ("partitioner", "Keras 3 cannot take a variable_partitioner yet"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_words(cluster: Cluster, what: str, said: str) -> None:
    kind, text = cluster.run(chief_refuses, what)
    assert kind == "DataError"
    assert said in text


def chief_raises(spec: Any, report: Any) -> Any:
    import tensorflow as tf

    from dask_tf.training import connect, fit

    def bad() -> Any:
        return ones().map(lambda x, y: (tf.debugging.check_numerics(x / 0, "not a number"), y))

    with connect(spec) as coordinator:
        model = linear()
        try:
            fit(coordinator, model, bad, steps_per_epoch=4)
        except Exception as error:
            return type(error).__name__, fit(coordinator, model, ones, steps_per_epoch=4).steps


def test_what_a_step_raises_is_raised_and_the_cluster_can_go_on(cluster: Cluster) -> None:
    assert cluster.run(chief_raises) == ("InvalidArgumentError", 4)


# own step functions


def chief_custom(spec: Any, report: Any, steps: int) -> Any:
    import tensorflow as tf

    from dask_tf.training import connect, train

    def build() -> Any:
        return {"table": tf.Variable(tf.zeros((6, 2))), "n": tf.Variable(0, dtype=tf.int64)}

    def step(state: Any, batch: Any) -> Any:
        with tf.GradientTape() as tape:
            rows = tf.nn.embedding_lookup(state["table"], batch)
            loss = -tf.reduce_sum(rows)
        shards = state["table"].variables
        for shard, gradient in zip(shards, tape.gradient(loss, shards), strict=True):
            shard.scatter_sub(tf.IndexedSlices(gradient.values / 1024, gradient.indices))
        state["n"].assign_add(1)
        return {"loss": loss}

    partitioner = tf.distribute.experimental.partitioners.FixedShardsPartitioner(2)
    with connect(spec, variable_partitioner=partitioner) as coordinator:
        rows = lambda: tf.data.Dataset.from_tensors(tf.constant([0, 4, 4]))  # noqa: E731
        done = train(coordinator, build, step, rows, steps=steps)
        table = tf.concat([v.read_value() for v in done.state["table"].variables], 0)
        devices = sorted(v.device for v in done.state["table"].variables)
        return (
            done.steps,
            done.repeated,
            int(done.state["n"].numpy()),
            table.numpy()[:, 0].tolist(),
            devices,
            done.values,
        )


def test_a_step_function_of_ones_own_on_a_row_sharded_table(cluster: Cluster) -> None:
    steps, repeated, n, column, devices, values = cluster.run(chief_custom, 512)
    assert (steps, repeated, n) == (512, 0, 512)
    assert column == [0.5, 0, 0, 0, 1.0, 0]
    assert len({device.split("task:")[1][0] for device in devices}) == 2
    assert list(values) == ["loss"]


# faults


def chief_goes_on(spec: Any, report: Any, steps: int) -> Any:
    from dask_tf.training import connect, fit

    with connect(spec) as coordinator:
        model = linear()
        history = fit(coordinator, model, ones, steps_per_epoch=steps, steps_per_closure=20, report=report)
        return history.steps, history.repeated, int(model.optimizer.iterations.numpy())


def test_training_goes_on_without_a_killed_worker_and_with_it_once_it_is_back(doomed: Cluster) -> None:
    chief = doomed.chief(chief_goes_on, 4000)
    chief.after(400)
    doomed.kill("worker", 1)
    chief.after(1200)
    doomed.start(("worker", 1))
    steps, repeated, iterations = chief.result()
    assert steps == 4000
    assert iterations == 4000 + repeated
    assert 0 <= repeated < 100


def chief_restores(spec: Any, report: Any, folder: str) -> Any:
    from dask_bridges.checkpoints import Checkpoints
    from dask_tf.training import ServerLost, connect, fit

    kept = Checkpoints(folder)
    coordinator = connect(spec)
    model = linear()
    began = None
    told: dict[str, Any] = {}

    def tell(kind: str, **fields: Any) -> None:
        report(kind, **fields)

    try:
        fit(coordinator, model, ones, steps_per_epoch=300, epochs=50, checkpoint=kept, report=tell)
    except ServerLost as error:
        began = time.monotonic()
        told["servers"] = error.servers
        told["latest"] = kept.latest()
        told["home"] = int(model.optimizer.iterations.numpy())
    coordinator.close()
    report("lost")
    with connect(spec, timeout=60) as coordinator:
        done = told["latest"] // 300
        history = fit(coordinator, model, ones, steps_per_epoch=300, epochs=done + 2, checkpoint=kept)
        told["seconds"] = time.monotonic() - began if began else None
        told["history"] = history
        told["iterations"] = int(model.optimizer.iterations.numpy())
        told["weights"] = model.get_weights()[0].ravel().tolist()
    return told


def test_a_killed_server_is_named_and_training_resumes_from_the_checkpoint(doomed: Cluster, tmp_path: Any) -> None:
    chief = doomed.chief(chief_restores, str(tmp_path))
    chief.after(700)
    doomed.kill("ps", 1)
    for kind, _ in chief.reports():
        if kind == "lost":
            break
    doomed.start(("ps", 1))
    told = chief.result()
    assert told["servers"] == ("ps:1",)
    assert told["latest"] >= 600
    assert told["home"] == told["latest"]
    end = told["latest"] + 600
    assert told["history"].steps == told["iterations"] == end
    assert told["weights"] == [end / 1024] * 3
    assert told["history"].epoch == list(range(end // 300))
    assert told["history"].repeated == 0


def chief_is_interrupted(spec: Any, report: Any, folder: str) -> Any:
    """Stops in the middle of its second epoch, right after a checkpoint there."""
    from dask_bridges.checkpoints import Checkpoints
    from dask_tf.training import connect, fit

    kept = Checkpoints(folder)
    with connect(spec) as coordinator:
        model = linear(metrics=["mse"])
        history = fit(
            coordinator,
            model,
            ones,
            steps_per_epoch=200,
            epochs=2,
            steps_per_closure=10,
            checkpoint=kept,
            checkpoint_seconds=0.0,
            should_stop=lambda: (kept.latest() or 0) > 250,
        )
        return history.steps, int(model.optimizer.iterations.numpy()), kept.latest()


def chief_resumes(spec: Any, report: Any, folder: str) -> Any:
    from dask_bridges.checkpoints import Checkpoints
    from dask_tf.training import connect, fit

    with connect(spec) as coordinator:
        model = linear(metrics=["mse"])
        history = fit(coordinator, model, ones, steps_per_epoch=200, epochs=2, checkpoint=Checkpoints(folder))
        samples = float(model.metrics[0].count.numpy())
        return history, int(model.optimizer.iterations.numpy()), samples, model.get_weights()[0].ravel().tolist()


def test_another_chief_goes_on_in_the_middle_of_an_epoch(cluster: Cluster, tmp_path: Any) -> None:
    steps, iterations, latest = cluster.run(chief_is_interrupted, str(tmp_path))
    assert 250 < steps < 400
    assert steps == iterations == latest
    history, iterations, samples, weights = cluster.run(chief_resumes, str(tmp_path))
    assert history.steps == iterations == 400
    assert samples == 4 * 200, "the metrics of the epoch that was interrupted go on too"
    assert weights == [400 / 1024] * 3
    assert history.epoch == [0, 1]
    assert len(history.history["loss"]) == 2


def chief_loops(spec: Any, report: Any, folder: str, steps: int) -> Any:
    import tensorflow as tf

    from dask_bridges.checkpoints import Checkpoints
    from dask_tf.training import connect, train

    class State(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sum = tf.Variable([0.0, 0.0])

    def step(state: Any, batch: Any) -> Any:
        if tf.reduce_sum(batch[0]) > 0:  # AutoGraph's
            state.sum.assign_add([1.0, 2.0])
        return {"both": state.sum}

    with connect(spec) as coordinator:
        done = train(coordinator, State, step, ones, steps=steps, checkpoint=Checkpoints(folder))
        return done.steps, done.repeated, done.state.sum.numpy().tolist(), list(done.values)


def test_a_step_function_of_ones_own_goes_on_from_a_checkpoint(cluster: Cluster, tmp_path: Any) -> None:
    assert cluster.run(chief_loops, str(tmp_path), 100) == (100, 0, [100.0, 200.0], ["both"])
    assert cluster.run(chief_loops, str(tmp_path), 250) == (250, 0, [250.0, 500.0], ["both"])


def chief_fails_in_a_callback(spec: Any, report: Any) -> Any:
    import keras

    from dask_tf.training import connect, fit

    class Fails(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch >= 30:
                raise KeyError("mine")

    with connect(spec) as coordinator:
        model = linear()
        try:
            fit(coordinator, model, ones, steps_per_epoch=1000, callbacks=[Fails()])
        except KeyError as error:
            before = int(model.optimizer.iterations.numpy())
            model.predict(np.ones((1, 3), "float32"), verbose=0)
            fit(coordinator, model, ones, steps_per_epoch=10)
            return str(error), before, int(model.optimizer.iterations.numpy()), model.get_weights()[0].ravel().tolist()


def test_a_callback_that_raises_ends_the_training_with_the_newest_values_at_home(cluster: Cluster) -> None:
    error, before, after, weights = cluster.run(chief_fails_in_a_callback)
    assert error == "'mine'"
    assert 30 < before < 1000
    assert after == before + 10
    assert weights == [after / 1024] * 3


def chief_looks(spec: Any, report: Any, timeout: float) -> Any:
    from dask_tf.training import connect

    began = time.monotonic()
    try:
        connect(spec, timeout=timeout).close()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - began


def test_every_server_that_is_not_there_is_named(nursery: Nursery) -> None:
    cluster = Cluster(nursery).start(("ps", 0), ("worker", 0))
    kind, text, _ = cluster.run(chief_looks, 1.0)
    cluster.close()
    assert kind == "GangTimeout"
    assert f"ps:1 at {cluster.spec['ps'][1]}" in text
    assert f"worker:1 at {cluster.spec['worker'][1]}" in text
    assert "ps:0" not in text


def test_a_server_that_says_nothing_is_a_timeout(nursery: Nursery) -> None:
    cluster = Cluster(nursery).start(("ps", 0), ("ps", 1), ("worker", 0))
    cluster.held["worker"][1].listen()
    kind, text, seconds = cluster.run(chief_looks, 3.0)
    cluster.close()
    assert kind == "GangTimeout"
    assert "did not connect within 3 s" in text
    assert seconds < 10


def test_a_chief_connects_again_in_one_life(cluster: Cluster) -> None:
    assert cluster.run(chief_twice) == [(8, 8)] * 3


def chief_twice(spec: Any, report: Any) -> Any:
    from dask_tf.training import connect, fit

    counts = []
    for _ in range(3):
        with connect(spec) as coordinator:
            model = linear()
            history = fit(coordinator, model, ones, steps_per_epoch=8)
            counts.append((history.steps, int(model.optimizer.iterations.numpy())))
    return counts


def chief_trains_many(spec: Any, report: Any, models: int) -> Any:
    from dask_tf.training import connect, fit

    resident = []
    with connect(spec) as coordinator:
        for n in range(models):
            model = network("sgd")
            fit(coordinator, model, classes, steps_per_epoch=100)
            report("trained", n=n)
            resident.append(os.popen(f"ps -o rss= -p {os.getpid()}").read())
    return [int(each) / 1024 for each in resident]


@pytest.mark.slow
def test_forty_models_in_one_chief_cost_it_little_memory(cluster: Cluster) -> None:
    resident = cluster.run(chief_trains_many, 40)
    assert resident[-1] - resident[9] < 30 * 5, "MB a model"


def chief_closes(spec: Any, report: Any) -> Any:
    from dask_tf.training import connect, fit, missing

    with connect(spec) as coordinator:
        fit(coordinator, linear(), ones, steps_per_epoch=100)
    report("closed")
    report.receive()
    threading.Event().wait(1)  # for the noise that must not come
    return len(missing(spec, timeout=0))


def test_a_chief_that_closed_says_nothing_when_the_servers_go(doomed: Cluster) -> None:
    chief = doomed.chief(chief_closes)
    assert any(kind == "closed" for kind, _ in chief.reports())
    for server in list(doomed.pids):
        doomed.kill(*server)
    chief.send("gone")
    assert chief.result() == 4
    assert chief.stderr == ""


# stopping and scoring


def chief_publishes(spec: Any, report: Any) -> Any:
    from dask_tf.training import connect, fit

    stop = threading.Event()
    threading.Thread(target=lambda: (report.receive(), stop.set()), daemon=True).start()

    def publish(step: int, weights: Any) -> None:
        report("weights", step=step, weights=weights)

    with connect(spec) as coordinator:
        history = fit(
            coordinator,
            network(),
            classes,
            steps_per_epoch=100_000,
            should_stop=stop.is_set,
            publish=publish,
            publish_seconds=0.3,
        )
        return history.steps, history.history


def chief_scores(spec: Any, report: Any) -> Any:
    """No chief, but a process of its own that never meets the servers."""
    from dask_tf.training import score

    updates = iter(report.receive, None)
    return score(network(), updates, classes(7), report=report, until=lambda values: values["accuracy"] > 0.9)


def test_a_scorer_gets_the_newest_weights_and_ends_the_training(cluster: Cluster) -> None:
    chief, scorer = cluster.chief(chief_publishes), cluster.chief(chief_scores)
    ended: list[Any] = []

    def wait() -> None:
        ended.append(scorer.result())
        chief.send("stop")

    thread = threading.Thread(target=wait)
    thread.start()
    for kind, fields in chief.reports():
        if kind == "weights":
            with contextlib.suppress(OSError):  # it has seen enough and is gone
                scorer.send((fields["step"], fields["weights"]))
    steps, history = chief.result()
    thread.join()
    (scored,) = ended
    assert 0 < steps < 100_000
    assert scored[-1][1]["accuracy"] > 0.9
    assert all(values["accuracy"] <= 0.9 for _, values in scored[:-1])
    assert [step for step, _ in scored] == sorted(step for step, _ in scored)
    assert len(history["loss"]) == 1


# without any TensorFlow


def test_arrays_travel_as_bytes_without_pickle() -> None:
    from hypothesis import given
    from hypothesis import strategies as st
    from hypothesis.extra import numpy as arrays_of

    from dask_tf.training.checkpoint import arrays, dump

    dtypes = st.sampled_from(["float32", "float64", "int64", "uint32", "bool", "float16"])

    @given(st.lists(dtypes.flatmap(lambda dtype: arrays_of.arrays(dtype, arrays_of.array_shapes(min_dims=0)))))
    def check(values: list[Any]) -> None:
        again = arrays(dump(values))
        assert [v.dtype for v in again] == [v.dtype for v in values]
        assert [v.tobytes() for v in again] == [v.tobytes() for v in values]

    check()


def test_the_size_of_a_function_follows_the_speed_of_the_steps() -> None:
    from dask_tf.training.closures import TARGET, Pace

    pace, now = Pace(workers=2, total=100_000), 0.0
    for _ in range(40):
        size = pace.size()
        now += size / 1000 / 2  # two workers at 1000 steps a second each
        pace.took(size, now)
    assert pace.size() == pytest.approx(1000 * TARGET, rel=0.1)
    assert Pace(workers=2, total=16).limit == 1
    assert Pace(workers=2, total=100, fixed=7).size() == 7


if __name__ == "__main__":
    _main()
