"""Calls that work with a synchronous client, an asynchronous one, and inside a task."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from distributed import Client, get_client, rejoin, secede
from distributed.worker import thread_state

__all__ = ["call", "current"]


def current(client: Client | None) -> Client:
    """`client`, or the current one: inside a task the worker's, else the default client.

    Raises
    ------
    TypeError
        If `client` is something else than a Dask client.
    ValueError
        If there is no current client.
    """
    if client is None:
        try:
            return get_client()
        except ValueError:
            raise ValueError(
                "no Dask client: pass one as first argument, or make one with distributed.Client(...)"
            ) from None
    if not isinstance(client, Client):
        raise TypeError(
            f"the first argument is the Dask client (or None for the current one), not {type(client).__name__}"
        )
    return client


def call(client: Client, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any, **kwargs: Any) -> Any:
    """Run a coroutine function on the client's loop, whichever way the caller works.

    Returns an awaitable to asynchronous callers, the result to others. Inside a
    Dask task the calling task lends its slot out meanwhile, so that members which
    are to run on the same worker can start.
    """
    inside_task = getattr(thread_state, "key", None) is not None and not client.asynchronous
    if not inside_task:
        return client.sync(function, *args, **kwargs)
    try:
        secede()
    except (KeyError, ValueError, AttributeError):  # the task has seceded by itself
        return client.sync(function, *args, **kwargs)
    try:
        return client.sync(function, *args, **kwargs)
    finally:
        rejoin()
