"""A Keras model whose values live on the parameter servers for a while, and come home.

Keras 3 makes a model's variables where it is made. Rather than make it again under the strategy, which custom models,
their optimizers and their losses do not all survive, the model stays the one it is: each of its variables is given
another ``tf.Variable`` to stand for, on a server. At home (between epochs, in callbacks, in validation, at the end) it
is a plain local model with the newest values.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np

from dask_bridges.errors import BridgeError, DataError
from dask_tf import upstream
from dask_tf.training.coordinator import Coordinator

__all__ = ["Moving"]


class Moving:
    """The state of one model (weights, optimizers, metrics, seeds), here or on the servers.

    Parameters
    ----------
    coordinator : Coordinator
    model : keras.Model
        Compiled and built.

    Raises
    ------
    DataError
        A variable was made before the process connected, or an optimizer has no variables yet.
    """

    def __init__(self, coordinator: Coordinator, model: Any) -> None:
        from dask_serializers.keras.state import saveables

        self.coordinator = coordinator
        self.model = model
        parts = [part for _, part in saveables(model)]
        self.optimizers = upstream.optimizers(parts)
        for optimizer in self.optimizers:
            if not optimizer.built:
                raise DataError(f"optimizer {optimizer.name!r} has no variables yet: call its build() in compile()")
        self.variables = _variables(model, parts)
        self._local = [_local(v) for v in self.variables]
        self._weights = [index_of(self.variables, v) for v in model.weights]
        self._remote: list[Any] = []
        self._there: list[np.ndarray[Any, Any] | None] = [None] * len(self.variables)
        self._away: ExitStack | None = None
        self._read_all: Any = None
        self._read_weights: Any = None

    def go(self) -> None:
        """Send what has changed at home to the servers, and let the model stand for it there."""
        if not self._remote:
            self._place()
        for n, (local, remote) in enumerate(zip(self._local, self._remote, strict=True)):
            here = local.numpy()
            there = self._there[n]
            if there is None or not np.array_equal(here, there):
                remote.assign(local.read_value())
            self._there[n] = None
        self._away = ExitStack()
        self._away.enter_context(
            upstream.moved(self.model, self.variables, self._remote, self.optimizers, self.coordinator.strategy)
        )

    def come(self, *, values: bool = True) -> None:
        """Make the model a local one again, with the values from the servers; or the last ones it had at home."""
        if self._away is None:
            return
        self._away.close()
        self._away = None
        if values:
            for n, (local, value) in enumerate(zip(self._local, self._read_all(), strict=True)):
                local.assign(value)
                self._there[n] = value.numpy()

    def weights(self) -> list[np.ndarray[Any, Any]]:
        """The newest weights, in the order of ``model.get_weights()``; any thread may ask, also while training."""
        if self._read_weights is None:
            return [self._local[n].numpy() for n in self._weights]
        return [value.numpy() for value in self._read_weights()]

    def _place(self) -> None:
        """Make a variable on the servers for each: trained ones spread by size, their slots beside them."""
        beside = {id(slot): owner for o in self.optimizers for slot, owner in upstream.slots_of(o)}
        weight = self._sizes(beside)
        load = [0] * len(self.coordinator.spec["ps"])
        remote: dict[int, Any] = {}
        order = sorted(range(len(self.variables)), key=lambda n: -weight[id(self.variables[n])])
        order.sort(key=lambda n: id(self.variables[n]) in beside)  # slots follow once their variables are placed
        with self.coordinator.scope():
            for n in order:
                variable = self.variables[n]
                owner = beside.get(id(variable))
                if owner is not None and id(owner) in remote:
                    place = self.coordinator.beside(remote[id(owner)])
                else:
                    server = load.index(min(load))
                    load[server] += weight[id(variable)]
                    place = self.coordinator.on_server(server)
                with place:
                    remote[id(variable)] = _remote(variable, self._local[n])
        self._remote = [remote[id(v)] for v in self.variables]
        self._there = [local.numpy() for local in self._local]
        self._read_all = _reader(self._remote)
        self._read_weights = _reader([self._remote[n] for n in self._weights])

    def _sizes(self, beside: dict[int, Any]) -> dict[int, int]:
        """Bytes of each variable, with those of the slots that will be beside it."""
        sizes = {id(v): int(np.prod(v.shape, dtype=np.int64)) * 4 + 64 for v in self.variables}
        for slot, owner in beside.items():
            if id(owner) in sizes and slot in sizes:
                sizes[id(owner)] += sizes[slot]
        return sizes


def index_of(variables: list[Any], variable: Any) -> int:
    """Place of `variable` itself, not of an equal one."""
    return next(n for n, each in enumerate(variables) if each is variable)


def _variables(model: Any, parts: list[Any]) -> list[Any]:
    """All Keras variables of `model` and of what it holds, each once."""
    found: dict[int, Any] = {}
    lists = [model.variables, model.metrics_variables, *(getattr(part, "variables", []) for part in parts)]
    for variable in (v for each in lists for v in each):
        found.setdefault(id(variable), variable)
    return list(found.values())


def _local(variable: Any) -> Any:
    value = variable.value
    try:
        value.numpy()
    except Exception as error:
        raise DataError(
            f"variable {variable.path!r} cannot be read: it was made before this process connected to the TensorFlow "
            "cluster, or by a custom layer inside a function. Connect first, then make or receive the model"
        ) from error
    return value


def _reader(variables: list[Any]) -> Any:
    """One function that reads all `variables`, so that their copies travel side by side."""
    import tensorflow as tf

    def read() -> list[Any]:
        with tf.device("/job:chief/device:CPU:0"):
            return [tf.identity(v) for v in variables]

    return tf.function(read, autograph=False)


def _remote(variable: Any, local: Any) -> Any:
    import tensorflow as tf

    made = tf.Variable(
        local.read_value(), trainable=variable.trainable, dtype=local.dtype, shape=local.shape, name=variable.name
    )
    if not hasattr(made, "handle"):
        raise BridgeError(
            "Keras 3 cannot train variables that a variable_partitioner has cut into rows. Connect without one, or "
            "train with your own step function (dask_tf.training.train)"
        )
    return made
