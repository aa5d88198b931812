"""`fit(strategy="ps")`: asynchronous, on the parameter servers of a TensorFlow cluster that lives for one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distributed import Client

import dask_tf
from dask_bridges import partitions
from dask_bridges.errors import DataError
from dask_keras import checks
from dask_keras.resuming import InWorkers, at
from dask_tf.starting import keras_backend

__all__ = ["OnServers", "check_options"]


def check_options(checkpoint_every: int | None, gpus_per_member: int | None) -> None:
    """Refuse options of synchronous trainings, with what there is in their place."""
    if checkpoint_every is not None:
        raise DataError("checkpoint_every counts the batches of strategy='sync': give checkpoint_seconds")
    if gpus_per_member is not None:
        raise DataError(
            "gpus_per_member is for strategy='sync': for parameter servers start the cluster yourself, "
            f"dask_tf.start_tensorflow(..., gpus={{'worker': {gpus_per_member}}}), and train by dask_tf.fit"
        )


@dataclass(frozen=True)
class OnServers:
    """One call of `fit`, on parameter servers.

    Attributes
    ----------
    client : Client
    model : keras.Model
    data, validation : tuple
        X, y and sample weights, of which some are None; without validation, None.
    servers : int
    workers : int, str, sequence of str, or None
    start, fit : dict
        For `dask_tf.start_tensorflow` and `dask_tf.fit`.
    """

    client: Client
    model: Any
    data: tuple[Any, ...]
    validation: tuple[Any, ...] | None
    servers: int
    workers: Any
    start: dict[str, Any]
    fit: dict[str, Any]

    def check(self) -> None:
        """Refuse what parameter servers cannot train.

        Raises
        ------
        DataError
            Naming it, and what to do.
        """
        if (backend := keras_backend()) != "tensorflow":
            raise DataError(f"strategy='ps' is TensorFlow's, and Keras runs on {backend} here: use strategy='sync'")
        if any(isinstance(each, tuple | list | dict) for each in self.data):
            raise DataError(
                "strategy='ps' takes X, y and sample_weight as one collection each: give inputs as columns of one "
                "dataframe, named as the model's, or use strategy='sync'"
            )
        checkpoint = self.fit["checkpoint"]
        if checkpoint is not None and isinstance(at(checkpoint), InWorkers):
            raise DataError(
                "checkpoint='memory://' is the memory of one process with strategy='ps', that of the chief, and goes "
                "with it: give a folder that all workers share, or a bucket, or use strategy='sync', whose ranks all "
                "keep the state in the memory of their workers"
            )

    def run(self) -> Any:
        """Train, and give the history; an awaitable with an asynchronous client."""
        if self.client.asynchronous:
            return self._awaited()
        with dask_tf.start_tensorflow(self.client, **self._roles()) as cluster:
            for given, options in self._feeds():
                cluster.feed(*given, **options)
            return self._history(dask_tf.fit(cluster, self.model, **self._options()))

    async def _awaited(self) -> Any:
        async with await dask_tf.start_tensorflow(self.client, **self._roles()) as cluster:
            for given, options in self._feeds():
                await cluster.feed(*given, **options)
            return self._history(await dask_tf.fit(cluster, self.model, **self._options()))

    def _roles(self) -> dict[str, Any]:
        """A worker task on each Dask worker; the servers, which wait most of the time, share with them."""
        named = None if self.workers is None or isinstance(self.workers, int) else self.workers
        if isinstance(self.workers, int):
            count = self.workers
        elif named is not None:
            count = 1 if isinstance(named, str) else len(named)
        else:
            count = len(self.client.scheduler_info(n_workers=-1)["workers"])
        return {"ps": self.servers, "worker": max(1, count), "workers": named, "share": True, **self.start}

    def _feeds(self) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        feeds = [(self._given(self.data), {"name": "train", "to": "worker"})]
        if self.validation is not None:
            feeds.append((self._given(self.validation), {"name": "validation", "to": "chief"}))
        return feeds

    def _given(self, data: tuple[Any, ...]) -> tuple[Any, ...]:
        """Columns that a model takes side by side become an array."""
        X, y, *weight = data
        if partitions.is_frame(X) and checks.matrices(self.model, X, {"X": X}):
            X = X.to_dask_array()
        if partitions.is_frame(y) and checks.target_matrices(self.model, y, {"y": y}):
            y = y.to_dask_array()
        return (X, y, *weight)

    def _options(self) -> dict[str, Any]:
        return {**self.fit, "validation_data": None if self.validation is None else "validation"}

    def _history(self, found: Any) -> Any:
        import keras

        history = keras.callbacks.History()
        history.set_model(self.model)
        history.history, history.epoch = dict(found.history), list(found.epoch)
        self.model.history = history
        return history
