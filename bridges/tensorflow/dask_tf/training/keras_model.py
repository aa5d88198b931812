"""Fit a Keras 3 model on parameter servers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dask_bridges.about import card
from dask_bridges.errors import BridgeError, DataError
from dask_tf import upstream
from dask_tf.training import checkpoint as checkpointing
from dask_tf.training.checkpoint import Checkpoints, Position
from dask_tf.training.closures import Pace, Pump
from dask_tf.training.coordinator import Coordinator
from dask_tf.training.errors import ServerLost
from dask_tf.training.moving import Moving
from dask_tf.training.scoring import Publish, Publisher
from dask_tf.training.steps import ManySteps

__all__ = ["History", "fit"]

Report = Callable[..., Any]


@dataclass
class History:
    """What ``model.fit`` returns, without the model, so that it travels.

    Attributes
    ----------
    history : dict of str to list of float
        Values of each epoch.
    epoch : list of int
        Those epochs.
    params : dict
        ``epochs`` and ``steps``, as Keras has them.
    steps : int
        Steps done in all, each counted once.
    repeated : int or None
        How many more were done since workers were lost and their functions done again elsewhere; None where the
        optimizer does not tell.
    scores : list of (int, dict)
        Steps and what the scorer found after them, where there was one.
    """

    history: dict[str, list[float]] = field(default_factory=dict)
    epoch: list[int] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    repeated: int | None = 0
    scores: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def _repr_html_(self) -> str:
        values = [[f"{value:.5g}" for value in its] for its in self.history.values()]
        caption = f"{self.steps:,} steps" + (f", {self.repeated} done twice" if self.repeated else "")
        return card(caption, ["epoch", *self.history], zip([epoch + 1 for epoch in self.epoch], *values))


def fit(
    coordinator: Coordinator,
    model: Any,
    dataset_fn: Callable[[], Any],
    *,
    steps_per_epoch: int,
    epochs: int = 1,
    initial_epoch: int = 0,
    callbacks: Any = None,
    validation_data: Any = None,
    validation_steps: int | None = None,
    validation_freq: int | Sequence[int] = 1,
    class_weight: dict[int, float] | None = None,
    steps_per_closure: int | None = None,
    verbose: int = 0,
    checkpoint: Checkpoints | None = None,
    checkpoint_every: int = 1,
    checkpoint_seconds: float | None = None,
    report: Report | None = None,
    should_stop: Callable[[], bool] | None = None,
    publish: Publish | None = None,
    publish_seconds: float = 10.0,
) -> History:
    """Train `model` in place, asynchronously: workers compute gradients, servers hold the variables.

    At home, which is between epochs, in epoch callbacks and validation and at the end, the model is a plain local one
    with the newest values. While batches run, its variables stand for those on the servers.

    Updates are exact where nothing fails: the optimizer's ``iterations`` and the sample counts of metrics are those of
    `steps_per_epoch` x epochs steps, and every gradient is applied. What is *computed* from a variable and written back
    is asynchronous by nature: the moments of Adam or momentum, moving statistics of BatchNormalization, weight
    constraints, averaged weights and the seeds of Dropout may miss an update of another worker, or two workers draw the
    same mask.

    Parameters
    ----------
    coordinator : Coordinator
    model : keras.Model
        Compiled; made or received after :func:`~dask_tf.training.connect`. Functional, Sequential or subclassed.
    dataset_fn : callable
        Returns a ``tf.data.Dataset`` of batches ``x``, ``(x, y)`` or ``(x, y, sample_weight)``. Traced here, run in
        each worker, repeated for ever there. A worker without data leaves the steps to the others.
    steps_per_epoch : int
        Batches an epoch, over all workers together; exactly so many are done.
    epochs, initial_epoch, callbacks, validation_steps, validation_freq, class_weight, verbose
        As in ``keras.Model.fit``. Batch callbacks are called once for the batches of one scheduled function; they may
        read and assign variables, but not call ``evaluate``, ``predict`` or ``fit``, which would cancel what the
        workers are doing. Epoch callbacks may.
    validation_data : optional
        As in ``keras.Model.fit``, or a function that returns it. Evaluated in this process.
    steps_per_closure : int, optional
        Steps a scheduled function; found while training where not given (about 0.25 s a function).
    checkpoint : dask_bridges.checkpoints.Checkpoints, optional
        Where to keep all variables, and to go on from where there are some. The dataset starts anew.
    checkpoint_every : int
        Epochs between checkpoints.
    checkpoint_seconds : float, optional
        Within an epoch too, when so many seconds have passed since the last.
    report : callable, optional
        ``report("progress", done=, total=)`` and ``report("metrics", step=, values={...})``, after each scheduled
        function, and ``report("checkpoint", seconds=)``.
    should_stop : callable, optional
        Asked after each scheduled function; True ends the training as ``model.stop_training`` does.
    publish : callable, optional
        ``publish(step, weights)`` from a thread of its own, every `publish_seconds`, with the newest weights.

    Returns
    -------
    History

    Raises
    ------
    DataError
        The model or the data cannot be trained on; nothing was started.
    ServerLost
        A parameter server is gone; the model has the values of the last epoch's end, `checkpoint` maybe newer ones.
    WorkersLost
        All workers are gone.

    Examples
    --------
    >>> history = fit(coordinator, model, dataset_fn, steps_per_epoch=1000, epochs=3)  # doctest: +SKIP
    >>> history.history["loss"]  # doctest: +SKIP
    [0.9, 0.4, 0.3]
    """
    _check(coordinator, model)
    schedule = _Schedule(steps_per_epoch, epochs, steps_per_closure, checkpoint_every, checkpoint_seconds)
    with upstream.exact_additions():
        training = _Training(coordinator, model, _repeated(dataset_fn, class_weight), schedule, checkpoint)
        training.report = report or (lambda *args, **fields: None)
        training.should_stop = should_stop or (lambda: False)
        training.validate = _validation(model, validation_data, validation_steps, validation_freq)
        with Publisher(training.publishable, publish, publish_seconds):
            return training.run(initial_epoch, callbacks, verbose)


def _check(coordinator: Coordinator, model: Any) -> None:
    if coordinator.partitioned:
        raise DataError(
            "Keras 3 cannot take a variable_partitioner yet: connect without one, or train with your own step function "
            "(dask_tf.training.train)"
        )
    if not getattr(model, "compiled", False):
        raise DataError(f"model {model.name!r} is not compiled: call model.compile() first")
    if model.run_eagerly:
        raise DataError(f"model {model.name!r} is compiled with run_eagerly=True: workers can only run graphs")
    if getattr(model.optimizer, "gradient_accumulation_steps", None):
        raise DataError(
            "gradient_accumulation_steps has no meaning here: workers would add to one accumulator and apply it at any "
            "time. Use a larger batch"
        )


def _repeated(dataset_fn: Callable[[], Any], class_weight: dict[int, float] | None) -> Callable[[], Any]:
    def repeated() -> Any:
        dataset = dataset_fn()
        if class_weight:
            dataset = upstream.class_weights(dataset, class_weight)
        return dataset.repeat()

    return repeated


def _validation(
    model: Any, data: Any, steps: int | None, freq: int | Sequence[int]
) -> Callable[[int], dict[str, float]]:
    def validate(epoch: int) -> dict[str, float]:
        due = (epoch + 1) % freq == 0 if isinstance(freq, int) else epoch + 1 in freq
        if data is None or not due:
            return {}
        now = data() if callable(data) else data
        x, y, weight = (*now, None, None)[:3] if isinstance(now, (tuple, list)) else (now, None, None)
        scores = model.evaluate(x, y, sample_weight=weight, steps=steps, verbose=0, return_dict=True)
        return {f"val_{name}": float(value) for name, value in scores.items()}

    return validate


@dataclass(frozen=True)
class _Schedule:
    steps_per_epoch: int
    epochs: int
    steps_per_closure: int | None
    checkpoint_every: int
    checkpoint_seconds: float | None


class _Training:
    """One call of :func:`fit`."""

    report: Report
    should_stop: Callable[[], bool]
    validate: Callable[[int], dict[str, float]]

    def __init__(
        self, coordinator: Coordinator, model: Any, dataset_fn: Any, schedule: _Schedule, checkpoint: Checkpoints | None
    ) -> None:
        self.coordinator = coordinator
        self.model = model
        self.schedule = schedule
        self.checkpoint = checkpoint
        self.position = Position()
        self._saved = time.monotonic()
        with coordinator.scope():
            self.iterator, spec = coordinator.iterate(dataset_fn)
        upstream.build(model, spec)
        self.spec = spec
        self.moving = Moving(coordinator, model)
        self._counter = upstream.iterations(model.optimizer)
        self._counted = 0
        self._metric_names = set(model.get_metrics_result())
        self._pump: Pump | None = None
        self._logs: dict[str, float] = {}

    def publishable(self) -> tuple[int, list[np.ndarray[Any, Any]]]:
        """How many steps are over, and the newest weights."""
        return self.position.steps, self.moving.weights()

    def run(self, initial_epoch: int, callbacks: Any, verbose: int) -> History:
        resumed = checkpointing.load(self.checkpoint, self.moving.variables)
        self.position = resumed or Position(epoch=initial_epoch)
        self._counted = self._iterations() - self.position.steps - self.position.repeated
        listeners = self._listeners(callbacks, verbose)
        self.model.stop_training = False
        try:
            listeners.on_train_begin()
            for epoch in range(self.position.epoch, self.schedule.epochs):
                self._epoch(epoch, listeners)
                if self.model.stop_training or self.should_stop():
                    break
            listeners.on_train_end(self._logs)
        except BaseException as error:
            cause = self._home_after(error)
            if cause is error:
                raise
            raise cause from error
        finally:
            if self._pump is not None:
                self._pump.close()
        return self._history()

    def _home_after(self, error: BaseException) -> BaseException:
        """Bring the model home with the newest values there are; returns what `error` means."""
        cause = self.coordinator.cause(error) if isinstance(error, Exception) else error
        try:
            if self._pump is not None:
                self._pump.drain()
            self.moving.come(values=not isinstance(cause, ServerLost))
        except Exception as another:
            self.moving.come(values=False)
            cause = cause if isinstance(cause, BridgeError) else self.coordinator.cause(another)
            return cause if isinstance(cause, ServerLost) else error
        return cause

    def _epoch(self, epoch: int, listeners: Any) -> None:
        """One epoch, or what is left of one that a checkpoint was made in."""
        position = self.position
        if not position.step:
            self.model.reset_metrics()
        listeners.on_epoch_begin(epoch)
        while position.step < self.schedule.steps_per_epoch and not self._stopping():
            self.moving.go()
            due = self._steps(listeners)
            self.moving.come()
            self._count()
            if due and position.step < self.schedule.steps_per_epoch:
                self._save()
        self._logs = {**self._epoch_logs(), **self.validate(epoch)}
        listeners.on_epoch_end(epoch, self._logs)
        self._logs = self._recorded(listeners, self._logs)
        self._end(epoch)

    def _steps(self, listeners: Any) -> bool:
        """Steps until the epoch ends, a checkpoint is due (then True) or someone says stop."""
        position, schedule = self.position, self.schedule
        left = schedule.steps_per_epoch - position.step
        pace = Pace(self.coordinator.workers, left, schedule.steps_per_closure)
        due = False

        def stop() -> bool:
            return due or self._stopping()

        for done in self._pumping().run(left, pace, stop):
            listeners.on_train_batch_begin(position.step)
            position.step += done.steps
            position.steps += done.steps
            self._logs = self._many.unpack(done.values)
            listeners.on_train_batch_end(position.step - 1, self._logs)
            self.report("progress", done=position.steps, total=schedule.steps_per_epoch * schedule.epochs)
            self.report("metrics", step=position.steps, values=dict(self._logs))
            due = self._due()
        return due

    def _pumping(self) -> Pump:
        """The function is traced once the variables are on the servers, where they stay until the training is over."""
        if self._pump is None:
            model = self.model
            self._many = ManySteps(
                model.train_step,
                self.coordinator.strategy,
                self.spec,
                model.get_metrics_result,
                self._metric_names,
            )
            self._pump = Pump(self.coordinator, self._many.function, self.iterator)
        return self._pump

    def _stopping(self) -> bool:
        return bool(self.model.stop_training) or self.should_stop()

    def _due(self) -> bool:
        seconds = self.schedule.checkpoint_seconds
        return self.checkpoint is not None and seconds is not None and time.monotonic() - self._saved >= seconds

    def _iterations(self) -> int:
        return 0 if self._counter is None else int(self._counter.numpy())

    def _count(self) -> None:
        """At home: what the optimizer counted beyond the steps that came back was done twice."""
        if self._counter is not None:
            self.position.repeated = max(0, self._iterations() - self._counted - self.position.steps)

    def _epoch_logs(self) -> dict[str, float]:
        values = {name: float(value) for name, value in self.model.get_metrics_result().items()}
        return values if set(values) == set(self._logs) or not self._logs else dict(self._logs)

    def _end(self, epoch: int) -> None:
        position, schedule = self.position, self.schedule
        whole = position.step >= schedule.steps_per_epoch
        if not whole:
            self._save()  # before it is in the history: whoever resumes will end this epoch
        position.epochs.append(epoch)
        for name, value in self._logs.items():
            position.history.setdefault(name, []).append(float(value))
        if whole:
            position.epoch, position.step = epoch + 1, 0
            last = position.epoch >= schedule.epochs or self._stopping()
            if last or position.epoch % schedule.checkpoint_every == 0:
                self._save()

    def _save(self) -> None:
        if self.checkpoint is not None:
            start = time.monotonic()
            checkpointing.save(self.checkpoint, self.moving.variables, self.position)
            self._saved = time.monotonic()
            self.report("checkpoint", seconds=self._saved - start)

    def _recorded(self, listeners: Any, logs: dict[str, float]) -> dict[str, float]:
        """`logs` with what other callbacks have added for History to keep, such as the learning rate."""
        import keras

        for each in listeners.callbacks:
            if isinstance(each, keras.callbacks.History):
                return {name: float(values[-1]) for name, values in each.history.items()}
        return logs

    def _listeners(self, callbacks: Any, verbose: int) -> Any:
        import keras

        if isinstance(callbacks, keras.callbacks.CallbackList):
            return callbacks
        return keras.callbacks.CallbackList(
            callbacks,
            add_history=True,
            add_progbar=verbose != 0,
            verbose=verbose,
            epochs=self.schedule.epochs,
            steps=self.schedule.steps_per_epoch,
            model=self.model,
        )

    def _history(self) -> History:
        position = self.position
        optimizer = self.model.optimizer
        if optimizer is not None and position.epochs:
            optimizer.finalize_variable_values(self.model.trainable_weights)
        return History(
            history=position.history,
            epoch=position.epochs,
            params={"epochs": self.schedule.epochs, "steps": self.schedule.steps_per_epoch},
            steps=position.steps,
            repeated=None if self._counter is None else position.repeated,
        )
