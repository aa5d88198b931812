"""A model that trains as one of several replicas: equal ones, each with its part of every batch.

The optimizer and the model of a replica are given subclasses of their own classes
for the time of a `fit`. Before it updates the weights the optimizer replaces the
gradients by those of the whole batch: a mean over rows is the mean of the ranks'
means, weighted by their rows. Metrics are sums over rows, so that those of all ranks
add up: they are brought together where a mean over an epoch is asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dask_bridges.collective import Collective
from dask_bridges.errors import DataError
from dask_keras.host_calls import through_host
from dask_keras.shares import Shares

__all__ = ["Replicas", "apart", "check_adds_up", "host", "moving", "plain", "replica"]


class Replicas:
    """All replicas of a model, as one of them sees them.

    Parameters
    ----------
    collective : Collective
    shares : Shares
        Rows of each rank in each step.
    first : int
        The first step.

    Attributes
    ----------
    step : int
        The next step.
    error : BaseException or None
        What went wrong between them; the framework raises something else for it.
    unfinished : bool
        Whether another `fit` will go on where the present one ends.
    """

    def __init__(self, collective: Collective, shares: Shares, first: int = 0) -> None:
        self.collective = collective
        self.shares = shares
        self.step = first
        self.error: BaseException | None = None
        self.unfinished = False
        self._buffer = np.empty(0, np.float32)
        self._rows, self._averaged = 0, first  # rows of this rank since that step

    @property
    def rank(self) -> int:
        """Of this one."""
        return self.collective.rank

    @property
    def part(self) -> tuple[int, int]:
        """Rows of this rank, and of all, in the next step."""
        of_ranks = self.shares.of_step(self.step)
        return of_ranks[self.rank], sum(of_ranks)

    @property
    def share(self) -> int:
        """Rows of this rank in the next step."""
        return self.part[0]

    def guarded(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call what the others take part in, in the middle of a step; what goes wrong is remembered."""
        try:
            return function(*args)
        except BaseException as error:
            self.error = self.error or error
            raise

    def mean(self, whole: Sequence[Any], of_rows: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
        """The gradients of the whole batch, of those of this rank's rows; called in every step.

        Parameters
        ----------
        whole : sequence of array
        of_rows : sequence of (array, array)
            Of embeddings: the rows that were looked up, as often as they were, and their numbers.
        """
        return self.guarded(self._mean, whole, of_rows)  # type: ignore[no-any-return]

    def _mean(self, whole: Sequence[Any], of_rows: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
        share, rows = self.part
        self.step += 1
        self._rows += share
        weight = share / rows
        return self._sum(whole, weight), [self._gathered(*some, weight) for some in of_rows]

    def _sum(self, gradients: Sequence[Any], weight: float) -> list[Any]:
        """The weighted sums over all ranks."""
        sizes = [gradient.size for gradient in gradients]
        dtype = np.dtype(np.float64 if any(gradient.dtype == np.float64 for gradient in gradients) else np.float32)
        if (self._buffer.size, self._buffer.dtype) != (sum(sizes), dtype):
            self._buffer = np.empty(sum(sizes), dtype)
        pieces = np.split(self._buffer, np.cumsum(sizes)[:-1])
        for piece, gradient in zip(pieces, gradients):
            if weight:
                np.multiply(gradient.ravel(), dtype.type(weight), out=piece, casting="unsafe")
            else:  # whatever the row gives that only stands in for none
                piece.fill(0)
        self.collective.all_reduce(self._buffer)
        return [piece.reshape(own.shape).astype(own.dtype) for piece, own in zip(pieces, gradients)]

    def _gathered(self, values: Any, numbers: Any, weight: float) -> tuple[Any, Any]:
        """The weighted rows of all ranks, one after another."""
        width, count = values[:1].nbytes, len(numbers) if weight else 0
        scaled = (values[:count] * values.dtype.type(weight)).tobytes()
        rows, places = [], []
        for sent in self.collective.all_gather(numbers[:count].tobytes() + scaled):
            held = len(sent) // (8 + width) * 8
            places.append(np.frombuffer(sent[:held], np.int64))
            rows.append(np.frombuffer(sent[held:], values.dtype).reshape(-1, *values.shape[1:]))
        return np.concatenate(rows), np.concatenate(places)

    def average(self, variables: Sequence[Any]) -> None:
        """Give variables the mean of all ranks, by the rows each has trained on since the last time."""
        if self.step == self._averaged:
            return
        buffer = np.append(_flat(variables) * self._rows, self._rows)
        self.collective.all_reduce(buffer)
        self._rows, self._averaged = 0, self.step
        assign(variables, buffer[:-1] / buffer[-1])

    @property
    def pending(self) -> list[Any]:
        """What `average` has yet to bring together, for a checkpoint."""
        return [np.array([self._rows, self.step - self._averaged])]

    def pend(self, pending: Any) -> None:
        """Undo `pending`, at the step of the checkpoint."""
        self._rows, self._averaged = int(pending[0]), self.step - int(pending[1])

    def total(self, variables: Sequence[Any]) -> Any:
        """The sums of variables over all ranks."""
        values = _flat(variables)
        self.collective.all_reduce(values)
        return values

    def follow(self, variables: Sequence[Any]) -> None:
        """Give variables the values of rank 0."""
        values = [np.array(host(variable)) for variable in variables]
        raw = np.frombuffer(b"".join(value.tobytes() for value in values), np.uint8)
        buffer = np.zeros(-(-len(raw) // 4), np.int32)  # a whole number of what can be sent
        buffer.view(np.uint8)[: len(raw)] = raw
        self.collective.broadcast(buffer)
        if self.rank:
            at, raw = 0, buffer.view(np.uint8)
            for variable, value in zip(variables, values):
                variable.assign(raw[at : at + value.nbytes].view(value.dtype).reshape(value.shape))
                at += value.nbytes


def host(variable: Any) -> Any:
    """The value of a Keras variable."""
    import keras

    return keras.ops.convert_to_numpy(variable.value)


def _flat(variables: Sequence[Any]) -> Any:
    """The values of variables, in float64: sums of counts stay exact."""
    values = [np.asarray(host(variable), np.float64).ravel() for variable in variables]
    return np.concatenate(values) if values else np.empty(0)


def assign(variables: Sequence[Any], flat: Any) -> None:
    """Give variables the values that lie in an array one after another."""
    at = 0
    for variable in variables:
        size = int(np.prod(variable.shape))
        variable.assign(flat[at : at + size].reshape(variable.shape))
        at += size


def moving(model: Any) -> list[Any]:
    """What layers keep beside their weights and adapt while they train, such as moving means."""
    return [variable for variable in model.non_trainable_variables if "float" in str(variable.dtype)]


def check_adds_up(model: Any) -> None:
    """Refuse metrics that keep no sum: a sum starts at zero, which a maximum, say, does not.

    Raises
    ------
    DataError
        Naming one.
    """
    model.reset_metrics()
    for variable in model.metrics_variables:
        if np.any(host(variable)):
            raise DataError(
                f"the metric variable {variable.path} starts at other values than zero, so it is no sum over rows, and "
                "its values in several places cannot be merged: leave the metric out of compile()"
            )


class _Optimizer:
    """Over an optimizer's class."""

    _replicas: Replicas

    def finalize_variable_values(self, var_list: Any) -> None:
        """As ever, where the training is over."""
        if not self._replicas.unfinished:
            super().finalize_variable_values(var_list)  # type: ignore[misc]


class _Applies(_Optimizer):
    def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        return super().apply(_means(self._replicas, grads), trainable_variables)  # type: ignore[misc]


class _AppliesStateless(_Optimizer):
    def stateless_apply(self, optimizer_variables: Any, grads: Any, trainable_variables: Any) -> Any:
        means = _means(self._replicas, grads)
        return super().stateless_apply(optimizer_variables, means, trainable_variables)  # type: ignore[misc]


def _means(replicas: Replicas, gradients: Any) -> list[Any]:
    """All gradients but those that are None, which they are on all ranks."""
    given = list(gradients)
    means = iter(through_host(replicas.mean, [gradient for gradient in given if gradient is not None]))
    return [None if gradient is None else next(means) for gradient in given]


class _Model:
    """Over a model's class."""

    _replicas: Replicas
    _apart: list[bool]
    _looks_on: bool

    def train_step(self, *args: Any) -> Any:
        with apart(self):
            return super().train_step(*args)  # type: ignore[misc]

    def test_step(self, *args: Any) -> Any:
        with apart(self):
            return super().test_step(*args)  # type: ignore[misc]

    def compute_metrics(self, *args: Any, **kwargs: Any) -> Any:
        with apart(self):
            return super().compute_metrics(*args, **kwargs)  # type: ignore[misc]

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As ever; a rank without rows for it adds nothing to what the others find."""
        import keras

        if self._looks_on and not self._apart:
            callbacks = kwargs.get("callbacks") or keras.callbacks.CallbackList()
            callbacks.on_test_begin()
            self.reset_metrics()  # type: ignore[attr-defined]
            result = self.get_metrics_result()
            callbacks.on_test_end(result)
            return result
        return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    def get_metrics_result(self) -> Any:
        """Of all ranks together, unless asked within a step or a callback."""
        if self._apart:
            return super().get_metrics_result()  # type: ignore[misc]
        replicas, variables = self._replicas, self.metrics_variables  # type: ignore[attr-defined]
        replicas.average(moving(self))
        own = [np.array(host(variable)) for variable in variables]
        assign(variables, replicas.total(variables))
        try:
            return super().get_metrics_result()  # type: ignore[misc]
        finally:
            for variable, value in zip(variables, own):
                variable.assign(value)


@contextlib.contextmanager
def apart(model: Any) -> Iterator[None]:
    """What is asked of a replica within is its own affair: the others do not hear of it."""
    model._apart.append(True)
    try:
        yield
    finally:
        model._apart.pop()


@contextlib.contextmanager
def plain(model: Any) -> Iterator[None]:
    """A replica is of its own class within, as callbacks save and copy it, and asks no others."""
    optimizer = model.optimizer
    classes = [(each, type(each)) for each in (model, optimizer)]
    for each, of_replica in classes:
        each.__class__ = of_replica._plain
    try:
        yield
    finally:
        for each, of_replica in classes:
            each.__class__ = of_replica
    if model.optimizer is not optimizer:
        raise RuntimeError(
            f"a callback compiled model {model.name!r} anew while it trains, of which the other ranks cannot know: "
            "end the training (model.stop_training = True), compile, and call fit again"
        )


@contextlib.contextmanager
def replica(model: Any, replicas: Replicas, *, looks_on: bool = False) -> Iterator[None]:
    """Make a compiled model one of several, within.

    Parameters
    ----------
    model : keras.Model
    replicas : Replicas
    looks_on : bool
        Whether this rank has no rows for validation.
    """
    import keras

    optimizer = model.optimizer
    over = _AppliesStateless if keras.backend.backend() == "jax" else _Applies
    of_model, of_optimizer = type(model), type(optimizer)
    # What is set on the class, Keras does not track.
    own = {"_replicas": replicas, "_plain": of_model, "_apart": [], "_looks_on": looks_on}
    model.__class__ = type(of_model.__name__, (_Model, of_model), own)
    of = {"_replicas": replicas, "_plain": of_optimizer}
    optimizer.__class__ = type(of_optimizer.__name__, (over, of_optimizer), of)
    try:
        yield
    finally:
        model.__class__, optimizer.__class__ = of_model, of_optimizer
