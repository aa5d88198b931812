"""The client's and the members' side of the arbiter: registering it, asking it."""

from __future__ import annotations

import weakref
from typing import Any

import cloudpickle
from distributed import Client

from dask_bridges import arbiter, attempt, dispatcher, watchdog
from dask_bridges.errors import PlacementError

__all__ = ["ask", "register"]

cloudpickle.register_pickle_by_value(arbiter)
cloudpickle.register_pickle_by_value(attempt)
cloudpickle.register_pickle_by_value(dispatcher)
cloudpickle.register_pickle_by_value(watchdog)

_registered: weakref.WeakKeyDictionary[Client, str] = weakref.WeakKeyDictionary()


async def register(client: Client) -> None:
    """Put the arbiter on the client's scheduler, once.

    Raises
    ------
    PlacementError
        If the scheduler takes no plugins.
    """
    scheduler = client.scheduler_info().get("id")  # another one may have come up at the same address
    if _registered.get(client) == scheduler:
        return
    try:
        await client.register_plugin(arbiter.Arbiter(), name=arbiter.OPERATION)
    except Exception as error:
        raise PlacementError(
            f"the scheduler at {client.scheduler.address} refused the plugin that gives gangs their turns "
            f"({type(error).__name__}: {error}). Take register_scheduler_plugin out of the Dask configuration "
            "distributed.scheduler.blocked-handlers on the scheduler."
        ) from error
    _registered[client] = scheduler


async def ask(server: Any, method: str, **request: Any) -> dict[str, Any]:
    """Ask the arbiter through `server`, a client or a worker (both hold an rpc to the scheduler).

    Raises
    ------
    OSError
        If the scheduler, or its arbiter, is not there any more.
    """
    if server.scheduler is None:
        raise ConnectionAbortedError("the client is closed")
    answer: dict[str, Any] | None = await getattr(server.scheduler, arbiter.OPERATION)(method=method, **request)
    if answer is None:  # what a scheduler says to an operation that it does not know
        raise ConnectionResetError(f"the scheduler at {server.scheduler.address} was restarted")
    return answer
