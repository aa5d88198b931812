"""XGBoost's collective between the members of a gang, with its tracker in rank 0's worker."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from xgboost import collective, core
from xgboost.core import XGBoostError
from xgboost.tracker import RabitTracker

from dask_bridges.errors import PlacementError
from dask_bridges.member import Member
from dask_bridges.ports import port_range
from dask_xgboost.sockets import CollectiveSockets, send_at_once, shut_down_port

__all__ = ["apart", "capture_log", "communicator", "is_collective_error"]


def is_collective_error(error: BaseException) -> bool:
    """Whether XGBoost raised because a peer was gone, so that the cause is elsewhere."""
    return isinstance(error, XGBoostError) and ("collective/" in str(error) or "all reduce" in str(error).lower())


@contextlib.contextmanager
def capture_log(member: Member) -> Iterator[None]:
    """Send what XGBoost prints from this thread to the member's log.

    XGBoost keeps its log callback by thread, and its Python package sets one in
    the main thread only; from others it writes to the worker's standard error.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p)  # type: ignore[untyped-decorator]
    def forward(message: bytes) -> None:
        text = message.decode(errors="replace").strip()
        member.log(text, logging.WARNING if "WARNING:" in text else logging.DEBUG)

    core._check_call(core._LIB.XGBRegisterLogCallback(forward))
    try:
        yield
    finally:
        core._check_call(core._LIB.XGBRegisterLogCallback(_DROP))


def apart(member: Member, function: Callable[[], Any]) -> Any:
    """Call a function where XGBoost has no communicator, which it keeps by thread: for what a rank does alone."""

    def captured() -> Any:
        with capture_log(member):
            return function()

    with ThreadPoolExecutor(1, "dask-bridges-xgboost") as pool:
        return pool.submit(captured).result()


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)  # type: ignore[untyped-decorator]
def _DROP(message: bytes) -> None:
    """Keeps nothing: the thread ends with its member."""


#: Seconds in which a tracker that is to end does.
TRACKER_TIMEOUT = 5

#: Seconds in which the thread of a tracker begins.
_BEGINNING = 0.002


class _Tracker:
    """A `RabitTracker` that is freed once, by whichever thread comes first."""

    def __init__(self, world: int, host: str, ports: range) -> None:
        self._lock = threading.Lock()
        self._tracker = self._started(world, host, ports)
        # It looks whether the thread has begun, and if not sleeps for 0.1 s.
        time.sleep(_BEGINNING)
        self.args: dict[str, Any] = self._tracker.worker_args()
        send_at_once(int(self.args["dmlc_tracker_port"]))

    @staticmethod
    def _started(world: int, host: str, ports: range) -> RabitTracker:
        reasons = []
        for port in ports:
            try:
                tracker = RabitTracker(n_workers=world, host_ip=host, port=port, sortby="task")
                tracker.start()
                return tracker
            except (XGBoostError, socket.gaierror) as error:
                innermost = str(error).partition("\nStack trace")[0].strip().splitlines()[-1]
                reasons.append(innermost.rpartition("]: ")[2])
        where = f"port {ports[0]}" if len(ports) == 1 else f"ports {ports[0]} to {ports[-1]}"
        raise PlacementError(
            f"XGBoost's tracker could not listen on {host}, {where if ports[0] else 'any port'}: {reasons[-1]}. "
            "Set tracker_host and tracker_port (or dask-bridges.xgboost.tracker-host and -port) to what is free "
            "on the worker of rank 0."
        )

    def free(self) -> None:
        """Release tracker and port; members that still wait for it fail at once.

        `RabitTracker.free` closes the port under the tracker's own thread, which may
        then wait for ever at whatever has got its file descriptor next. So it is
        ended first, by the error that it reads from a port that is shut down.
        """
        with self._lock:
            tracker, self._tracker = self._tracker, None
        if tracker is not None:
            shut_down_port(self.args["dmlc_tracker_port"])
            with contextlib.suppress(XGBoostError):  # raised for a group that has not parted in good order
                tracker.wait_for(TRACKER_TIMEOUT)
            with contextlib.suppress(XGBoostError):
                tracker.free()


@contextlib.contextmanager
def communicator(member: Member, host: str | None, port: int | str | tuple[int, int]) -> Iterator[None]:
    """Join the gang's collective; training inside it is distributed. A gang of one needs none.

    Parameters
    ----------
    member : Member
    host : str or None
        Where the tracker listens; None for the address of rank 0's worker.
    port : int, str or tuple
        See `dask_bridges.ports.port_range`.
    """
    if member.world_size == 1:
        yield
        return
    tracker, sockets = None, CollectiveSockets(member.spec.workers)
    if member.rank == 0:
        tracker = _Tracker(member.world_size, host or member.host, port_range(port, "tracker_port"))
        member.on_stop(tracker.free)
    try:
        with member.span("communicate"):
            there = _join(member, sockets, member.exchange(tracker.args if tracker else None)[0])
        try:
            yield
        except BaseException as error:
            member.fail(error)  # before the peers hear of it
            # Not to hide the failure that brought us here.
            with contextlib.suppress(XGBoostError), sockets.goodbye(there, lambda: member.stopping):
                collective.finalize()
            raise
        sockets.part_in_good_order()
        with sockets.goodbye(there, lambda: member.stopping):
            collective.finalize()
        member.exchange()  # the tracker serves until the last rank has said goodbye
    finally:
        sockets.close()
        if tracker is not None:
            tracker.free()


def _join(member: Member, sockets: CollectiveSockets, args: dict[str, Any]) -> tuple[str, int]:
    """Join the group that gathers at the tracker, and say where; who is asked to stop is blocked in it no longer."""
    there = (str(args["dmlc_tracker_uri"]), int(args["dmlc_tracker_port"]))
    member.on_stop(functools.partial(sockets.break_connections_to, there))
    with sockets.opening(), sockets.sending_at_once(there):
        # Ranks follow the sorted task ids, so that XGBoost's rank is the gang's.
        # One retry: the tracker listens already, and when it is gone, goodbyes to it should not take long.
        collective.init(**args, dmlc_task_id=f"{member.rank:06d}", dmlc_retry=1)
    sockets.keep_ring(member.exchange(sockets.pairs()))
    member.on_stop(sockets.break_ring)
    return there
