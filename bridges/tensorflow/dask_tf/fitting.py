"""Training on the parameter servers of a TensorFlow cluster, as the client calls it."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distributed.protocol.pickle import dumps

from dask_bridges import clients, config
from dask_bridges.checkpoints import Checkpoints
from dask_bridges.errors import DataError
from dask_tf import chief, upstream
from dask_tf.chief import FitWork, LoopWork, Source
from dask_tf.cluster import TensorFlowCluster
from dask_tf.supervising import Scorer, Supervised
from dask_tf.training import History, Trained

__all__ = ["fit", "train"]


def fit(
    cluster: TensorFlowCluster,
    model: Any,
    data: str = "train",
    *,
    batch_size: int = 32,
    epochs: int = 1,
    steps_per_epoch: int | None = None,
    initial_epoch: int = 0,
    validation_data: str | None = None,
    validation_steps: int | None = None,
    validation_freq: int | Sequence[int] = 1,
    callbacks: Any = None,
    class_weight: Mapping[int, float] | None = None,
    shuffle: bool = True,
    seed: int | None = None,
    scorer: Scorer | None = None,
    checkpoint: str | Path | Checkpoints | None = None,
    checkpoint_every: int = 1,
    checkpoint_seconds: float | None = None,
    steps_per_closure: int | None = None,
    verbose: int = 0,
    progress: bool | None = None,
) -> Any:
    """Train a compiled Keras model, in place, on the parameter servers of a cluster.

    The workers compute gradients on their own partitions, each at its pace, and apply
    them to the variables on the servers; the chief, in a process of its own, keeps
    them busy. No update is lost where nothing fails. What is computed from a
    variable and written back (moments of Adam, moving statistics of
    BatchNormalization) is asynchronous by nature.

    Parameters
    ----------
    cluster : TensorFlowCluster
        With tasks "ps" and "worker".
    model : keras.Model
        Compiled; functional, Sequential or subclassed.
    data : str
        The feed to train on: ``cluster.feed(X, y, name="train")``.
    batch_size, epochs, initial_epoch, callbacks, class_weight, verbose
        As in `keras.Model.fit`. Callbacks run in the chief's process, on copies; batch
        callbacks are called once for all batches that were scheduled together.
    steps_per_epoch : int, optional
        Batches of an epoch over all workers together; by default as many as there are.
    validation_data : str, optional
        A feed that the chief evaluates after an epoch, fed with ``to="chief"``.
    validation_steps, validation_freq
        As in `keras.Model.fit`.
    shuffle, seed : optional
        Whether rows are mixed anew in each pass, over all partitions of a worker; and the seed.
    scorer : Scorer, optional
        Evaluates meanwhile, on a task "scorer", and may end the training.
    checkpoint : str, Path or Checkpoints, optional
        Where to keep checkpoints (any fsspec URL) and to go on from: also after the loss of a
        server, which without them is an error.
    checkpoint_every : int
        Epochs between two of them.
    checkpoint_seconds : float, optional
        Within an epoch too, after so many seconds.
    steps_per_closure : int, optional
        Steps that are scheduled together; found while training by default.
    progress : bool, optional
        Show a progress bar; by default where a person looks on.

    Returns
    -------
    History
        As Keras's, with `steps`, `repeated` (steps done twice after the loss of a worker) and
        `scores`. An awaitable of it with an asynchronous client.

    Raises
    ------
    DataError
        If the model or the feed cannot be trained on.
    PlacementError
        If the cluster lacks a role, or nothing can be written at `checkpoint`.
    MemberLost
        If the chief is lost, or a server and there is no checkpoint.

    Examples
    --------
    >>> import dask.array as da
    >>> import keras
    >>> from distributed import Client
    >>> import dask_tf
    >>> X = da.random.default_rng(0).random((1000, 4), chunks=(250, 4), dtype="float32")
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> with Client(n_workers=3, threads_per_worker=1) as client:
    ...     with dask_tf.start_tensorflow(client, ps=1, worker=1, chief=1) as cluster:
    ...         feed = cluster.feed(X, X[:, 0], name="train")
    ...         history = dask_tf.fit(cluster, model, epochs=3)
    >>> history.history["loss"][2] < history.history["loss"][0]
    True
    """
    training = Supervised(cluster, data, checkpoint, progress)
    source = Source(data, batch_size, shuffle, seed)
    options = {
        "epochs": epochs,
        "steps_per_epoch": steps_per_epoch or training.batches(batch_size),
        "initial_epoch": initial_epoch,
        "validation_steps": validation_steps,
        "validation_freq": validation_freq,
        "class_weight": dict(class_weight) if class_weight else None,
        "steps_per_closure": steps_per_closure,
        "checkpoint_every": checkpoint_every,
        "checkpoint_seconds": checkpoint_seconds,
        "verbose": verbose,
    }
    if not getattr(model, "compiled", False):
        raise DataError(f"model {getattr(model, 'name', model)!r} is not compiled: call model.compile(...) first")
    validation = None
    if validation_data is not None:
        training.check_held(validation_data, "chief", "validation_data")
        validation = Source(validation_data, batch_size)
    if scorer is not None:
        training.check_held(scorer.data, "scorer", "scorer.data")
    work = FitWork(
        training.id,
        bytes(dumps(model)),
        bytes(dumps(callbacks)),
        source,
        validation,
        training.checkpoints,
        config.seconds("start-timeout"),
        scorer.every if scorer is not None else None,
        options,
    )

    async def run() -> History:
        scores: list[tuple[int, dict[str, float]]] = []
        answer = b""
        async with training.prepared():
            scoring_ = None if scorer is None else asyncio.ensure_future(training.score(scorer, work.model, scores))
            try:
                answer = await training.attempts(chief.fit_here, work)
            finally:
                if scoring_ is not None:
                    await training.end_scoring(scoring_, answer)
        history: History
        history, trained, spec = pickle.loads(answer)
        _adopt(model, trained, spec)
        history.scores = scores
        return history

    return clients.call(cluster.client, run)


def train(
    cluster: TensorFlowCluster,
    build: Callable[[], Any],
    step_fn: Callable[[Any, Any], dict[str, Any]],
    data: str = "train",
    *,
    steps: int,
    batch_size: int = 32,
    shuffle: bool = True,
    seed: int | None = None,
    result: Callable[[Any], Any] | None = None,
    variable_partitioner: Any = None,
    checkpoint: str | Path | Checkpoints | None = None,
    checkpoint_seconds: float = 60.0,
    steps_per_closure: int | None = None,
    progress: bool | None = None,
) -> Any:
    """Train by a step function of one's own on the parameter servers of a cluster.

    Parameters
    ----------
    cluster : TensorFlowCluster
        With tasks "ps" and "worker".
    build : callable
        ``build() -> state``, run in the chief: a ``tf.Module``, or a dict of variables, which come to lie on
        the servers.
    step_fn : callable
        ``step_fn(state, batch) -> dict of str to tensor``: one step, run in the workers. Update variables by
        ``assign_add`` and ``assign_sub``, which are atomic.
    data : str
        The feed to train on.
    steps : int
        Steps over all workers together.
    batch_size, shuffle, seed, checkpoint, checkpoint_seconds, steps_per_closure, progress
        As in `fit`.
    result : callable, optional
        ``result(state)``, run in the chief at the end; what it returns must be picklable.
    variable_partitioner : callable, optional
        One of ``tf.distribute.experimental.partitioners``: large variables, such as embeddings, are
        cut into rows over the servers. Keras 3 models cannot take one yet.

    Returns
    -------
    Trained
        Its `state` is what `result` returned. An awaitable of it with an asynchronous client.

    Raises
    ------
    PlacementError, DataError, MemberLost
        As in `fit`. What `step_fn` raised is raised as it is.

    Examples
    --------
    >>> def build():
    ...     import tensorflow as tf
    ...     return {"w": tf.Variable(tf.zeros([4, 1]))}
    >>> def step(state, batch):
    ...     import tensorflow as tf
    ...     x, y = batch
    ...     error = x @ state["w"] - y[:, None]
    ...     state["w"].assign_sub(0.01 * tf.transpose(x) @ error)
    ...     return {"loss": tf.reduce_mean(error**2)}
    >>> import dask.array as da
    >>> from distributed import Client
    >>> import dask_tf
    >>> X = da.random.default_rng(0).random((1000, 4), chunks=(250, 4), dtype="float32")
    >>> with Client(n_workers=3, threads_per_worker=1) as client:
    ...     with dask_tf.start_tensorflow(client, ps=1, worker=1, chief=1) as cluster:
    ...         feed = cluster.feed(X, X[:, 0], name="train")
    ...         trained = dask_tf.train(cluster, build, step, steps=100)
    >>> sorted(trained.values)
    ['loss']
    """
    training = Supervised(cluster, data, checkpoint, progress)
    work = LoopWork(
        bytes(dumps((build, step_fn, result))),
        bytes(dumps(variable_partitioner)),
        Source(data, batch_size, shuffle, seed),
        training.checkpoints,
        config.seconds("start-timeout"),
        {"steps": steps, "steps_per_closure": steps_per_closure, "checkpoint_seconds": checkpoint_seconds},
    )

    async def run() -> Trained:
        async with training.prepared():
            trained: Trained = pickle.loads(await training.attempts(chief.train_here, work))
            return trained

    return clients.call(cluster.client, run)


def _adopt(model: Any, trained: Any, spec: Any) -> None:
    """Give a model the weights and the optimizer's state of its trained copy."""
    upstream.build(model, spec)
    model.set_weights(trained.get_weights())
    for own, its in zip(model.optimizer.variables, trained.optimizer.variables, strict=True):
        own.assign(its)
