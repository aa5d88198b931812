"""In the process of a rank: the model, its batches, and `model.fit`."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from distributed.protocol.pickle import dumps

from dask_bridges.collective import Collective
from dask_bridges.processes import ChildMember
from dask_keras import upstream
from dask_keras.layout import Layout
from dask_keras.normalizing import Moments, is_synchronized
from dask_keras.outputs import tell_where
from dask_keras.resuming import Keeping
from dask_keras.rows import Batches, Files, Order
from dask_keras.shares import Shares
from dask_keras.synchronous import Replicas, apart, check_adds_up, host, replica
from dask_tf.schema import Schema

__all__ = ["FOLDER", "Fit", "Set", "Trained", "current", "fit_here"]

#: The descriptor by which a rank knows the folder of its partitions.
FOLDER = 250


@dataclass(frozen=True)
class Set:
    """Rows that a model is trained on, or validated with.

    Attributes
    ----------
    name : str
        Of the feed.
    schema : Schema
    layout : Layout
    rows : tuple of int
        Of each rank.
    """

    name: str
    schema: Schema
    layout: Layout
    rows: tuple[int, ...]

    def files(self) -> Files:
        """Those of this rank."""
        return Files(f"/proc/self/fd/{FOLDER}/{self.name}", self.schema)


@dataclass(frozen=True)
class Fit:
    """What every rank is told of a training.

    Attributes
    ----------
    model : bytes
        The compiled model, pickled.
    callbacks : bytes
        The user's, pickled.
    training : Set
    validation : Set or None
    batch_size : int
        Rows of a global batch.
    epochs, initial_epoch, steps_per_epoch, validation_freq, class_weight
        As of `keras.Model.fit`.
    shuffle : bool
    seed : int
        Of the order of the rows.
    port : int or str
        Where ranks listen for each other, ``dask-bridges.collective-port``.
    home : str
        Where the client is, see `outputs.directory`.
    keeping : Keeping or None
        Of checkpoints.
    """

    model: bytes
    callbacks: bytes
    training: Set
    validation: Set | None
    batch_size: int
    epochs: int
    initial_epoch: int
    steps_per_epoch: int
    validation_freq: Any
    class_weight: dict[int, float] | None
    shuffle: bool
    seed: int
    port: int | str
    home: str
    keeping: Keeping | None = None

    def of_rank(self, rank: int) -> Fit:
        """What that rank is told."""
        return self if self.keeping is None else replace(self, keeping=self.keeping.of_rank(rank))


@dataclass(frozen=True)
class Trained:
    """What comes of it.

    Attributes
    ----------
    model : bytes
        Pickled.
    history : dict
        Of the `History` callback: its `history`, `epoch` and `params`.
    callbacks : list of dict
        The state of each of the user's callbacks: attributes, pickled.
    stopped : bool
        Whether a callback has ended it.
    """

    model: bytes
    history: dict[str, Any]
    callbacks: list[dict[str, bytes]]
    stopped: bool


_members: list[ChildMember] = []


def current() -> ChildMember:
    """The rank that the calling code runs in, for layers, losses and callbacks: ``current().rank``, ``.world_size``.

    Raises
    ------
    RuntimeError
        Elsewhere than in the process of a rank.
    """
    if not _members:
        raise RuntimeError("no rank: this is asked in the process of one, by what dask_keras.fit trains")
    return _members[0]


def fit_here(member: ChildMember, work: tuple[Fit, int]) -> Trained | None:
    """Train as one of the ranks; rank 0 gives what came of it."""
    fit, threads = work
    _members.append(member)
    _compute_with(threads)
    model = pickle.loads(fit.model)
    rank = member.rank
    _differ(model, rank)
    callbacks = pickle.loads(fit.callbacks) if rank == 0 else []
    tell_where(member, callbacks, fit.home)
    batches = Batches(
        fit.training.files(), fit.training.layout, Shares(fit.training.rows, fit.batch_size),
        Order(fit.shuffle, fit.seed, rank),
    )  # fmt: skip
    validation = _validation(fit, rank)
    with Collective.join(member, port=fit.port) as collective:
        replicas = Replicas(collective, batches.shares, fit.initial_epoch * fit.steps_per_epoch)
        with contextlib.ExitStack() as stack:
            stack.enter_context(replica(model, replicas, looks_on=fit.validation is not None and validation is None))
            for layer in filter(is_synchronized, upstream.layers(model)):
                stack.enter_context(upstream.with_moments(layer, Moments(replicas)))
            try:
                history = _fit(member, fit, model, replicas, callbacks, batches, validation)
            except BaseException as error:
                if replicas.error is None or replicas.error is error:
                    raise
                raise replicas.error from error
        collective.barrier()  # nobody leaves before all have come this far
    if rank:
        return None
    told = {"history": history.history, "epoch": history.epoch, "params": history.params}
    return Trained(bytes(dumps(model)), told, [_state(callback) for callback in callbacks], bool(model.stop_training))


def _fit(
    member: ChildMember,
    fit: Fit,
    model: Any,
    replicas: Replicas,
    callbacks: Sequence[Any],
    batches: Batches,
    validation: Batches | None,
) -> Any:
    from dask_keras.agreement import Agreement
    from dask_keras.feeds import endless, once
    from dask_keras.resuming import Keeper, Resumed

    with apart(model):
        upstream.build(model, batches[replicas.step])
    check_adds_up(model)
    keeper = resumed = None
    if fit.keeping is not None:
        keeper = Keeper(member, fit.keeping, replicas, callbacks)
        if fit.keeping.step is not None:
            resumed = Resumed(fit.keeping, model, member.rank, fit.training.rows)
            replicas.step = resumed.step
            _append(callbacks)
    row_bytes = fit.training.schema.row_bytes
    agreement = Agreement(
        member, replicas, callbacks, model, fit.epochs, fit.steps_per_epoch, keeper, resumed, row_bytes
    )
    # Of validation that this rank has no rows for, fit wants to see a batch nevertheless.
    val = None if fit.validation is None else once(validation or batches, validation.shares.steps if validation else 1)
    parts = _parts_of(fit, resumed)
    for part in parts:
        replicas.unfinished = part is not parts[-1]
        _fit_part(fit, part, model, endless(batches, replicas.step), val, agreement)
        if model.stop_training and replicas.unfinished:
            replicas.unfinished = False
            model.optimizer.finalize_variable_values(model.trainable_variables)
            agreement.on_train_end()
            break
    return model.history


def _parts_of(fit: Fit, resumed: Any) -> list[tuple[int, int, int]]:
    """First epoch, last one and steps of an epoch: an epoch that was interrupted has fewer than the others."""
    steps = fit.steps_per_epoch
    if resumed is None:
        return [(fit.initial_epoch, fit.epochs, steps)]
    epoch, batch = resumed.position.epoch, resumed.position.batch
    if resumed.position.stopped:
        return [(fit.epochs, fit.epochs, steps)]
    if not batch:
        return [(epoch, fit.epochs, steps)]
    rest = [(epoch + 1, fit.epochs, steps)] if epoch + 1 < fit.epochs else []
    return [(epoch, epoch + 1, steps - batch), *rest]


def _fit_part(fit: Fit, part: tuple[int, int, int], model: Any, data: Any, validation: Any, agreement: Any) -> None:
    import keras

    if keras.backend.backend() == "tensorflow":
        model.jit_compile = False  # XLA cannot call back
    first, last, steps = part
    model.fit(
        data,
        epochs=last,
        initial_epoch=first,
        steps_per_epoch=steps,
        validation_data=validation,
        validation_freq=fit.validation_freq,
        class_weight=fit.class_weight,
        shuffle=False,  # the batches come as they are to; Keras would warn that it cannot
        callbacks=agreement,
        verbose=0,
    )


def _append(callbacks: Sequence[Any]) -> None:
    """Have files that were begun before the interruption go on."""
    import keras

    for callback in callbacks:
        if isinstance(callback, keras.callbacks.CSVLogger):
            callback.append = True


def _validation(fit: Fit, rank: int) -> Batches | None:
    """The rows that this rank validates with, in batches of its own; None without any."""
    found = fit.validation
    if found is None or not found.rows[rank]:
        return None
    size = max(1, fit.batch_size // len(found.rows))
    return Batches(found.files(), found.layout, Shares((found.rows[rank],), size), Order())


def _compute_with(threads: int) -> None:
    """Have the framework use so many threads."""
    import keras

    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        # A step that waits for the other ranks must leave the next batch a thread.
        tf.config.threading.set_inter_op_parallelism_threads(max(2, threads))
    elif backend == "torch":
        import torch

        torch.set_num_threads(threads)


def _differ(model: Any, rank: int) -> None:
    """Give the ranks random numbers of their own, for dropout."""
    for variable in model.variables:
        if rank and variable.name == "seed_generator_state":
            state = host(variable)
            variable.assign(((state.astype(np.int64) + 7919 * rank) % 2**31).astype(state.dtype))


def _state(callback: Any) -> dict[str, bytes]:
    """What of a callback can travel."""
    return dict(_travelling({name: value for name, value in vars(callback).items() if name not in ("_model", "model")}))


def _travelling(attributes: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    for name, value in attributes.items():
        try:
            yield name, bytes(dumps(value))
        except Exception:  # an open file, say: it stays here
            continue
