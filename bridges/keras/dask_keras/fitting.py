"""`fit`: the client's side of a training."""

from __future__ import annotations

import dataclasses
import logging
import pickle
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distributed import Client, Future
from distributed.protocol.pickle import dumps

from dask_bridges import clients, config, partitions, placement
from dask_bridges.collective import is_collective_error
from dask_bridges.errors import DataError, PlacementError
from dask_bridges.events import Event, Metrics
from dask_bridges.gang import Gang, GangPlan
from dask_bridges.partitions import Partitions, Prepared
from dask_bridges.processes import Environment
from dask_bridges.ui.progress import ProgressBar, wants_bar
from dask_keras import checks
from dask_keras.hosting import Rank, host_rank
from dask_keras.layout import Layout, flatten, nested
from dask_keras.replica import Fit, Set, Trained
from dask_tf import encoding
from dask_tf.events import Spooled
from dask_tf.starting import QUIET, keras_backend

__all__ = ["fit"]

logger = logging.getLogger(__name__)

LABEL = "Keras training"


def fit(
    client: Client | None,
    model: Any,
    X: Any,
    y: Any = None,
    *,
    batch_size: int = 32,
    epochs: int = 1,
    validation_data: Any = None,
    sample_weight: Any = None,
    class_weight: Mapping[int, float] | None = None,
    shuffle: bool = True,
    seed: int | None = None,
    callbacks: Any = None,
    initial_epoch: int = 0,
    steps_per_epoch: int | None = None,
    validation_freq: int = 1,
    workers: int | str | Sequence[str] | None = None,
    verbose: str | int = "auto",
    exclusive: bool = True,
    timeout: float | str | None = None,
    allow_plaintext: bool | None = None,
) -> Any:
    """Train a compiled Keras model, in place, on the workers that hold the data.

    Each of them has a replica of the model in a process of its own, and takes its
    part of every batch from its own partitions; gradients are summed over all in every
    step, so that the model comes out as if one process had trained on all rows.

    Parameters
    ----------
    client : distributed.Client or None
        None for the current one. With an asynchronous client the result is awaitable.
    model : keras.Model
        Compiled; Sequential, functional or subclassed, on any backend.
    X : dask array or dataframe, or a tuple or dict of them
        The inputs, with as many rows as `y`. Of a dataframe, columns go to the inputs of their
        names, or side by side to a single one; text and categories as their index (see `docs`).
    y : dask array, series or dataframe, or a tuple or dict of them, optional
        The targets.
    batch_size : int, default 32
        Rows of a batch, over all workers together.
    epochs, initial_epoch, steps_per_epoch, validation_freq, class_weight
        As in `keras.Model.fit`.
    validation_data : tuple of (X, y) or (X, y, sample_weight), optional
        Of Dask collections. Metrics are those of all their rows.
    sample_weight : dask array or series, optional
        One weight a row.
    shuffle, seed : optional
        Whether rows are mixed anew in each pass, over all partitions of a worker; and the seed.
    callbacks : list of keras.callbacks.Callback, optional
        Run once, on the worker of rank 0, on copies whose state comes back.
    workers : int, str or sequence of str, optional
        How many to use, or which: addresses or names. By default all.
    verbose : "auto", 0, 1 or 2
        A progress bar (1; "auto" where a person looks on), or a line an epoch (2).
    exclusive : bool, default True
        Hold the workers alone: other trainings wait their turn.
    timeout : float or str, optional
        Longest wait for workers and for the turn (``dask-bridges.timeout``).
    allow_plaintext : bool, optional
        On a ``tls://`` cluster, consent to gradients being sent in plain TCP.

    Returns
    -------
    keras.callbacks.History

    Raises
    ------
    DataError
        If the model cannot be trained on this data.
    PlacementError
        If workers are missing, or lack Keras in the client's version.
    GangTimeout
        If the workers were not free in time.
    MemberFailed
        If training failed on a worker; the original error is its ``__cause__``.
    MemberLost
        If a worker, or the process of a rank, died.

    Examples
    --------
    >>> history = dask_keras.fit(client, model, X, y, batch_size=256, epochs=3)  # doctest: +SKIP
    >>> history.history["loss"]  # doctest: +SKIP
    [0.61, 0.44, 0.38]
    """
    client = clients.current(client)
    placement.refuse_plaintext(client, allow_plaintext, "what Keras's replicas tell each other")
    checks.check_model(model)
    for name, value in (("batch_size", batch_size), ("epochs", epochs), ("steps_per_epoch", steps_per_epoch)):
        checks.check_count(name, value, optional=name == "steps_per_epoch")
    if class_weight and sample_weight is not None:
        raise DataError("class_weight and sample_weight cannot be given at the same time, as in Keras")
    training = _Training(
        client=client,
        model=model,
        sets=[_Given.of("train", model, "", X, y, sample_weight)],
        workers=workers,
        options={"exclusive": exclusive, "timeout": timeout},
        fit={
            "callbacks": checks.pickled_callbacks(callbacks),
            "batch_size": int(batch_size),
            "epochs": int(epochs),
            "initial_epoch": int(initial_epoch),
            "steps_per_epoch": steps_per_epoch,
            "validation_freq": validation_freq,
            "class_weight": dict(class_weight) if class_weight else None,
            "shuffle": bool(shuffle),
            "seed": secrets.randbits(32) if seed is None else int(seed),
            "port": config.get("collective-port"),
        },
    )
    if validation_data is not None:
        training.sets.append(_Given.of("validation", model, "validation_", *checks.unpacked(validation_data)))
    training.prepared = partitions.prepare_all(client, [given.collections for given in training.sets])
    listeners: list[Any] = [_EpochPrinter(epochs)] if verbose == 2 else []
    if wants_bar({"auto": None, 1: True}.get(verbose, False)):
        listeners.append(ProgressBar("Keras"))
    return clients.call(client, _run, training, list(callbacks or ()), listeners)


@dataclass(frozen=True)
class _Given:
    """The collections of one set, by role, and what the model takes of them."""

    name: str
    collections: dict[str, Any]
    layout: Layout

    @classmethod
    def of(cls, name: str, model: Any, prefix: str, X: Any, y: Any = None, weight: Any = None) -> _Given:
        roles = [f"{prefix}X", f"{prefix}y", f"{prefix}sample_weight"]
        collections = flatten(roles[0], X)
        matrices = checks.matrices(model, X, collections)
        layout = Layout(nested(roles[0], X), None, None, matrices)
        if y is not None:
            collections |= flatten(roles[1], y)
            layout = dataclasses.replace(layout, y=nested(roles[1], y))
        if weight is not None:
            collections[roles[2]] = weight
            layout = dataclasses.replace(layout, weight=roles[2])
        return cls(name, collections, layout)


@dataclass
class _Training:
    """One call of `fit`."""

    client: Client
    model: Any
    sets: list[_Given]
    workers: int | str | Sequence[str] | None
    options: dict[str, Any]
    fit: dict[str, Any]
    prepared: Sequence[Prepared] = ()


async def _run(training: _Training, callbacks: Sequence[Any], listeners: Sequence[Any]) -> Any:
    parts, places = await _placed(training)
    ranks = parts[0].holding()
    work, keys = _work(training, parts, ranks)
    held = [dict(enumerate(some.futures)) for some in parts]
    for some in parts:
        some.futures.clear()
    environment = _environment()
    plan = GangPlan(
        LABEL,
        host_rank,
        [
            Rank(work, {name: by_rank[rank] for name, by_rank in keys.items()}, environment)
            for rank in range(len(ranks))
        ],
        ranks,
        collateral=is_collective_error,
        names=[f"rank {rank}" for rank in range(len(ranks))],
        **training.options,
    )
    gang = Gang(training.client, plan)
    for listener in (_Release(training.sets, held), *listeners):
        gang.events.listen(listener)
    try:
        results = await gang.run()
    finally:
        for futures in held:
            futures.clear()
        for listener in listeners:
            getattr(listener, "close", int)()
    return _adopted(training.model, callbacks, results[0])


async def _placed(training: _Training) -> tuple[list[Partitions], list[str]]:
    """The partitions of all sets, on the workers that are to train."""
    client, workers = training.client, training.workers
    named = None if workers is None or isinstance(workers, int) else workers
    chosen = await placement.usable_workers(client, named, config.seconds("timeout", training.options["timeout"]))
    places = [worker.address for worker in chosen]
    if isinstance(workers, int):
        if not 1 <= workers <= len(places):
            raise PlacementError(f"workers={workers}, and the cluster has {len(places)} that can be used: {places}")
        places = places[:workers]
    await placement.check_packages(client, places, ["dask_bridges"])
    await placement.check_packages(
        client, places, ["keras", *_frameworks()], ': pip install "dask-bridges[keras]"', imports=False
    )
    loaded = await partitions.load_all(
        client, [(prepared, encoding.look) for prepared in training.prepared], workers=None if named is None else places
    )
    if not sum(loaded[0].rows):
        raise DataError("X has no rows")
    if isinstance(workers, int) and sum(loaded[0].rows) < workers:
        raise DataError(f"X has {sum(loaded[0].rows)} rows, which are fewer than the {workers} workers asked for")
    loaded[0].split(client, len(places))
    await loaded[0].spread(client, places, everywhere=True)
    for other in loaded[1:]:
        await other.spread(client, loaded[0].holding())
    return loaded, places


def _work(
    training: _Training, parts: Sequence[Partitions], ranks: Sequence[str]
) -> tuple[Fit, dict[str, list[dict[int, Any]]]]:
    """What all ranks are told, and the keys of each rank's partitions."""
    sets: list[Set] = []
    keys: dict[str, list[dict[int, Any]]] = {}
    for given, found in zip(training.sets, parts):
        schema = encoding.merge([info.extra for info in found.infos], tuple(given.collections))
        rows = tuple(found.rows_on(worker) for worker in ranks)
        sets.append(Set(given.name, schema, given.layout, rows))
        keys[given.name] = [
            {number: found.futures[number].key for number in found.filled() if found.workers[number] == worker}
            for worker in ranks
        ]
    checks.check_element(training.model, sets[0])
    options = dict(training.fit)
    options["steps_per_epoch"] = options["steps_per_epoch"] or -(-sum(sets[0].rows) // options["batch_size"])
    model = bytes(dumps(training.model))
    return Fit(model=model, training=sets[0], validation=sets[1] if len(sets) > 1 else None, **options), keys


class _Release:
    """Lets go of Dask's copy of a partition once it is written."""

    def __init__(self, sets: Sequence[_Given], held: Sequence[dict[int, Future]]) -> None:
        self._held = {given.name: some for given, some in zip(sets, held)}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Spooled) and (future := self._held[event.ticket].pop(event.part, None)):
            future.release()


class _EpochPrinter:
    """Prints a line an epoch."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs

    def __call__(self, event: Event) -> None:
        if isinstance(event, Metrics):
            values = " - ".join(f"{name}: {value:.4f}" for name, value in event.values.items())
            print(f"Epoch {event.step + 1}/{self._epochs} - {values}")


def _frameworks() -> list[str]:
    return [keras_backend()]


def _environment() -> Environment:
    variables: dict[str, str | None] = {
        "KERAS_BACKEND": keras_backend(),
        "MALLOC_TRIM_THRESHOLD_": None,  # Dask's nannies set it: every buffer would be fetched from the system anew
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # PyTorch's other way to ask for devices is the end of forking
        **QUIET,
    }
    return Environment((*_frameworks(), "keras"), tuple(sorted(variables.items(), key=lambda item: item[0])))


def _adopted(model: Any, callbacks: Sequence[Any], trained: Trained) -> Any:
    """The model and the callbacks as `model.fit` would leave them, and the history."""
    import keras

    copy = pickle.loads(trained.model)
    if not model.built:
        model.build_from_config(copy.get_build_config())
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    for ours, theirs in (
        (model.variables, copy.variables),
        (model.optimizer.variables, copy.optimizer.variables),
    ):
        for own, its in zip(ours, theirs, strict=True):
            own.assign(its)
    for callback, state in zip(callbacks, trained.callbacks, strict=True):
        vars(callback).update({name: pickle.loads(value) for name, value in state.items()})
        callback.set_model(model)
    history = next((each for each in callbacks if isinstance(each, keras.callbacks.History)), None)
    history = history or keras.callbacks.History()
    history.set_model(model)
    history.set_params(trained.history["params"])
    history.history, history.epoch = trained.history["history"], trained.history["epoch"]
    model.history = history
    return history
