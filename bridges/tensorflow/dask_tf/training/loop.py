"""Train with a step function of one's own on parameter servers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dask_bridges.about import card
from dask_tf import upstream
from dask_tf.training import checkpoint as checkpointing
from dask_tf.training.checkpoint import Checkpoints, Position
from dask_tf.training.closures import Pace, Pump
from dask_tf.training.coordinator import Coordinator
from dask_tf.training.steps import ManySteps

__all__ = ["Trained", "train"]


@dataclass
class Trained:
    """What :func:`train` returns.

    Attributes
    ----------
    values : dict
        What the last step to come back returned.
    steps : int
        Steps done, each counted once.
    repeated : int
        How many more were done since workers were lost and their functions done again elsewhere.
    state : object
        What ``build`` returned; its variables live on the servers until the coordinator closes. On a client,
        what its ``result`` made of it.
    """

    values: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    repeated: int = 0
    state: Any = None

    def _repr_html_(self) -> str:
        caption = f"{self.steps:,} steps" + (f", {self.repeated} done twice" if self.repeated else "")
        return card(caption, ["after the last step", ""], self.values.items())


def train(
    coordinator: Coordinator,
    build: Callable[[], Any],
    step_fn: Callable[[Any, Any], dict[str, Any]],
    dataset_fn: Callable[[], Any],
    *,
    steps: int,
    steps_per_closure: int | None = None,
    checkpoint: Checkpoints | None = None,
    checkpoint_seconds: float = 60.0,
    report: Callable[..., Any] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Trained:
    """Have the workers do `steps` steps of ``step_fn(state, batch)``, asynchronously.

    Parameters
    ----------
    coordinator : Coordinator
        Connected with a ``variable_partitioner`` where variables should be cut into rows.
    build : callable
        ``build() -> state``: a ``tf.Module``, or a dict, list or tuple of variables and modules. Called in the
        strategy's scope, so that its variables live on the servers.
    step_fn : callable
        ``step_fn(state, batch) -> dict of str to tensor``, one step; converted by AutoGraph. Update variables by
        ``assign_add`` and ``assign_sub``: they are atomic, ``assign`` of something computed from them is not.
    dataset_fn : callable
        As in :func:`~dask_tf.training.fit`.
    steps : int
        Steps over all workers; exactly so many are done, counting those of the checkpoint that is resumed.
    steps_per_closure : int, optional
        Steps a scheduled function; found while training where not given.
    checkpoint : dask_bridges.checkpoints.Checkpoints, optional
        Where to keep the variables of `state`, and to go on from.
    checkpoint_seconds : float
        Seconds between checkpoints; there is one at the end too.
    report, should_stop
        As in :func:`~dask_tf.training.fit`.

    Returns
    -------
    Trained

    Raises
    ------
    DataError
        The dataset is empty in every worker, or the checkpoint is of another state.
    ServerLost, WorkersLost
        See :func:`~dask_tf.training.fit`. What `step_fn` raised is raised as it is.

    Examples
    --------
    >>> def build():
    ...     return {"w": tf.Variable(0.0)}
    >>> def step(state, batch):
    ...     state["w"].assign_add(tf.reduce_mean(batch))
    ...     return {"w": state["w"]}
    >>> train(coordinator, build, step, dataset_fn, steps=1000).values["w"]  # doctest: +SKIP
    """
    loop = _Loop(coordinator, build, step_fn, dataset_fn, checkpoint)
    try:
        with upstream.exact_additions():
            return loop.run(steps, steps_per_closure, checkpoint_seconds, report, should_stop or (lambda: False))
    except Exception as error:
        cause = coordinator.cause(error)
        if cause is error:
            raise
        raise cause from error
    finally:
        loop.pump.close()


class _Loop:
    def __init__(
        self,
        coordinator: Coordinator,
        build: Callable[[], Any],
        step_fn: Callable[[Any, Any], dict[str, Any]],
        dataset_fn: Callable[[], Any],
        checkpoint: Checkpoints | None,
    ) -> None:
        import tensorflow as tf

        self.coordinator = coordinator
        self.checkpoint = checkpoint
        with coordinator.scope():
            self.state = build()
            self.counter = tf.Variable(0, dtype=tf.int64, trainable=False, name="steps")
            iterator, spec = coordinator.iterate(lambda: dataset_fn().repeat())
        state, counter = self.state, self.counter
        converted = tf.function(lambda batch: step_fn(state, batch))

        def step(batch: Any) -> Any:
            values = converted(batch)
            with tf.control_dependencies(tf.nest.flatten(values)):
                counter.assign_add(1)
            return values

        self.many = ManySteps(step, coordinator.strategy, spec)
        self.pump = Pump(coordinator, self.many.function, iterator)
        self.variables = [*_variables(self.state), self.counter]

    def run(
        self, steps: int, size: int | None, seconds: float, report: Any, should_stop: Callable[[], bool]
    ) -> Trained:
        position = checkpointing.load(self.checkpoint, self.variables) or Position()
        trained = Trained(state=self.state, steps=position.steps)
        saved = time.monotonic()
        due = False

        def stop() -> bool:
            return due or should_stop()

        while trained.steps < steps and not should_stop():
            pace = Pace(self.coordinator.workers, steps - trained.steps, size)
            for done in self.pump.run(steps - trained.steps, pace, stop):
                trained.steps += done.steps
                trained.values = self.many.unpack(done.values)
                due = self.checkpoint is not None and time.monotonic() - saved >= seconds
                if report is not None:
                    report("progress", done=trained.steps, total=steps)
                    report("metrics", step=trained.steps, values=trained.values)
            trained.repeated = int(self.counter.numpy()) - trained.steps
            if self.checkpoint is not None:
                position = Position(steps=trained.steps, repeated=trained.repeated)
                start = time.monotonic()
                checkpointing.save(self.checkpoint, self.variables, position)
                saved, due = time.monotonic(), False
                if report is not None:
                    report("checkpoint", seconds=saved - start)
        return trained


def _variables(state: Any) -> list[Any]:
    """The variables in a nest of variables, modules and layers, each once; those cut into rows as their parts."""
    import tensorflow as tf

    found: dict[int, Any] = {}
    parts = state if isinstance(state, tf.Module) else tf.nest.flatten(state)
    for part in [parts] if isinstance(parts, tf.Module) else parts:
        mine = [part] if isinstance(part, tf.Variable) else list(getattr(part, "variables", ()))
        for variable in mine:
            found.setdefault(id(variable), variable)
    return list(found.values())
