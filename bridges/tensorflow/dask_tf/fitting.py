"""Training on the parameter servers of a TensorFlow cluster, as the client calls it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import pickle
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dask._task_spec import TaskRef
from distributed.protocol.pickle import dumps

from dask_bridges import clients, config
from dask_bridges.checkpoints import Checkpoints
from dask_bridges.errors import DataError, MemberLost, PlacementError
from dask_bridges.events import Metrics
from dask_bridges.ui.progress import ProgressBar, wants_bar
from dask_tf import chief, hosting, scoring, upstream
from dask_tf.chief import FitWork, LoopWork, Source
from dask_tf.cluster import TensorFlowCluster
from dask_tf.training import History, ServerLost, Trained

if TYPE_CHECKING:
    from dask_tf.feeding import Feed

__all__ = ["Scorer", "fit", "train"]

#: How often a training goes on from its last checkpoint.
ATTEMPTS = 3


@dataclass(frozen=True)
class Scorer:
    """Evaluates the parameters of a training while it runs, in the process of the "scorer" task.

    Attributes
    ----------
    data : str
        The feed to evaluate on; fed with ``to="scorer"``.
    every : float
        Seconds between two evaluations, or longer where one takes longer.
    until : callable, optional
        ``until(scores) -> bool``, called on the client; True ends the training.
    batch_size : int
    """

    data: str
    every: float = 5.0
    until: Callable[[dict[str, float]], bool] | None = None
    batch_size: int = 1024


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
    validation_freq: int = 1,
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
    >>> cluster.feed(X, y, name="train")  # doctest: +SKIP
    >>> history = dask_tf.fit(cluster, model, epochs=3)  # doctest: +SKIP
    """
    training = _Training(cluster, data, checkpoint, progress)
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
    >>> dask_tf.train(cluster, build, step, steps=1000).values  # doctest: +SKIP
    {'loss': 0.01}
    """
    training = _Training(cluster, data, checkpoint, progress)
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


class _Training:
    """One training, from the client: what is checked before, and what is done when something is lost."""

    def __init__(
        self, cluster: TensorFlowCluster, data: str, checkpoint: str | Path | Checkpoints | None, progress: bool | None
    ) -> None:
        roles = {task.role for task in cluster.tasks}
        if lacking := [role for role in ("ps", "worker") if role not in roles]:
            raise PlacementError(
                f"training on parameter servers needs tasks {' and '.join(map(repr, lacking))}, and the cluster has "
                f"{', '.join(task.name for task in cluster.tasks)}: start_tensorflow(client, ps=1, worker=2)"
            )
        self.cluster = cluster
        self.feed = self._fed(data)
        self.checkpoints = (
            checkpoint if checkpoint is None or isinstance(checkpoint, Checkpoints) else Checkpoints(checkpoint)
        )
        self.bar = ProgressBar("TensorFlow") if wants_bar(progress) else None
        self.id = uuid.uuid4().hex
        self.servers = cluster._ranks("ps")
        (self.chief,) = cluster._ranks("chief:0")

    def _fed(self, name: str) -> Feed:
        feeds = self.cluster.feeds
        if name not in feeds:
            there = ", ".join(map(repr, feeds)) or "none"
            raise DataError(f"nothing was fed under the name {name!r} (there is {there}): cluster.feed(X, y, name=…)")
        return feeds[name]

    def check_held(self, name: str, role: str, argument: str) -> None:
        """See that a task of that role holds rows of a feed."""
        rows = self._fed(name).rows
        if not any(task.role == role and rows.get(task.name) for task in self.cluster.tasks):
            raise DataError(
                f"{argument}={name!r} was fed to {', '.join(rows)}, and is needed by the {role}: "
                f"cluster.feed(…, name={name!r}, to={role!r})"
            )

    def batches(self, batch_size: int) -> int:
        """Batches of all workers' rows."""
        count = sum(math.ceil(rows / batch_size) for rows in self.feed.rows.values())
        if not count:
            raise DataError(f"the feed {self.feed.name!r} has no rows")
        return count

    @contextlib.asynccontextmanager
    async def prepared(self) -> Any:
        """While there are checkpoints, a server that is lost starts again, empty."""
        if self.checkpoints is not None:
            await asyncio.to_thread(self.checkpoints.check)
        await self._spare_servers(self.checkpoints is not None)
        if self.bar is not None:
            self.cluster.events.listen(self.bar)
        try:
            yield
        finally:
            if self.bar is not None:
                self.cluster.events.unlisten(self.bar)
                self.bar.close()
            if self.cluster._alive:
                await self._spare_servers(False)

    async def _spare_servers(self, spare: bool) -> None:
        for rank in self.servers:
            await self.cluster._call(rank, hosting.spare_task, spare)

    async def attempts(self, function: Any, work: Any) -> bytes:
        """Have the chief do it; again from the last checkpoint where a server was lost."""
        for attempt in range(1, ATTEMPTS + 1):
            await self._fresh_chief()
            try:
                return bytes(await self._in_chief(function, work))
            except ServerLost as lost:
                if self.checkpoints is None or attempt == ATTEMPTS:
                    raise
                if await asyncio.to_thread(self.checkpoints.latest) is None:
                    raise MemberLost(f"{lost} There is no checkpoint yet at {self.checkpoints.url}") from lost
                self.cluster._log(f"training {lost} It goes on from the last checkpoint")
        raise AssertionError

    async def _fresh_chief(self) -> None:
        """TensorFlow connects a process to a cluster once, so a chief that has been used starts anew."""
        cluster = self.cluster
        if self.chief in cluster._used:
            await cluster._restart(self.chief)
        cluster._used.add(self.chief)
        await cluster._until_up()

    async def _in_chief(self, function: Any, *args: Any) -> Any:
        cluster = self.cluster
        future = cluster._call(self.chief, hosting.call_in_task, dumps((function, args, {})))
        answer = asyncio.ensure_future(future.result())
        gone = asyncio.ensure_future(self._server_lost())
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():  # TensorFlow may not notice for long, where the server is back at once
                raise gone.result()
            return answer.result()
        except asyncio.CancelledError:
            await asyncio.shield(self.stop())
            raise
        except MemberLost as lost:
            if isinstance(lost, ServerLost):
                raise
            raise await cluster._cause(lost) from lost
        finally:
            for waiting in (answer, gone):
                waiting.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)
            future.release()

    async def _server_lost(self) -> ServerLost:
        """Wait until a server goes down that is to start again."""
        cluster = self.cluster
        before = {rank: cluster._downs[rank] for rank in self.servers}
        while True:
            names = tuple(cluster.tasks[rank].name for rank in self.servers if cluster._downs[rank] > before[rank])
            if names:
                return ServerLost(f"lost {' and '.join(names)}, and the variables there.", names)
            await cluster._change()

    async def stop(self) -> None:
        """Have the training end after the steps that are under way."""
        with contextlib.suppress(MemberLost):
            await self.cluster._call(self.chief, hosting.call_in_task, dumps((chief.stop, (), {})))

    async def score(self, scorer: Scorer, model: bytes, scores: list[tuple[int, dict[str, float]]]) -> None:
        """Evaluate the newest weights until there are none; they go from worker to worker."""
        cluster, after = self.cluster, -1
        (rank,) = cluster._ranks("scorer:0")
        source, ready = Source(scorer.data, scorer.batch_size), False
        while True:
            try:
                if not ready:
                    await cluster._call(rank, hosting.call_in_task, dumps((scoring.prepare, (model, source), {})))
                    ready = True
                call = dumps((chief.newest, (self.id, after), {}))
                newest = cluster._call(self.chief, hosting.call_in_task, call)
                call = dumps((scoring.score, (), {}))
                scored = await cluster._call(rank, hosting.call_in_task, call, inputs=(TaskRef(newest.key),)).result()
            except (MemberLost, RuntimeError):
                if not cluster._alive:
                    return
                ready = False
                await cluster._until_up()
                continue
            if scored is None:
                return
            if scored[0] == after:
                continue
            after, values = scored
            scores.append((after, values))
            cluster.events.publish(Metrics(gang=cluster.id, rank=rank, step=after, values=values))
            if scorer.until is not None and scorer.until(values):
                await self.stop()

    async def end_scoring(self, scoring_: asyncio.Task[None], answer: bytes) -> None:
        """Wait for the last evaluation; a training that failed has none."""
        if answer:
            await asyncio.wait({scoring_}, timeout=config.seconds("stop-timeout"))
        scoring_.cancel()
        for error in await asyncio.gather(scoring_, return_exceptions=True):
            if isinstance(error, Exception):
                raise error


def _adopt(model: Any, trained: Any, spec: Any) -> None:
    """Give a model the weights and the optimizer's state of its trained copy."""
    upstream.build(model, spec)
    model.set_weights(trained.get_weights())
    for own, its in zip(model.optimizer.variables, trained.optimizer.variables, strict=True):
        own.assign(its)
