"""The callbacks of a training on several ranks: the user's run on rank 0, and the others do as they say."""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from dask_bridges.processes import ChildMember
from dask_keras import upstream
from dask_keras.normalizing import is_synchronized
from dask_keras.resuming import Keeper, Position, Resumed
from dask_keras.synchronous import Replicas, host, moving, plain

__all__ = ["Agreement"]

#: Seconds between two signs of progress within an epoch.
_PAUSE = 0.2


class Agreement(keras.callbacks.CallbackList):  # type: ignore[misc]
    """What each rank gives `fit` for callbacks.

    Parameters
    ----------
    member : ChildMember
    replicas : Replicas
    callbacks : sequence of keras.callbacks.Callback
        The user's, on rank 0; none elsewhere.
    model : keras.Model
        A replica.
    epochs, steps : int
        As callbacks are told.
    keeper : Keeper, optional
        Who keeps checkpoints.
    resumed : Resumed, optional
        What to go on from.
    row_bytes : int
        Of what the model is fed.
    """

    def __init__(
        self,
        member: ChildMember,
        replicas: Replicas,
        callbacks: Sequence[Any],
        model: Any,
        epochs: int,
        steps: int,
        keeper: Keeper | None = None,
        resumed: Resumed | None = None,
        row_bytes: int = 0,
    ) -> None:
        self._member, self._replicas = member, replicas
        self._keeper, self._resumed, self._users = keeper, resumed, list(callbacks)
        self._epoch, self._past = 0, resumed.position.batch if resumed else 0  # batches before this `fit` began
        self._begun = False
        told = replicas.collective.all_gather(json.dumps(_wishes(callbacks)).encode())[0]
        self._some, self._batchwise, self._no_nan = json.loads(told)
        self._spared: list[Any] = []
        self._epochs, self._steps, self._row_bytes = epochs, steps, row_bytes
        self._last = 0.0
        super().__init__(list(callbacks), add_history=True, model=model, verbose=0, epochs=epochs, steps=steps)

    # The course of a training

    def on_train_begin(self, logs: Any = None) -> None:
        """All begin with the weights of rank 0, or with what a checkpoint has."""
        if self._begun:  # one epoch of a training that was interrupted is over
            return
        self._begun = True
        self._member.ready()
        with plain(self.model):
            super().on_train_begin(logs)
        self._follow()
        first, self.model.stop_training = self._told(upstream.initial_epoch(self.model), bool(self.model.stop_training))
        upstream.set_initial_epoch(self.model, first)
        if self._resumed is not None:
            position, history = self._resumed.position, self.model.history
            self._resumed.restore(self._replicas)
            self._resumed.restore_callbacks(self._users)
            history.history, history.epoch = dict(position.history), list(position.epochs)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """All go on with the weights and the learning rate of rank 0, which its callbacks may have changed."""
        self._epoch = epoch
        if self._past and self._resumed is not None:  # callbacks have seen it begin
            self._resumed.restore_metrics()
            return
        with plain(self.model):
            super().on_epoch_begin(epoch, logs)
        if self._some:
            self._follow()
            (self.model.stop_training,) = self._told(bool(self.model.stop_training))

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Where rank 0 has callbacks for batches, all have its learning rate, and its weights if they set some."""
        changed = self._call(super().on_train_batch_begin, self._past + batch, logs)
        if self._batchwise:
            self._agree_on_state(changed)
        share = self._replicas.share
        self._member.tally.fed(share, share * self._row_bytes)
        if not share:
            self._spare()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Where rank 0 has callbacks for batches, all stop with it."""
        batch += self._past
        self._restore()
        if self._no_nan:
            logs = self._with_nan(batch, logs)
        changed = self._call(super().on_train_batch_end, batch, logs)
        if self._batchwise:
            self._agree_on_state(changed)
            (self.model.stop_training,) = self._told(bool(self.model.stop_training))
        self._member.check()
        if batch + 1 < self._steps:
            self._keep_if_due(self._epoch, batch + 1)
        self._show(batch)
        self._member.tally.tell("compute")

    def on_test_begin(self, logs: Any = None) -> None:
        """Where rank 0's callbacks set weights to validate with, all have them."""
        self._call_and_follow(super().on_test_begin, logs)

    def on_test_end(self, logs: Any = None) -> None:
        """As `on_test_begin`."""
        self._call_and_follow(super().on_test_end, logs)

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Rank 0's callbacks see its part of the validation."""
        with plain(self.model):
            super().on_test_batch_begin(batch, logs)

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        """As `on_test_batch_begin`."""
        with plain(self.model):
            super().on_test_batch_end(batch, logs)
        self._member.tally.tell("compute")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """All stop with rank 0."""
        self._past = 0
        with plain(self.model):
            super().on_epoch_end(epoch, logs)
        (self.model.stop_training,) = self._told(bool(self.model.stop_training))
        self._keep_if_due(epoch + 1, 0, last=self.model.stop_training or epoch + 1 == self._epochs)
        if self._replicas.rank == 0:
            self._member.metrics(epoch, _scalars(logs or {}))
            self._member.progress((epoch + 1) * self._steps, self._epochs * self._steps, "batch")

    def on_train_end(self, logs: Any = None) -> None:
        """The end."""
        if not self._replicas.unfinished:
            with plain(self.model):
                super().on_train_end(logs)
        self._member.tally.tell("compute", now=True)

    def _keep_if_due(self, epoch: int, batch: int, *, last: bool = False) -> None:
        """Keep a checkpoint where it is time."""
        keeper = self._keeper
        if keeper is None:
            return
        due = keeper.due(end_of_epoch=not batch)
        if keeper.by_the_clock:
            (due,) = self._told(due)
        if due or last:
            upstream.sync(self.model)
            history = self.model.history
            values = {name: np.asarray(its, np.float64).tolist() for name, its in history.history.items()}
            with self._member.tally.timed("checkpoint"):
                keeper.keep(
                    self.model, Position(epoch, batch, bool(self.model.stop_training), values, list(history.epoch))
                )

    # Agreeing

    def _told(self, *values: Any) -> tuple[Any, ...]:
        """What rank 0 says."""
        words: list[Any] = json.loads(self._replicas.collective.all_gather(json.dumps(values).encode())[0])
        return tuple(words)

    def _follow(self) -> None:
        model = self.model
        weights = [v for v in model.variables if "float" in str(v.dtype)]  # the others: where random numbers come from
        self._replicas.follow([*weights, *model.optimizer.variables])

    def _follow_learning_rate(self) -> None:
        optimizer = self.model.optimizer
        upstream.sync(self.model)
        if not upstream.has_schedule(optimizer):
            now = float(host(optimizer.learning_rate))
            (rate,) = self._told(now)
            if rate != now:
                optimizer.learning_rate = rate

    def _call(self, function: Callable[..., None], *args: Any) -> bool:
        """Call callbacks; whether they gave the model or its optimizer other values."""
        with plain(self.model), upstream.assigned() as found:
            function(*args)
        if not found:
            return False
        model = self.model
        ours = {id(variable) for variable in (*model.variables, *model.optimizer.variables)}
        ours.discard(id(model.optimizer.learning_rate))  # which is told anyway
        return not ours.isdisjoint(found)

    def _call_and_follow(self, function: Callable[..., None], logs: Any) -> None:
        changed = self._call(function, logs)
        if self._some and self._told(changed)[0]:
            self._follow()

    def _agree_on_state(self, changed: bool) -> None:
        self._follow_learning_rate()
        if self._told(changed)[0]:
            self._follow()

    def _with_nan(self, batch: int, logs: Any) -> Any:
        """What rank 0 tells its callbacks: a loss that is no number on any rank is none."""
        finite = math.isfinite(float((logs or {}).get("loss", 0.0)))
        found = [json.loads(word) for word in self._replicas.collective.all_gather(json.dumps(finite).encode())]
        ranks = [rank for rank, fine in enumerate(found) if not fine]
        if not ranks or self._replicas.rank:
            return logs
        names = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        self._member.log(f"the loss is not finite at batch {batch} on {names}", logging.WARNING)
        return {**logs, "loss": math.nan}

    # Steps in which this rank has no row

    def _spare(self) -> None:
        """Remember what the row that stands in must not change."""
        upstream.sync(self.model)
        by_all = {id(v) for layer in upstream.layers(self.model) if is_synchronized(layer) for v in layer.variables}
        own = (variable for variable in moving(self.model) if id(variable) not in by_all)
        variables = itertools.chain(self.model.metrics_variables, own)
        self._spared = [(variable, np.array(host(variable))) for variable in variables]

    def _restore(self) -> None:
        if self._spared:
            upstream.sync(self.model)
            for variable, value in self._spared:
                variable.assign(value)
            self._spared = []

    # Telling

    def _show(self, batch: int) -> None:
        now = time.monotonic()
        if self._replicas.rank == 0 and now - self._last > _PAUSE:
            self._last = now
            self._member.progress(self._replicas.step, self._epochs * self._steps, "batch")


def _scalars(logs: Mapping[str, Any]) -> dict[str, float]:
    """Of metrics, those that are one number."""
    return {name: float(value) for name, value in logs.items() if np.ndim(value) == 0}


def _wishes(callbacks: Sequence[Any]) -> tuple[bool, bool, bool]:
    """Whether there are callbacks, some for batches, and one that stops where the loss is not a number."""
    base = keras.callbacks.Callback
    names = ("on_batch_begin", "on_batch_end", "on_train_batch_begin", "on_train_batch_end")
    batchwise = any(getattr(type(each), name) is not getattr(base, name) for each in callbacks for name in names)
    no_nan = any(isinstance(each, keras.callbacks.TerminateOnNaN) for each in callbacks)
    return bool(callbacks), batchwise, no_nan
