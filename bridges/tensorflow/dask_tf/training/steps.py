"""The function that a worker runs: several steps on batches of its own, and what to tell of the last one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["ManySteps", "name"]


def name() -> Any:
    """A dataset of one number for ever, another one in each worker: the moment it was made there."""
    import tensorflow as tf

    return tf.data.Dataset.from_tensors(tf.timestamp()).repeat()


class ManySteps:
    """A function of (iterator, names, n) that does up to n steps and returns ((steps done, worker), values).

    Fewer than n are done where the iterator has ended. `names` is an iterator of :func:`name`.

    Parameters
    ----------
    step : callable
        ``step(batch) -> dict of str to tensor``, run in the replica context of `strategy`.
    strategy : tf.distribute.Strategy
    element_spec : nested structure of tf.TypeSpec
        Of a batch.
    result : callable, optional
        Makes, from variables, what to return instead of the last step's values, once after the last step. Not used
        where those have other names than `names`.
    names : iterable of str
        What `result` returns.

    Attributes
    ----------
    function : tf.function
        To be scheduled; it is traced where it is scheduled first.
    """

    def __init__(
        self,
        step: Callable[[Any], Any],
        strategy: Any,
        element_spec: Any,
        result: Callable[[], dict[str, Any]] | None = None,
        names: Any = (),
    ) -> None:
        import tensorflow as tf

        self._strategy = strategy
        self._spec = element_spec
        self._result = result
        self._expected = set(names)
        self._names: list[str] | None = None  # of the scalars that come as one vector: each tensor is a round trip
        self._one = tf.function(lambda batch: self._local(strategy.run(step, args=(batch,))), autograph=False)
        self.function = tf.function(self._many, autograph=False)

    def unpack(self, values: Any) -> Any:
        """The values that the function returned, as plain numbers where they were scalars."""
        if self._names is None:
            return values
        return {name: float(value) for name, value in zip(self._names, values, strict=True)}

    def _local(self, values: Any) -> Any:
        import tensorflow as tf

        def first(value: Any) -> Any:
            return tf.convert_to_tensor(self._strategy.experimental_local_results(value)[0])

        return tf.nest.map_structure(first, values)

    def _many(self, iterator: Any, names: Any, n: Any) -> Any:
        import tensorflow as tf

        specs = self._one.get_concrete_function(self._spec).structured_outputs or {}
        by_result = self._result is not None and isinstance(specs, dict) and set(specs) == self._expected
        carried = {} if by_result else specs

        def go_on(i: Any, batch: Any, values: Any) -> Any:
            return tf.logical_and(i < n, batch.has_value())

        def step_on(i: Any, batch: Any, values: Any) -> Any:
            values = self._one(batch.get_value())
            more = tf.cond(i + 1 < n, iterator.get_next_as_optional, lambda: batch)
            return i + 1, more, values if carried else {}

        nothing = tf.nest.map_structure(lambda spec: tf.zeros(_known(spec.shape), spec.dtype), carried)
        first = (tf.constant(0), iterator.get_next_as_optional(), nothing)
        shapes = tf.nest.map_structure(lambda spec: spec.shape, carried)
        done, _, values = tf.while_loop(go_on, step_on, first, shape_invariants=(None, None, shapes))
        if by_result:
            assert self._result is not None
            with tf.control_dependencies([done]):
                values = self._result()
        return tf.stack([tf.cast(done, tf.float64), names.get_next()]), self._pack(values)

    def _pack(self, values: Any) -> Any:
        import tensorflow as tf

        if not isinstance(values, dict) or not all(_is_number(value) for value in values.values()):
            return values
        self._names = list(values)
        numbers = [tf.cast(value, tf.float64) for value in values.values()]
        return tf.stack(numbers) if numbers else tf.zeros([0], tf.float64)


def _is_number(value: Any) -> bool:
    import tensorflow as tf

    tensor = tf.convert_to_tensor(value)
    return bool(
        tensor.shape.rank == 0 and (tensor.dtype.is_floating or tensor.dtype.is_integer or tensor.dtype.is_bool)
    )


def _known(shape: Any) -> list[int]:
    return [0 if size is None else size for size in shape.as_list()]
