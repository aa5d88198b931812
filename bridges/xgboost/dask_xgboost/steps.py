"""One procedure for synchronous and asynchronous clients: a generator that yields what it has asked a client for."""

from __future__ import annotations

from collections.abc import Coroutine, Generator
from typing import Any

import dask
from distributed import Client

from dask_bridges import clients

__all__ = ["Steps", "compute", "run"]

#: Yields what a client's method gave (a value, or an awaitable of an asynchronous client), is sent the value.
Steps = Generator[Any, Any, Any]


def run(steps: Steps, client: Client | None) -> Any:
    """Go through the steps in this thread; with an asynchronous client, return a coroutine that does.

    Parameters
    ----------
    steps : generator
    client : distributed.Client or None
        Whom the steps ask.

    Examples
    --------
    >>> def steps():
    ...     return (yield 20) + (yield 22)
    >>> run(steps(), None)
    42
    """
    if client is not None and client.asynchronous:
        return _awaited(steps)
    value = None
    while True:
        try:
            value = steps.send(value)
        except StopIteration as end:
            return end.value


async def _awaited(steps: Steps) -> Any:
    value = None
    try:
        while True:
            value = await _value(steps.send(value))
    except StopIteration as end:
        return end.value
    finally:
        steps.close()


async def _value(step: Any) -> Any:
    return await step if isinstance(step, Coroutine) or hasattr(step, "__await__") else step


def compute(client: Client | None, delayed: list[Any]) -> Any:
    """The values of delayed objects, in one graph; a step. Without a client, by Dask's own scheduler."""
    if client is None:
        return list(dask.compute(*delayed))
    return clients.call(client, _gathered, client, delayed)


async def _gathered(client: Client, delayed: list[Any]) -> Any:
    return await client.gather(client.compute(delayed))
