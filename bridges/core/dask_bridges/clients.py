"""Calls that work with a synchronous client, an asynchronous one, and inside a task."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any

from distributed import Client, Worker, get_client, get_worker, rejoin, secede
from distributed.worker import thread_state

__all__ = ["call", "current", "in_task", "lend_slot"]

#: Seconds between two looks at whether the task around a call was cancelled.
LOOK = 0.5


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


def in_task() -> bool:
    """Whether this thread runs a Dask task."""
    return getattr(thread_state, "key", None) is not None


def call(client: Client, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any, **kwargs: Any) -> Any:
    """Run a coroutine function on the client's loop, whichever way the caller works.

    Returns an awaitable to asynchronous callers, the result to others. Inside a
    Dask task the calling task lends its slot out meanwhile, so that members which
    are to run on the same worker can start; cancelling the task cancels the call.
    """
    key = getattr(thread_state, "key", None)
    if key is None or client.asynchronous:
        return client.sync(function, *args, **kwargs)
    work = functools.partial(_unless_cancelled, get_worker(), key, function, *args, **kwargs)
    if not lend_slot():
        return client.sync(work)
    try:
        return client.sync(work)
    finally:
        rejoin()


def lend_slot() -> bool:
    """Lend out the slot of the Dask task this is called in, to tasks it will wait for; whether there was one."""
    if not in_task():
        return False
    try:
        secede()
    except (KeyError, ValueError, AttributeError):  # the task has seceded by itself
        return False
    return True


async def _unless_cancelled(
    worker: Worker, key: Any, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any, **kwargs: Any
) -> Any:
    """Run `function` until it is done, or the Dask task around it is cancelled: Dask lets its thread go on."""
    work = asyncio.ensure_future(function(*args, **kwargs))
    try:
        while not (await asyncio.wait({work}, timeout=LOOK))[0]:
            task = worker.state.tasks.get(key)
            if task is None or task.state == "cancelled":
                work.cancel("the task it was called in was cancelled")
                break
        return await work
    finally:
        work.cancel()
