"""Teaching a cluster to move models, and undoing it."""

from __future__ import annotations

from typing import Any

from distributed import Client, WorkerPlugin

from dask_serializers.hooks import activate, deactivate

__all__ = ["ModelSerializers", "register", "unregister"]

PLUGIN = "dask-serializers"


class ModelSerializers(WorkerPlugin):  # type: ignore[misc]
    """Worker plugin that keeps a worker able to move models; workers that join later get it too."""

    name = PLUGIN
    idempotent = True

    def setup(self, worker: Any) -> None:
        """Begin on this worker."""
        activate()

    def teardown(self, worker: Any) -> None:
        """Stop on this worker."""
        deactivate()


def register(client: Client | None = None) -> Any:
    """Make a cluster and this process able to move Keras models, TensorFlow tensors and XGBoost boosters.

    Once per cluster; again is harmless. No framework is imported by it. Where ``dask-bridges`` is installed as a
    package this happens by itself, in every process that imports Dask's ``sizeof`` (workers and clients do), so that
    this call is needed only where it is merely on the path, or after :func:`unregister`.

    Parameters
    ----------
    client : distributed.Client, optional
        The cluster's client, synchronous or asynchronous; by default the current one.

    Returns
    -------
    None or awaitable
        An awaitable if `client` is asynchronous.

    Raises
    ------
    ValueError
        If there is no client.

    Examples
    --------
    >>> import keras
    >>> from distributed import Client
    >>> import dask_serializers
    >>> client = Client(processes=True, n_workers=1)
    >>> dask_serializers.register(client)
    >>> def build():
    ...     return keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> client.submit(build).result().count_params()
    4
    """
    activate()
    client = client or Client.current()
    return client.sync(_registered, client)


async def _registered(client: Client) -> None:
    await client.register_plugin(ModelSerializers(), name=PLUGIN)


def unregister(client: Client | None = None) -> Any:
    """Undo :func:`register`: Dask and Keras do again what they do without us.

    Parameters
    ----------
    client : distributed.Client, optional
        The cluster's client; by default the current one.

    Returns
    -------
    None or awaitable
        An awaitable if `client` is asynchronous.

    Raises
    ------
    ValueError
        If there is no client, or the cluster was not registered.
    """
    client = client or Client.current()
    deactivate()
    return client.sync(client.unregister_worker_plugin, PLUGIN)
