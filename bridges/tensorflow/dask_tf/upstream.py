"""Every private name of TensorFlow and Keras that we touch, and nothing else.

Checked against TensorFlow 2.21 and Keras 3.15. ``tests/tensorflow/test_parameter_servers_by_hand.py`` fails when one of
them changes or when a defect that is worked around here is mended.

What would retire each:

- :func:`exact_additions`: keras-team/keras#18668 ("Optimizer Race in Variable Update under PS strategy", open).
- :func:`moved`, :func:`slots_of`: keras-team/keras#18624 (no support of parameter servers in Keras 3, open); a public
  way to give a variable another backend value.
- :func:`build`, :func:`class_weights`: public counterparts in Keras (``Model.fit`` has both inside).
- :func:`stop`: a public ``ClusterCoordinator.close``; TensorFlow stops its threads only when it is collected.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = [
    "adds_exactly",
    "build",
    "class_weights",
    "exact_additions",
    "failed_servers",
    "is_lost_state",
    "iterations",
    "moved",
    "optimizers",
    "slots_of",
    "stop",
]

_patching = threading.Lock()
_users = 0
_undo: list[Callable[[], None]] = []
_trace = threading.local()


def adds_exactly() -> bool:
    """Whether Keras adds to a variable in one operation, so that nothing has to be corrected.

    ``Variable.assign_add`` of the TensorFlow backend is inherited and reads, adds and assigns: two workers that do so
    at once on a parameter server lose one of the two additions.
    """
    import keras
    from keras.src.backend.common import KerasVariable

    return bool(keras.Variable.assign_add is not KerasVariable.assign_add)


@contextmanager
def exact_additions() -> Iterator[None]:
    """Within, ``v.assign_add(x)`` and ``v.assign(v + x)`` on Keras variables become one atomic addition.

    Holds while a graph is traced, so the functions traced within keep it. The metrics of Keras write their counts in
    one of the two forms; optimizers write their ``iterations`` in the first and weights with operations of TensorFlow
    that are atomic already.
    """
    global _users
    with _patching:
        if not _users and not adds_exactly():
            _undo.append(_patch())
        _users += 1
    try:
        yield
    finally:
        with _patching:
            _users -= 1
            vars(_trace).clear()
            if not _users:
                while _undo:
                    _undo.pop()()


def _patch() -> Callable[[], None]:
    import tensorflow as tf
    from keras.src.backend.common import KerasVariable
    from keras.src.backend.common.stateless_scope import in_stateless_scope

    plain_add, plain_sub, plain_assign = KerasVariable.__add__, KerasVariable.__sub__, KerasVariable.assign

    def known() -> dict[int, tuple[Any, Any, Any]]:
        graph = tf.compat.v1.get_default_graph()
        if getattr(_trace, "graph", None) is not graph:
            _trace.graph, _trace.sums = graph, {}
        sums: dict[int, tuple[Any, Any, Any]] = _trace.sums
        return sums

    def remember(variable: Any, addend: Any, total: Any) -> Any:
        if not tf.executing_eagerly() and not in_stateless_scope():
            known()[id(total)] = (total, variable, addend)  # holds the tensor, so that its id stays its own
        return total

    def add(variable: Any, other: Any) -> Any:
        return remember(variable, other, plain_add(variable, other))

    def subtract(variable: Any, other: Any) -> Any:
        total = plain_sub(variable, other)
        if tf.executing_eagerly() or tf.as_dtype(variable.dtype).is_unsigned:
            return total
        return remember(variable, -tf.cast(other, variable.dtype), total)

    def assign(variable: Any, value: Any) -> Any:
        if tf.executing_eagerly() or in_stateless_scope() or variable._value is None:
            return plain_assign(variable, value)
        sums = known()
        _, of, addend = sums.get(id(value), (None, None, None))
        for key in [key for key, (_, other, _) in sums.items() if other is variable]:
            del sums[key]  # sums made before this assignment are of an older value
        if of is not variable:
            return plain_assign(variable, value)
        addend = tf.cast(addend, variable._value.dtype)
        variable._value.assign_add(tf.broadcast_to(addend, variable._value.shape))
        return value

    KerasVariable.__add__, KerasVariable.__sub__, KerasVariable.assign = add, subtract, assign

    def undo() -> None:
        KerasVariable.__add__, KerasVariable.__sub__, KerasVariable.assign = plain_add, plain_sub, plain_assign

    return undo


def build(model: Any, element_spec: Any) -> None:
    """Make all variables of `model`, its optimizer, losses and metrics, from the specs of a batch."""
    model._symbolic_build(data_batch=element_spec)


def class_weights(dataset: Any, weights: dict[int, float]) -> Any:
    """`dataset` of (x, y) as one of (x, y, sample_weight)."""
    from keras.src.trainers.data_adapters.tf_dataset_adapter import make_class_weight_map_fn

    return dataset.map(make_class_weight_map_fn(weights))


def optimizers(found: Iterable[Any]) -> list[Any]:
    """The optimizers among `found`."""
    import keras

    return [each for each in found if isinstance(each, keras.Optimizer)]


def iterations(optimizer: Any) -> Any | None:
    """The variable that counts the steps of `optimizer`; None where a step may be skipped on purpose."""
    import keras

    if optimizer is None or isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return None
    return optimizer._iterations


def slots_of(optimizer: Any) -> list[tuple[Any, Any]]:
    """(slot, the trained variable it belongs to), told by name as Keras makes them."""
    trained = [(v.path.replace("/", "_") + "_", v) for v in optimizer._trainable_variables if hasattr(v, "path")]
    trained.sort(key=lambda pair: len(pair[0]), reverse=True)
    found = []
    for slot in optimizer._variables:
        owner = next((v for prefix, v in trained if slot.name.startswith(prefix)), None)
        if owner is not None:
            found.append((slot, owner))
    return found


@contextmanager
def moved(model: Any, variables: list[Any], values: list[Any], trainers: list[Any], strategy: Any) -> Iterator[None]:
    """Within, each Keras variable has the ``tf.Variable`` of `values` that is at its place, and optimizers know it.

    Parameters
    ----------
    model : keras.Model
        The graphs it has traced on its own values are put aside.
    variables : list of keras.Variable
    values : list of tf.Variable
    trainers : list of keras.Optimizer
        All that train any of `variables`.
    strategy : tf.distribute.Strategy
        What the optimizers apply their updates in.
    """
    before = [v._value for v in variables]
    strategies = [o._distribution_strategy for o in trainers]
    graphs = (model.train_function, model.test_function, model.predict_function)
    model.train_function = model.test_function = model.predict_function = None
    for variable, value in zip(variables, values, strict=True):
        variable._value = value
    for optimizer in trainers:
        optimizer._distribution_strategy = strategy
        _know(optimizer)
    try:
        yield
    finally:
        model.train_function, model.test_function, model.predict_function = graphs
        for variable, value in zip(variables, before, strict=True):
            variable._value = value
        for optimizer, own in zip(trainers, strategies, strict=True):
            optimizer._distribution_strategy = own
            _know(optimizer)


def _know(optimizer: Any) -> None:
    """An optimizer finds its slots by the identity of the ``tf.Variable`` they belong to."""
    optimizer._trainable_variables_indices = {
        optimizer._var_key(variable): place for place, variable in enumerate(optimizer._trainable_variables)
    }


def stop(coordinator: Any) -> None:
    """End the threads of a ``ClusterCoordinator``."""
    coordinator._cluster.stop()


_SERVER = re.compile(r"remote target /job:ps/replica:0/task:(\d+)")
_LOST_STATE = re.compile(
    "unknown device|unable to find the relevant tensor remote_handle|unable to find a context_id"
    "|could not find resource|resource .* does not exist|container localhost does not exist",
    re.IGNORECASE,
)


def failed_servers(error: BaseException) -> list[int]:
    """Numbers of the parameter servers that `error` names as the ones that did not answer."""
    return sorted({int(task) for task in _SERVER.findall(str(error))})


def is_lost_state(error: BaseException) -> bool:
    """Whether `error` is what a server says that was restarted and no longer knows what it held."""
    return bool(_LOST_STATE.search(str(error)))
