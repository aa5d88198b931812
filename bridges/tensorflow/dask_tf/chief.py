"""In the chief's process: one training on parameter servers, and what others ask of it meanwhile."""

from __future__ import annotations

import contextlib
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from distributed.protocol.pickle import dumps

from dask_bridges.checkpoints import Checkpoints
from dask_tf import here
from dask_tf.here import RoleProcess

__all__ = ["FitWork", "LoopWork", "Source", "fit_here", "newest", "stop", "train_here"]

#: Seconds that `newest` waits.
WAIT = 5.0


@dataclass(frozen=True)
class Source:
    """A feed, and how batches are made of it.

    Attributes
    ----------
    name : str
    batch_size : int
    shuffle : bool
    seed : int or None
    """

    name: str
    batch_size: int
    shuffle: bool = False
    seed: int | None = None

    def dataset(self, process: RoleProcess) -> Any:
        """One pass over the rows of whichever process runs the dataset's graph."""
        return process.dataset(self.name, self.batch_size, shuffle=self.shuffle, seed=self.seed)


@dataclass(frozen=True)
class FitWork:
    """What the chief is told of a Keras model's training.

    Attributes
    ----------
    run : str
        Names this training.
    model, callbacks : bytes
        Pickled: they may be opened only once the process is connected.
    data : Source
    validation : Source or None
        What the chief itself evaluates.
    checkpoint : Checkpoints or None
    connect_timeout : float
        Seconds for all servers to be there.
    publish_seconds : float or None
        How often the newest weights are put where `newest` finds them, if they are.
    options : mapping
        Further arguments of `dask_tf.training.fit`.
    """

    run: str
    model: bytes
    callbacks: bytes
    data: Source
    validation: Source | None
    checkpoint: Checkpoints | None
    connect_timeout: float
    publish_seconds: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoopWork:
    """What the chief is told of a training with the user's own step function.

    Attributes
    ----------
    functions : bytes
        Pickled: build, step and what to return of the state at the end.
    partitioner : bytes
        Pickled: a variable partitioner, or None.
    data, checkpoint, connect_timeout, options
        See `FitWork`; `options` are those of `dask_tf.training.train`.
    """

    functions: bytes
    partitioner: bytes
    data: Source
    checkpoint: Checkpoints | None
    connect_timeout: float
    options: Mapping[str, Any] = field(default_factory=dict)


class _Run:
    """The training that runs here."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stopped = threading.Event()
        self.over = False
        self.weights: tuple[int, list[Any]] | None = None

    def publish(self, step: int, weights: list[Any]) -> None:
        """Keep the newest weights for whoever waits for them."""
        with _changed:
            self.weights = step, weights
            _changed.notify_all()

    def end(self) -> None:
        """Nothing newer comes."""
        with _changed:
            self.over = True
            _changed.notify_all()


_run = _Run("")
_changed = threading.Condition()


@contextlib.contextmanager
def _running(name: str) -> Iterator[_Run]:
    global _run
    run = _Run(name)
    here.current().member.on_stop(run.stopped.set)
    with _changed:
        _run = run
        _changed.notify_all()
    try:
        yield run
    finally:
        run.end()


def newest(run: str, after: int) -> tuple[int, list[Any]] | None:
    """Steps and weights of a training that are newer than `after` steps; None once nothing newer comes.

    Where nothing comes for some time, `after` and no weights: whoever waits may want to look elsewhere.
    """

    def known() -> bool:
        return _run.name == run and (_run.over or (_run.weights is not None and _run.weights[0] > after))

    with _changed:
        if not _changed.wait_for(known, WAIT):
            return after, []
        return _run.weights if _run.weights is not None and _run.weights[0] > after else None


def stop() -> None:
    """Have the training end after the steps that are under way."""
    _run.stopped.set()


def fit_here(work: FitWork) -> bytes:
    """Train a Keras model on the parameter servers.

    Returns
    -------
    bytes
        Pickled, for the client: the history, the model, and the specs of a batch.
    """
    from dask_tf.training import connect, fit

    process = here.current()
    validation = None if work.validation is None else lambda: work.validation.dataset(process)  # type: ignore[union-attr]
    with _running(work.run) as run, connect(process.tf_spec.as_dict(), timeout=work.connect_timeout) as coordinator:
        model = pickle.loads(work.model)
        history = fit(
            coordinator,
            model,
            lambda: work.data.dataset(process),
            callbacks=pickle.loads(work.callbacks),
            validation_data=validation,
            checkpoint=work.checkpoint,
            report=_reporter(process, work.data),
            should_stop=run.stopped.is_set,
            publish=run.publish if work.publish_seconds else None,
            publish_seconds=work.publish_seconds or 0.0,
            **work.options,
        )
        spec = work.data.dataset(process).element_spec
    return bytes(dumps((history, model, spec)))


def train_here(work: LoopWork) -> bytes:
    """Train with the user's own step function on the parameter servers.

    Returns
    -------
    bytes
        Pickled, for the client: a `Trained`, with what was to be returned of the state in its place.
    """
    from dask_tf.training import connect, train

    process = here.current()
    partitioner = pickle.loads(work.partitioner)
    spec = process.tf_spec.as_dict()
    with (
        _running("") as run,
        connect(spec, timeout=work.connect_timeout, variable_partitioner=partitioner) as coordinator,
    ):
        build, step, result = pickle.loads(work.functions)
        trained = train(
            coordinator,
            build,
            step,
            lambda: work.data.dataset(process),
            checkpoint=work.checkpoint,
            report=_reporter(process, work.data),
            should_stop=run.stopped.is_set,
            **work.options,
        )
        trained.state = None if result is None else result(trained.state)
        return bytes(dumps(trained))


def _reporter(process: RoleProcess, source: Source) -> Callable[..., None]:
    """What a training tells, as events of the chief."""
    member, row_bytes, before = process.member, process.feeds[source.name].row_bytes, 0
    member.tally.begin()

    def report(kind: str, **fields: Any) -> None:
        nonlocal before
        if kind == "progress":
            rows, before = (fields["done"] - before) * source.batch_size, fields["done"]
            member.tally.fed(rows, rows * row_bytes)
            member.tally.tell("", now=fields["done"] == fields["total"])
            member.progress(fields["done"], fields["total"], unit="step")
        elif kind == "checkpoint":
            member.emit_span("checkpoint", fields["seconds"])
        else:
            process.member.metrics(fields["step"], fields["values"])

    return report
