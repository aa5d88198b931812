"""Keras models and step functions trained on parameter servers inside a Dask cluster."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from distributed import Client, LocalCluster

import dask_tf
from dask_bridges import DataError, MemberLost, PlacementError
from dask_bridges.events import Event, Log, Metrics, Progress

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

TRAIN = 1440
BATCH = 32


@pytest.fixture(scope="module")
def digits() -> tuple[Any, Any]:
    """scikit-learn's digits: 1797 real images of 8 x 8."""
    datasets = pytest.importorskip("sklearn.datasets")
    X, y = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    return (X[order] / 16).astype("float32"), y[order].astype("int32")


def collections(X: Any, y: Any, chunk: int = 180) -> tuple[Any, Any]:
    return da.from_array(X, chunks=(chunk, X.shape[1])), da.from_array(y, chunks=chunk)


def new_model(seed: int = 0) -> Any:
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("parameter servers train models of the TensorFlow backend")
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Input((64,)), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)]
    model = keras.Sequential(layers)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    return model


def start(client: Client, digits: tuple[Any, Any], **roles: Any) -> Any:
    """A cluster that has been fed the digits: most to train on, the rest to the chief and scorers."""
    X, y = digits
    cluster = dask_tf.start_tensorflow(client, share=True, **{"ps": 1, "worker": 2, **roles})
    cluster.feed(*collections(X[:TRAIN], y[:TRAIN]))
    held = ["chief", *(["scorer"] if "scorer" in roles else [])]
    for role in held:
        cluster.feed(*collections(X[TRAIN:], y[TRAIN:]), name=f"valid-{role}", to=role)
    return cluster


@pytest.fixture(scope="module")
def cluster(bridges_cluster: LocalCluster, digits: tuple[Any, Any]) -> Iterator[Any]:
    with Client(bridges_cluster, set_as_default=False) as client, start(client, digits, scorer=1) as cluster:
        yield cluster


@pytest.fixture
def client(bridges_cluster: LocalCluster) -> Iterator[Client]:
    with Client(bridges_cluster, set_as_default=False) as client:
        yield client


def once(cluster: Any, predicate: Callable[[Event], bool], action: Callable[[], Any]) -> threading.Event:
    """Do something when a first new event holds; set once it was done."""
    done, begun = threading.Event(), len(cluster.events.events)
    seen = 0

    def listener(event: Event) -> None:
        nonlocal seen
        seen += 1
        if seen > begun and predicate(event) and not done.is_set():
            done.set()
            action()

    cluster.listen(listener)
    return done


def kill(cluster: Any, task: str) -> None:
    os.kill(next(row["pid"] for row in cluster.status() if row["task"] == task), signal.SIGKILL)


def batches(cluster: Any) -> int:
    """Of an epoch: each worker's last one may be short."""
    return sum(-(-rows // BATCH) for rows in cluster.feeds["train"].rows.values())


def trains(event: Event) -> bool:
    return isinstance(event, Progress) and event.done >= 20


# What comes of it


@pytest.mark.slow
def test_digits_are_learned_until_the_scorer_is_content(cluster: Any, digits: tuple[Any, Any]) -> None:
    X, y = digits
    live: list[float] = []
    scorer = next(rank for rank, task in enumerate(cluster.tasks) if task.role == "scorer")

    def show(event: Event) -> None:
        if isinstance(event, Metrics) and event.rank == scorer:
            live.append(event.values["accuracy"])

    cluster.listen(show)
    model, alone = new_model(), new_model()
    scoring = dask_tf.Scorer("valid-scorer", every=0.2, until=lambda scores: scores["accuracy"] >= 0.95)
    history = dask_tf.fit(cluster, model, batch_size=BATCH, epochs=200, scorer=scoring, progress=False)
    cluster.events.unlisten(show)
    assert history.steps < 200 * batches(cluster)
    assert live == [values["accuracy"] for _, values in history.scores]
    assert max(live) >= 0.95
    epochs = max(1, round(history.steps * BATCH / TRAIN))
    alone.fit(X[:TRAIN], y[:TRAIN], batch_size=BATCH, epochs=epochs, verbose=0)
    ours, theirs = (each.evaluate(X[TRAIN:], y[TRAIN:], verbose=0)[1] for each in (model, alone))
    assert ours >= theirs - 0.02


def test_no_update_is_lost_and_the_model_is_trained_in_place(cluster: Any) -> None:
    model = new_model()
    before = model.get_weights()
    history = dask_tf.fit(
        cluster, model, batch_size=BATCH, epochs=3, validation_data="valid-chief", progress=False, seed=1
    )
    steps = 3 * batches(cluster)
    assert history.steps == steps
    assert history.repeated == 0
    assert int(model.optimizer.iterations) == steps
    assert set(history.history) == {"accuracy", "loss", "val_accuracy", "val_loss"}
    assert history.epoch == [0, 1, 2]
    assert history.history["loss"][-1] < history.history["loss"][0] / 2
    assert any((a != b).any() for a, b in zip(before, model.get_weights()))


@pytest.mark.slow
def test_training_goes_on_from_where_the_model_is(cluster: Any, digits: tuple[Any, Any]) -> None:
    X, y = digits
    model = new_model()
    model.fit(X[:TRAIN], y[:TRAIN], batch_size=BATCH, epochs=3, verbose=0)
    loss, iterations = model.evaluate(X[:TRAIN], y[:TRAIN], verbose=0)[0], int(model.optimizer.iterations)
    history = dask_tf.fit(cluster, model, batch_size=BATCH, epochs=1, progress=False)
    assert history.history["loss"][0] < loss * 1.5
    assert int(model.optimizer.iterations) == iterations + history.steps


@pytest.mark.slow
def test_callbacks_run_where_the_training_is(cluster: Any) -> None:
    import keras

    model = new_model()
    never_content = keras.callbacks.EarlyStopping(monitor="loss", min_delta=100.0)
    history = dask_tf.fit(cluster, model, batch_size=BATCH, epochs=50, callbacks=[never_content], progress=False)
    assert history.epoch == [0, 1]


def build_linear() -> Any:
    import tensorflow as tf

    return {"w": tf.Variable(tf.zeros([64])), "rows": tf.Variable(0, dtype=tf.int64)}


def step_linear(state: Any, batch: Any) -> Any:
    import tensorflow as tf

    x, _ = batch
    state["w"].assign_add(tf.reduce_sum(x, 0))
    state["rows"].assign_add(tf.shape(x, tf.int64)[0])
    return {"rows": state["rows"]}


def values_of(state: Any) -> dict[str, Any]:
    return {name: variable.numpy() for name, variable in state.items()}


@pytest.mark.slow
def test_a_step_function_of_ones_own_loses_no_addition(cluster: Any) -> None:
    trained = dask_tf.train(
        cluster, build_linear, step_linear, steps=400, batch_size=20, result=values_of, shuffle=False, progress=False
    )
    assert trained.steps == 400
    assert trained.repeated == 0
    assert trained.state["rows"] == 400 * 20
    assert trained.state["w"].shape == (64,)


@pytest.mark.slow
def test_an_asynchronous_client_awaits_a_training(bridges_cluster: LocalCluster, digits: tuple[Any, Any]) -> None:
    X, y = digits

    async def scenario() -> Any:
        address = bridges_cluster.scheduler_address
        async with (
            Client(address, asynchronous=True, set_as_default=False) as client,
            await dask_tf.start_tensorflow(client, ps=1, worker=1) as cluster,
        ):
            await cluster.feed(*collections(X, y))
            return await dask_tf.fit(cluster, new_model(), batch_size=64, progress=False)

    assert asyncio.run(scenario()).steps == -(-len(X) // 64)


# What is refused


def test_what_cannot_be_trained_is_refused_before_anything_starts(cluster: Any, tmp_path: Path) -> None:
    import keras

    plain = keras.Sequential([keras.layers.Input((64,)), keras.layers.Dense(1)])
    with pytest.raises(DataError, match="not compiled"):
        dask_tf.fit(cluster, plain)
    with pytest.raises(DataError, match=r"nothing was fed under the name 'other' \(there is 'train'"):
        dask_tf.fit(cluster, new_model(), "other")
    with pytest.raises(DataError, match=r"validation_data='train' was fed to worker:0, worker:1"):
        dask_tf.fit(cluster, new_model(), validation_data="train")
    with pytest.raises(DataError, match=r"scorer.data='valid-chief' was fed to chief:0, and is needed by the scorer"):
        dask_tf.fit(cluster, new_model(), scorer=dask_tf.Scorer("valid-chief"))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(PlacementError, match="file"):
        dask_tf.fit(cluster, new_model(), checkpoint=file / "folder", progress=False)


def test_a_cluster_without_servers_cannot_train_on_them(client: Client) -> None:
    lacking = pytest.raises(PlacementError, match="needs tasks 'ps', and the cluster has worker:0")
    with dask_tf.start_tensorflow(client, worker=1) as cluster, lacking:
        dask_tf.fit(cluster, new_model())


# What dies


@pytest.mark.slow
def test_a_killed_worker_is_started_again_and_every_batch_counts(cluster: Any) -> None:
    model = new_model()
    killed = once(cluster, trains, lambda: kill(cluster, "worker:1"))
    history = dask_tf.fit(cluster, model, batch_size=BATCH, epochs=15, progress=False)
    assert killed.is_set()
    assert history.steps == 15 * batches(cluster)
    assert int(model.optimizer.iterations) == history.steps + history.repeated
    assert next(row for row in cluster.status() if row["task"] == "worker:1")["restarts"] == 1


@pytest.mark.slow
def test_a_killed_server_is_restored_from_the_last_checkpoint(cluster: Any, tmp_path: Path) -> None:
    model = new_model()
    begun = len(cluster.events.events)

    def checkpointed(event: Event) -> bool:
        return isinstance(event, Progress) and any(tmp_path.glob("*.json"))

    killed = once(cluster, checkpointed, lambda: kill(cluster, "ps:0"))
    history = dask_tf.fit(cluster, model, batch_size=BATCH, epochs=10, checkpoint=tmp_path, progress=False)
    assert killed.is_set()
    assert history.epoch == list(range(10))
    assert history.steps == 10 * batches(cluster)
    assert int(model.optimizer.iterations) == history.steps + history.repeated
    told = [event.text for event in cluster.events.events[begun:] if isinstance(event, Log) and event.rank < 0]
    assert any("lost ps:0" in text and "last checkpoint" in text for text in told)


def test_a_killed_server_without_a_checkpoint_ends_all_with_the_cause(client: Client, digits: tuple[Any, Any]) -> None:
    with start(client, digits) as cluster:
        once(cluster, trains, lambda: kill(cluster, "ps:0"))
        with pytest.raises(MemberLost, match=r"ps:0 was lost, with its process .*SIGKILL"):
            dask_tf.fit(cluster, new_model(), batch_size=BATCH, epochs=400, progress=False)
        assert {row["state"] for row in cluster.status()} == {"ended"}


@pytest.mark.slow
def test_a_killed_chief_ends_all_with_the_cause(client: Client, digits: tuple[Any, Any]) -> None:
    with start(client, digits) as cluster:
        once(cluster, trains, lambda: kill(cluster, "chief:0"))
        with pytest.raises(MemberLost, match=r"chief:0 was lost, with its process .*SIGKILL"):
            dask_tf.fit(cluster, new_model(), batch_size=BATCH, epochs=400, progress=False)
        assert {row["state"] for row in cluster.status()} == {"ended"}


@pytest.mark.slow
def test_a_killed_dask_worker_takes_its_worker_task_along_and_training_goes_on(
    bridges_doomed_client: Client, digits: tuple[Any, Any]
) -> None:
    client = bridges_doomed_client
    with start(client, digits) as cluster, ThreadPoolExecutor(1) as pool:
        pids = client.run(os.getpid)
        held = {cluster.dask_spec[role][0] for role in ("ps",)} | {cluster._place(cluster._ranks("chief:0")[0])}
        doomed = next(worker for worker in cluster.dask_spec["worker"] if worker not in held)
        reached = once(cluster, trains, lambda: None)
        training = pool.submit(dask_tf.fit, cluster, new_model(), batch_size=BATCH, epochs=20, progress=False)
        assert reached.wait(60)
        os.kill(pids[doomed], signal.SIGKILL)
        history = training.result(120)
        assert history.steps == 20 * batches(cluster)
        client.wait_for_workers(3, timeout=60)
        assert doomed not in cluster.dask_spec["worker"]


# A recipe


def train_mirrored(cluster: Any, batch: int) -> Any:
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()  # first of all: TF_CONFIG is set
    data = strategy.distribute_datasets_from_function(lambda context: cluster.dataset("train", batch))
    with strategy.scope():
        w = tf.Variable(tf.zeros([3]))

    @tf.function
    def step(x: Any, y: Any) -> None:
        def replica(x: Any, y: Any) -> None:
            error = tf.linalg.matvec(x, w) - y
            gradient = tf.linalg.matvec(x, error, transpose_a=True) / (2.0 * batch)
            context = tf.distribute.get_replica_context()
            w.assign_sub(0.1 * context.all_reduce(tf.distribute.ReduceOp.SUM, gradient))

        strategy.run(replica, args=(x, y))

    for x, y in data:
        step(x, y)
    return w.numpy()


@pytest.mark.slow
def test_multi_worker_mirrored_strategy_trains_as_one_process_does(client: Client) -> None:
    X = np.random.default_rng(0).normal(size=(400, 3)).astype("float32")
    y = X @ np.array([1, 2, 3], "float32")
    with dask_tf.start_tensorflow(client, worker=2) as cluster:
        cluster.feed(da.from_array(X, chunks=(100, 3)), da.from_array(y, chunks=100))
        first, second = client.gather(cluster.run("worker", train_mirrored, cluster, 20))
        parts = [client.gather(cluster.run(f"worker:{n}", rows_of, cluster))[0] for n in (0, 1)]
    w = np.zeros(3, "float32")
    for start_ in range(0, 200, 20):
        rows = np.concatenate([part[start_ : start_ + 20] for part in parts])
        w -= 0.1 * rows.T @ (rows @ w - rows @ np.array([1, 2, 3], "float32")) / 40
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, w, rtol=1e-4)


def rows_of(cluster: Any) -> Any:
    return np.concatenate([x.numpy() for x, _ in cluster.dataset("train", 200)])
