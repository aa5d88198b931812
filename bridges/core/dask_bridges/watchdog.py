"""Finds workers that do not live, though their connections are open, and ends them.

A process that is frozen and a host that has gone silent leave their sockets open:
nothing tells of them but a heartbeat that does not come. The watchdog looks closer
then: whether the host takes connections, and whether the worker uses processor
time, as its nanny sees it. It runs on the scheduler beside the arbiter and is sent
by value as well: standard library and distributed only.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distributed.comm import get_address_host_port
from distributed.protocol import Serialized, deserialize
from distributed.protocol.pickle import dumps
from distributed.scheduler import heartbeat_interval

__all__ = ["Watchdog", "last_words", "processor_time", "time_used"]

logger = logging.getLogger("dask_bridges.arbiter")

#: Share of a deadline after which a silent worker is looked at, and share for which a finding must hold.
LOOK, HOLD = 0.2, 0.8
#: Longest pause between two looks, and longest wait for an answer to one, in seconds.
PAUSE, ANSWER = 1.0, 2.0

Limits = dict[str, float]


# On nannies, by value


def processor_time(dask_worker: Any) -> float:
    """What a nanny's worker process has used."""
    return time_used(dask_worker.pid)


def time_used(pid: int) -> float:
    """Processor time that a process has used; any change of it is a sign of life.

    In nanoseconds where Linux tells: a process whose threads wait for one that
    holds the GIL uses microseconds.
    """
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    if used := sum(int(thread.read_text().split()[0]) for thread in threads):
        return used
    import psutil

    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


async def last_words(pid: int, dask_worker: Any) -> str:
    """What a nanny has logged on a worker process that is gone: the newest line."""
    tells_exits = logging.getLogger("distributed.nanny").isEnabledFor(logging.INFO)
    for _ in range(20 if tells_exits else 1):
        lines: list[str] = [line for _, line in dask_worker.get_logs() if re.search(rf"\b{pid}\b", line)]
        told = [line for line in lines if re.search("memory budget|killed by|exited with|died", line)]
        if told:
            return next((line for line in told if "memory budget" in line), told[0])
        await asyncio.sleep(0.05)
    return ""


# On the scheduler


class Watchdog:
    """Watches the workers that gangs hold.

    Parameters
    ----------
    scheduler : distributed.Scheduler
    watched : callable
        Gives the addresses to watch, each with the deadlines that hold there, in seconds.
    """

    def __init__(self, scheduler: Any, watched: Callable[[], dict[str, Limits]]) -> None:
        self.scheduler = scheduler
        self.watched = watched
        self.reasons: dict[str, str] = {}  # address -> why the worker was ended
        self._heard: dict[str, tuple[float, float]] = {}  # address -> last heartbeat, when first seen
        self._suspects: dict[str, asyncio.Task[None]] = {}
        self._round: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """Watch, until nothing is to be watched."""
        if self._round is None or self._round.done():
            self._round = asyncio.ensure_future(self._watch())

    def close(self) -> None:
        """Stop watching."""
        for task in (self._round, *self._suspects.values()):
            if task is not None:
                task.cancel()

    async def _watch(self) -> None:
        while watched := self.watched():
            for address, limits in watched.items():
                if address not in self._suspects and self._silence(address) > self._patience(limits):
                    self._suspects[address] = asyncio.ensure_future(self._examine(address, limits))
            await asyncio.sleep(min(map(_pause, watched.values())))
        self._heard.clear()

    def _silence(self, address: str) -> float:
        """Seconds since a heartbeat, as far as this process has looked on."""
        worker = self.scheduler.workers.get(address)
        if worker is None:
            return 0.0
        now = time.monotonic()
        heartbeat, since = self._heard.setdefault(address, (worker.last_seen, now))
        if heartbeat != worker.last_seen:
            self._heard[address] = worker.last_seen, now
            return 0.0
        return now - since

    def _patience(self, limits: Limits) -> float:
        """How long a heartbeat may be late without being looked at."""
        interval: float = heartbeat_interval(len(self.scheduler.workers))
        return max(LOOK * min(limits["host_timeout"], limits["hang_timeout"]), 2.5 * interval)

    async def _examine(self, address: str, limits: Limits) -> None:
        """Look at a silent worker until it speaks again, is gone, or is found dead."""
        try:
            worker = self.scheduler.workers.get(address)
            if worker is not None:
                reason, answers = await self._verdict(worker, limits)
                if reason:
                    await self.end(address, reason, nanny=answers)
        except Exception:
            logger.exception("watchdog: %s", address)
        finally:
            self._heard.pop(address, None)
            del self._suspects[address]

    async def _verdict(self, worker: Any, limits: Limits) -> tuple[str, bool]:
        """Why a worker is taken for dead, empty once it speaks again or is gone; and whether its host answers."""
        pause, heard, used = _pause(limits), worker.last_seen, None
        silence, away, quiet, answers = self._patience(limits), 0.0, 0.0, True
        while self.scheduler.workers.get(worker.address) is worker and worker.last_seen == heard:
            start = time.monotonic()
            wait = min(ANSWER, LOOK * limits["host_timeout"])
            answers, now_used = await asyncio.gather(_takes_connections(worker.address, wait), self._used(worker, wait))
            await asyncio.sleep(pause)
            # A scheduler that was busy itself has not looked on: heartbeats may lie unread.
            passed = min(time.monotonic() - start, 2 * pause + wait)
            silence += passed
            away = 0.0 if answers else away + passed
            quiet = quiet + passed if now_used is not None and now_used == used else 0.0
            used = now_used
            if silence >= limits["host_timeout"] and away >= HOLD * limits["host_timeout"]:
                return f"its host does not answer: no heartbeat and no connection to it for {silence:.0f} s", False
            if silence >= limits["hang_timeout"] and quiet >= HOLD * limits["hang_timeout"]:
                return (
                    f"it was frozen: no heartbeat for {silence:.0f} s and no processor time used, says its nanny",
                    True,
                )
            if used is None and silence >= limits["hang_timeout_without_nanny"]:
                return f"it was frozen: no heartbeat for {silence:.0f} s, and no nanny that knows more", answers
        return "", answers

    async def _used(self, worker: Any, wait: float) -> float | None:
        used: float | None = await self.ask_nanny(worker.nanny, wait, processor_time)
        return used

    async def ask_nanny(self, nanny: str | None, wait: float, function: Callable[..., Any], *args: Any) -> Any:
        """What `function` says on a nanny; None where there is none, or none that answers in time."""
        if not nanny:
            return None
        try:
            asked = self.scheduler.rpc(nanny).run(function=dumps(function), args=dumps(args))
            answer = await asyncio.wait_for(asked, wait)
        except (OSError, TimeoutError):
            return None
        if answer["status"] != "OK":
            return None
        result = answer["result"]  # a scheduler opens nothing that passes through it
        return deserialize(result.header, result.frames) if isinstance(result, Serialized) else result

    async def end(self, address: str, reason: str, nanny: bool = True) -> None:
        """Kill a worker's process, through its `nanny`, which brings it back; take it off the cluster in any case."""
        worker = self.scheduler.workers.get(address)
        if worker is None:
            return
        logger.warning("worker %s is ended: %s", address, reason)
        self.reasons[address] = reason
        if worker.nanny and nanny:
            try:
                await asyncio.wait_for(self.scheduler.rpc(worker.nanny).kill(timeout=1, reason=reason), 5)
            except (OSError, TimeoutError):
                logger.info("the nanny of %s does not answer", address)
        if self.scheduler.workers.get(address) is worker:
            await self.scheduler.remove_worker(address, stimulus_id=f"dask-bridges-watchdog-{time.time()}")


def _pause(limits: Limits) -> float:
    return min(PAUSE, min(limits["host_timeout"], limits["hang_timeout"]) / 10)


async def _takes_connections(address: str, wait: float) -> bool:
    """Whether a worker's host does: the kernel answers for processes that are frozen, too."""
    if not address.startswith(("tcp", "tls", "ws")):
        return True
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(*get_address_host_port(address)), wait)
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
