"""Who offers a pool's devices: for each host one of its workers, as a gang of one, for as long as the pool is open."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from dataclasses import dataclass, field

from distributed import Client

from dask_bridges import config, turns
from dask_bridges.about import About
from dask_bridges.devices.finding import Group
from dask_bridges.errors import BridgeError
from dask_bridges.events import Ended, Event, EventStream, Finished, Listener, Memory, Planned, Started
from dask_bridges.gang import Gang, GangPlan
from dask_bridges.jobs import hosting
from dask_bridges.jobs.events import Offered
from dask_bridges.jobs.hosting import Hosting, host_devices
from dask_bridges.jobs.setup import Setup

__all__ = ["LABEL", "Offering", "Shared"]

logger = logging.getLogger(__name__)

LABEL = "DevicePool"


@dataclass
class Shared:
    """What the offerings of a pool have in common.

    Attributes
    ----------
    client : Client
    pool : str
    events : EventStream
    timeout : float or None
        Longest wait for workers.
    setup : Setup
    recorder : Listener or None
        Hears the events of all, for a report.
    seen : set of str
        The workers that have been looked at.
    """

    client: Client
    pool: str
    events: EventStream
    timeout: float | None
    setup: Setup
    recorder: Listener | None = None
    seen: set[str] = field(default_factory=set)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def tell_change(self) -> None:
        """Devices have come or gone."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def change(self) -> None:
        """Wait for the next word of a change."""
        await self._changed.wait()


class Offering:
    """The devices of one group, offered by one of its workers to the jobs of a pool; anew where that is lost.

    Attributes
    ----------
    group : Group
    worker : str
        Who offers them now; empty for nobody.
    failed : BaseException or None
        Why nobody does.
    """

    def __init__(self, shared: Shared, group: Group) -> None:
        self.shared = shared
        self.group = group
        self.worker = ""
        self.failed: BaseException | None = None
        self._gang: Gang | None = None
        self._closing = False
        self._running = asyncio.ensure_future(self._run())

    @property
    def offered(self) -> bool:
        """Whether its devices are there."""
        return bool(self.worker)

    async def update(self, group: Group) -> None:
        """Its workers have changed, and maybe brought devices."""
        known = {device.key for device in self.group.devices}
        more = tuple(device for device in group.devices if device.key not in known)
        if self.offered and more:
            who = [self.worker]
            await self.shared.client.run(
                hosting.extend_here, self.shared.pool, more, frozenset(group.pids), workers=who
            )
        self.group = group
        self.shared.tell_change()

    async def _run(self) -> None:
        while not self._closing:
            group = self.group
            self._gang = Gang(self.shared.client, self._plan(group))
            self._gang.events.listen(self._notice)
            if self.shared.recorder is not None:
                self._gang.events.listen(self.shared.recorder)
            try:
                await self._gang.run()
            except (BridgeError, OSError) as error:
                self.failed = error
                logger.warning("[pool %s] the devices of %s are gone: %s", self.shared.pool, group.name, error)
            self.worker = ""
            self.shared.tell_change()
            while not self._closing and self.group is group:  # until a look finds its workers changed
                self.shared.seen.clear()
                await self.shared.change()

    def _plan(self, group: Group) -> GangPlan:
        payload = Hosting(
            self.shared.pool,
            tuple(group.devices),
            frozenset(group.pids),
            config.seconds("job-stop-timeout"),
            self.shared.setup.environment(self.shared.pool, None),
        )
        modules = self.shared.setup.modules
        return GangPlan(
            LABEL,
            host_devices,
            [payload],
            list(group.workers),
            exclusive=False,
            timeout=self.shared.timeout,
            names=[group.name],
            about=About(self.shared.pool, {"preload": modules}, modules),
        )

    def _notice(self, event: Event) -> None:
        if isinstance(event, Offered):
            self.worker, self.failed = event.worker, None
            self.shared.tell_change()
        elif not isinstance(event, Started | Finished | Memory | Planned | Ended):
            self.shared.events.publish(dataclasses.replace(event, gang=self.shared.pool, attempt=1))

    async def close(self) -> None:
        """End it, with its jobs."""
        self._closing = True
        if self._gang is not None and self.offered:
            with contextlib.suppress(OSError):  # without a scheduler it has ended
                await turns.ask(self.shared.client, "settle", gang=self._gang.id, reason="the pool was closed")
                await asyncio.wait({self._running}, timeout=self._gang.deadlines.child_stop_timeout)
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
