"""The worker's side of a member's child process: it starts, serves, watches and ends it."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import psutil
from distributed.core import clean_exception
from distributed.protocol.pickle import dumps

from dask_bridges.errors import MemberFailed, MemberLost, MemberStopped
from dask_bridges.member import Member
from dask_bridges.processes.child import BEAT, BEATS
from dask_bridges.watchdog import HOLD, time_used

__all__ = ["run_in_child"]

#: The child's first lines. It finds what its worker finds, whatever has changed `sys.path` there.
_START = """
import sys
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv[1]))
sys.path[:] = pipe.recv()
from dask_bridges.processes.child import main
main(pipe, int(sys.argv[2]))
"""


def run_in_child(member: Member, function: Callable[[Any, Any], Any], payload: Any) -> Any:
    """Run ``function(member, payload)`` in a child process of this worker.

    Called in a member's own function, with what that got; in the child, `member`
    is a `ChildMember` of the same gang and rank. The child is asked to stop when
    the member is, and killed where it does not; it dies with its worker.

    Parameters
    ----------
    member : Member
    function : callable
        Module-level.
    payload : object
        Anything that can be pickled.

    Returns
    -------
    object
        What the function returned.

    Raises
    ------
    MemberLost
        If the process ended without a result: it crashed, was killed or frozen, or called `os._exit`.
    MemberFailed
        If the function raised `SystemExit`.
    Exception
        Whatever else the function raised, with its traceback.
    """
    if sys.platform != "linux":
        raise NotImplementedError("members in child processes need Linux; run this member in its worker's process")
    child = _Child(member)
    try:
        return child.run(dumps(replace(member.spec, function=function, payload=payload)))
    finally:
        child.end()


class _Child:
    """One child process, from its start to its end."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self._limits = member.spec.deadlines
        self._sending = threading.Lock()
        self._heard = 0  # how often the child gave a sign of life
        self._deadline = float("inf")
        self._killed_because = ""
        self._killings = _killings_for_memory()
        self._pipe, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-c", _START, str(theirs.fileno()), str(os.getpid())]
            # In a session of its own: Ctrl-C in a terminal is for the client to see to.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
            )
        self._watch = threading.Thread(target=self._watch_over, name=f"child-{self._process.pid}", daemon=True)
        self._watch.start()

    # Serving

    def run(self, work: bytes) -> Any:
        """Send the work, serve the child until it has ended, and give its result."""
        last: tuple[Any, ...] = ()
        with contextlib.suppress(EOFError, OSError):  # it has ended, however
            self._pipe.send(sys.path)
            self._pipe.send_bytes(work)
            self.member.on_stop(self._stop)  # not before: the child reads its work first
            while not last:
                last = self._serve(self._pipe.recv())
            self._finish_by(time.monotonic() + self._limits.child_stop_timeout)
        self._watch.join()
        return self._outcome(last)

    def _serve(self, words: tuple[Any, ...]) -> tuple[Any, ...]:
        """Do what the child says; its last words are given back."""
        self._heard += 1
        match words:
            case ("alive",):
                pass
            case ("event", message):
                self.member.send(message)
            case ("ask", number, method, request):
                threading.Thread(target=self._answer, args=(number, method, request), daemon=True).start()
            case _:
                return words
        return ()

    def _answer(self, number: int, method: str, request: dict[str, Any]) -> None:
        try:
            answer = self.member.ask(method, **request)
        except OSError as gone:
            answer = {"ended": f"the scheduler is gone: {gone}"}
        self._say("answer", number, answer)

    def _say(self, *words: Any) -> None:
        with contextlib.suppress(OSError), self._sending:
            self._pipe.send(words)

    def _outcome(self, last: tuple[Any, ...]) -> Any:
        member = self.member
        where = (member.rank, member.spec.workers[member.rank], member.host)
        match last:
            case ("result", result):
                return pickle.loads(result)
            case ("raised", exception, traceback):
                _, error, trace = clean_exception(exception, traceback)
                raise (error or RuntimeError("an exception that was lost on its way")).with_traceback(trace)
            case ("stopped", reason):
                raise MemberStopped(reason)
            case ("exited", text):
                raise MemberFailed(f"{member.label}: member {member.rank} raised {text}", *where)
        if member.stopping and self._killed_because == member.stopping:
            raise MemberStopped(member.stopping)
        raise MemberLost(
            f"{member.label}: member {member.rank} was lost, with its process {self._process.pid} on "
            f"{where[1]}: {self._how_it_ended()}. The worker's log may say more.", *where
        )  # fmt: skip

    def _how_it_ended(self) -> str:
        code = self._process.returncode
        if self._killed_because:
            return self._killed_because
        if code >= 0:
            return f"it ended without a result, with exit code {code}, as after os._exit({code})"
        name = signal.Signals(-code).name
        if name != "SIGKILL":
            return f"it crashed ({name})"
        if _killings_for_memory() > self._killings:
            return "it was killed for memory, by the kernel (SIGKILL)"
        return "it was killed from outside (SIGKILL)"

    # Watching and ending

    def _watch_over(self) -> None:
        """Wait for the child's end; bring it about where it is frozen, or does not end when it should."""
        pause = min(BEAT, BEATS * self._limits.hang_timeout)
        silence = quiet = 0.0
        heard, used, looked = self._heard, 0.0, time.monotonic()
        while not self._ended(pause):
            now = time.monotonic()
            # A worker that was stopped itself has not looked on.
            passed, looked = min(now - looked, 2 * pause), now
            now_used = self._time_used()
            silence = silence + passed if heard == self._heard else 0.0
            quiet = quiet + passed if used == now_used else 0.0
            heard, used = self._heard, now_used
            if silence >= self._limits.hang_timeout and quiet >= HOLD * self._limits.hang_timeout:
                self._kill(f"it was frozen: no heartbeat for {silence:.0f} s and no processor time used")
            elif now >= self._deadline:
                self._kill(self.member.stopping or "it did not exit")
        with contextlib.suppress(ProcessLookupError, PermissionError):  # what it has started itself
            os.killpg(self._process.pid, signal.SIGKILL)

    def _ended(self, pause: float) -> bool:
        try:
            self._process.wait(pause)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _time_used(self) -> float:
        try:
            return time_used(self._process.pid)
        except (OSError, psutil.Error):  # it has just ended
            return -1.0

    def _stop(self) -> None:
        """Ask the child to stop."""
        self._finish_by(time.monotonic() + self._limits.child_stop_timeout)
        self._say("stop", self.member.stopping)

    def _finish_by(self, deadline: float) -> None:
        self._deadline = min(self._deadline, deadline)

    def _kill(self, reason: str) -> None:
        if not self._killed_because:
            self._killed_because = reason
            self._process.kill()

    def end(self) -> None:
        """See to it that the child is gone."""
        self._kill("its member has ended")
        self._watch.join()
        self._pipe.close()


def _killings_for_memory() -> int:
    """How many processes the kernel has killed for memory, in all control groups."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/vmstat").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("oom_kill ")).split()[1])
    return 0
