"""`fit`: the client's side of a training."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from distributed import Client

from dask_bridges import clients, config, placement
from dask_bridges.checkpoints import Checkpoints
from dask_bridges.devices import members
from dask_bridges.errors import DataError
from dask_bridges.reporting import asked, reported
from dask_bridges.ui.progress import ProgressBar, wants_bar
from dask_keras import asynchronous, checks
from dask_keras.outputs import directory
from dask_keras.places import Places
from dask_keras.resuming import Keeping, at
from dask_keras.supervising import EpochPrinter, Given, Supervised

__all__ = ["fit"]


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
    validation_freq: int | Collection[int] = 1,
    strategy: Literal["sync", "ps"] = "sync",
    servers: int = 1,
    checkpoint: str | Path | Checkpoints | None = None,
    checkpoint_every: int | None = None,
    checkpoint_seconds: float | None = None,
    workers: int | str | Sequence[str] | None = None,
    gpus_per_member: int | None = None,
    verbose: str | int = "auto",
    exclusive: bool = True,
    timeout: float | str | None = None,
    allow_plaintext: bool | None = None,
    report: str | Path | None = None,
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
        The targets. Columns of a dataframe are those of the outputs of their names, where the model has several, or
        side by side one target.
    batch_size : int, default 32
        Rows of a batch, over all workers together.
    epochs, initial_epoch, steps_per_epoch, validation_freq, class_weight
        As in `keras.Model.fit`.
    validation_data : tuple of (X, y) or (X, y, sample_weight), optional
        Of Dask collections. Metrics are those of all their rows.
    sample_weight : dask array or series, or a tuple or dict of them, optional
        One weight a row, or one for each output.
    shuffle, seed : optional
        Whether rows are mixed anew in each pass, over all partitions of a worker; and the seed, with which another
        call on as many workers gives the same result. Partitions may be moved for that.
    callbacks : list of keras.callbacks.Callback, optional
        Run once, on the worker of rank 0, on copies whose state comes back. What is told of a batch
        is of rank 0's part of it; what is told of an epoch, of all rows. Files that they write
        (`CSVLogger`, `ModelCheckpoint`) are on that worker's host, those with a relative path in
        that worker's directory: a line in the log (of `dask_keras`) says where, unless it is the client's.
    strategy : {"sync", "ps"}
        "sync" as above. With "ps", workers compute gradients of a batch each, at their own pace, and apply them to
        variables on parameter servers (TensorFlow only): one step does not equal that of one process, but none
        waits for others. See `dask_tf.fit`.
    servers : int, default 1
        Parameter servers, with "ps"; variables are spread over them.
    checkpoint : str, Path or Checkpoints, optional
        A folder that all workers share, or any other fsspec URL that they reach: the state is kept there, and what
        is there is gone on from, by a later call and by this one where a worker is lost. Without it, that ends
        the training. With "memory://" each worker keeps the state in its own memory, for this call alone: no storage is
        needed, and the training goes on as long as not all workers are lost at once.
    checkpoint_every : int, optional
        Batches between two; by default one is kept after each epoch.
    checkpoint_seconds : float, optional
        Seconds between two.
    workers : int, str or sequence of str, optional
        How many to use, or which: addresses or names. By default all.
    gpus_per_member : int, optional
        GPUs that each rank has for itself while it trains, and sees no others: of its host, leased as a
        `dask_bridges.jobs.DevicePool` leases them. Workers that cannot have so many take no part. By default
        a rank sees what its worker sees.
    verbose : "auto", 0, 1 or 2
        A progress bar (1; "auto" where a person looks on), or a line an epoch (2).
    exclusive : bool, default True
        Hold the workers alone: other trainings wait their turn. With ``strategy="ps"`` they are shared.
    timeout : float or str, optional
        Longest wait for workers, for the turn, and for GPUs (``dask-bridges.timeout``).
    allow_plaintext : bool, optional
        On a ``tls://`` cluster, consent to gradients being sent in plain TCP.
    report : str or Path, optional
        Where to write a page of who did what when, at the end, see `dask_bridges.report`.

    Returns
    -------
    keras.callbacks.History

    Raises
    ------
    DataError
        If the model cannot be trained on this data.
    PlacementError
        If workers are missing, or lack Keras in the client's version, or if there are too few GPUs, or others
        hold them for too long.
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
    course = checks.course(
        model, y, sample_weight, batch_size=batch_size, epochs=epochs, initial_epoch=initial_epoch,
        steps_per_epoch=steps_per_epoch, validation_freq=validation_freq, class_weight=class_weight,
        shuffle=shuffle, seed=seed,
    )  # fmt: skip
    if gpus_per_member is not None:
        members.check_count(gpus_per_member, "gpus_per_member")
    if strategy not in ("sync", "ps"):
        raise DataError(f"strategy={strategy!r}: there are 'sync' and 'ps'")
    data, validation = (X, y, sample_weight), checks.unpacked(validation_data)
    if strategy == "ps":
        asynchronous.check_options(checkpoint_every, gpus_per_member)
        more = {"callbacks": callbacks, "checkpoint": checkpoint, "checkpoint_seconds": checkpoint_seconds}
        on_servers = asynchronous.OnServers(
            client, model, data, validation, servers, workers,
            start={"timeout": timeout, "allow_plaintext": allow_plaintext, "report": report},
            fit={**course, **more, "progress": None if verbose == "auto" else bool(verbose)},
        )  # fmt: skip
        on_servers.check()
        return on_servers.run()
    recorder = asked(report)
    callbacks = checks.listed(callbacks)
    training = Supervised(
        client=client,
        model=model,
        callbacks=callbacks,
        sets=_sets(model, data, validation),
        places=Places(client, workers, gpus_per_member, timeout),
        options={"exclusive": exclusive, "timeout": timeout},
        fit={
            **course,
            "seed": secrets.randbits(32) if seed is None else course["seed"],
            "callbacks": checks.pickled_callbacks(callbacks),
            "port": config.get("collective-port"),
            "home": directory(),
        },
        keeping=_keeping(checkpoint, checkpoint_every, checkpoint_seconds),
        listeners=[*_listeners(verbose, epochs), *([] if recorder is None else [recorder])],
        reproducible=seed is not None,
    )
    training.prepare()
    return clients.call(client, reported, recorder, training.run)


def _sets(model: Any, data: tuple[Any, ...], validation: tuple[Any, ...] | None) -> list[Given]:
    """What is trained on and, where there is such, what is validated with."""
    training = Given.of("train", model, "", *data)
    return [training] if validation is None else [training, Given.of("validation", model, "validation_", *validation)]


def _listeners(verbose: str | int, epochs: int) -> list[Any]:
    listeners: list[Any] = [EpochPrinter(epochs)] if verbose == 2 else []
    if wants_bar({"auto": None, 1: True}.get(verbose, False)):
        listeners.append(ProgressBar("Keras"))
    return listeners


def _keeping(checkpoint: str | Path | Checkpoints | None, every: int | None, seconds: float | None) -> Keeping | None:
    if checkpoint is None:
        if every is not None or seconds is not None:
            raise DataError("checkpoint_every and checkpoint_seconds need a place: checkpoint=...")
        return None
    checks.check_count("checkpoint_every", every, optional=True)
    return Keeping(at(checkpoint), every, seconds)
