"""What runs on a cluster, for whoever looks at it: any client, any thread; and the button that ends a training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distributed import Client

from dask_bridges import clients, turns
from dask_bridges.errors import BridgeError
from dask_bridges.events import Event, from_message, topic_of

__all__ = ["RunningGang", "gangs"]


@dataclass(frozen=True)
class RunningGang:
    """A training that runs on the cluster, or waits for its turn.

    Attributes
    ----------
    id : str
    label : str
        What it is: "XGBoost training".
    workers : tuple of str
        Addresses, by rank; none while it waits for its turn.
    state : str
        "waiting", "running", "finishing" once it was asked to stop, or "ending".
    mine : bool
        Whether it was started by the client that was asked.
    """

    id: str
    label: str
    workers: tuple[str, ...]
    state: str
    mine: bool
    finishes: bool = field(repr=False)
    client: Client = field(repr=False, compare=False)

    def stop(self) -> Any:
        """End it after the round it is at; whoever started it gets the model so far.

        All members agree on the round. One that waits for its turn ends after its first round. Returns an awaitable
        with an asynchronous client. A training that has ended meanwhile stays as it is.

        Raises
        ------
        BridgeError
            If it is of a kind that cannot end early with a result.
        """
        if not self.finishes:
            raise BridgeError(
                f"{self.label} (gang {self.id}) cannot end early with a result: interrupt the call that started it"
            )
        return clients.call(self.client, self._stop)

    async def _stop(self) -> None:
        await turns.ask(self.client, "finish", gang=self.id)

    def events(self) -> Any:
        """What its members have told, the last 1000 events (`dask_bridges.events`): metrics of each round, log lines.

        Returns an awaitable with an asynchronous client.
        """
        return clients.call(self.client, self._events)

    async def _events(self) -> list[Event]:
        told = await self.client.scheduler.events(topic=topic_of(self.id))
        found = (from_message(message) for _, message in told if isinstance(message, dict))
        return [event for event in found if event is not None]


def gangs(client: Client | None = None) -> Any:
    """The trainings on a cluster, whoever started them, in the order they asked for their turn.

    Parameters
    ----------
    client : distributed.Client, optional
        By default the current one. With an asynchronous one, await the list.

    Returns
    -------
    list of RunningGang

    Examples
    --------
    From another notebook, terminal or thread than the one that waits for the model:

    >>> for gang in dask_bridges.gangs(client):     # doctest: +SKIP
    ...     print(gang)
    ...     gang.stop()
    """
    client = clients.current(client)
    return clients.call(client, _gangs, client)


async def _gangs(client: Client) -> list[RunningGang]:
    await turns.register(client)
    return [
        RunningGang(
            id=known["gang"],
            label=known["label"],
            workers=tuple(known["workers"]),
            state=_state(known),
            mine=known["client"] == client.id,
            finishes=known["finishes"],
            client=client,
        )
        for known in (await turns.ask(client, "status"))["gangs"]
    ]


def _state(known: dict[str, Any]) -> str:
    if known["ending"]:
        return "ending"
    if not known["workers"]:
        return "waiting"
    return "finishing" if known["finishing"] else "running"
