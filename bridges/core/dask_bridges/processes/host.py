"""The worker's side of a member's child process: it starts, serves, watches and ends it."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from distributed.core import clean_exception
from distributed.protocol.pickle import dumps

from dask_bridges.errors import MemberFailed, MemberLost, MemberStopped
from dask_bridges.events import Log
from dask_bridges.processes.child import BEAT, BEATS
from dask_bridges.processes.forked import Forked
from dask_bridges.processes.forkserver import Environment, Process
from dask_bridges.task import WorkerMember
from dask_bridges.watchdog import HOLD, time_used

__all__ = ["Child", "run_in_child"]

#: Seconds that a fork server may take to see to a killing; then it is killed itself.
KILLING = 5.0


def run_in_child(
    member: WorkerMember,
    function: Callable[[Any, Any], Any],
    payload: Any,
    environment: Environment = Environment(),  # noqa: B008 - frozen
) -> Any:
    """Run ``function(member, payload)`` in a child process of this worker.

    Called in a member's own function, with what that got; in the child, `member`
    is a `ChildMember` of the same gang and rank. The child is asked to stop when
    the member is, and killed where it does not; it dies with its worker. What it
    writes to its standard output and error goes to the worker's log and to the
    gang's events.

    Parameters
    ----------
    member : WorkerMember
    function : callable
        Module-level.
    payload : object
        Anything that can be pickled.
    environment : Environment
        What the child finds imported.

    Returns
    -------
    object
        What the function returned.

    Raises
    ------
    NotImplementedError
        On other systems than Linux.
    PlacementError
        If the modules of the environment cannot be imported.
    MemberLost
        If the process ended without a result: it crashed, was killed or frozen, or called `os._exit`.
    MemberFailed
        If the function raised `SystemExit`.
    Exception
        Whatever else the function raised, with its traceback.
    """
    with Child(member, environment) as child:
        return child.run(function, payload)


class Child:
    """One child process, from its start to its end; a context manager that sees to the end.

    Parameters
    ----------
    member : WorkerMember
    environment : Environment
    descriptors : mapping of int to int
        Descriptors of this process that the child gets, by their numbers there.
    variables : mapping of str to str
        Environment variables that are set in the child, after its modules were imported.
    forked : Forked
        The process, where one of this environment waits already.

    Attributes
    ----------
    pid : int
    """

    def __init__(
        self,
        member: WorkerMember,
        environment: Environment = Environment(),  # noqa: B008 - frozen
        descriptors: Mapping[int, int] | None = None,
        *,
        variables: Mapping[str, str] | None = None,
        forked: Forked | None = None,
    ) -> None:
        if sys.platform != "linux":
            raise NotImplementedError(
                f"{member.label} needs child processes, which run on Linux only: start the Dask workers there "
                "(on Windows in WSL, on macOS in a container)"
            )
        self.member = member
        self._limits = member.spec.deadlines
        self._sending = threading.Lock()
        self._heard = 0  # how often the child gave a sign of life
        self._deadline = float("inf")
        self._killed_because, self._killed_at = "", float("inf")
        # At the last two looks: the last one may have been after the child was killed, and before that was known.
        self._killings = [_killings_for_memory()] * 2
        self._working = threading.Event()  # the child has its work, or never will
        self._numbers = itertools.count()
        self._calls: dict[int, futures.Future[tuple[Any, ...]]] = {}
        self._descriptors, self._variables = dict(descriptors or {}), dict(variables or {})
        self._forked = forked or Forked(member.worker, environment)
        self._forked.output.deliver = self._pass_on
        self._pipe = self._forked.pipe
        try:
            self._process = _unless_stopped(member, self._forked)
        except BaseException:
            self._forked.discard()
            raise
        self.pid = self._process.pid
        member.processes.add(self.pid)
        self._watch = threading.Thread(target=self._watch_over, name=f"child-{self.pid}", daemon=True)
        self._watch.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.end()

    # Serving

    def run(self, function: Callable[[Any, Any], Any], payload: Any) -> Any:
        """Have the child run ``function(member, payload)``, serve it until it has ended, and give the result."""
        self.begin(function, payload)
        return self.finish()

    def begin(self, function: Callable[[Any, Any], Any], payload: Any) -> None:
        """The first half of `run`: give the child its work."""
        work = dumps(replace(self.member.spec, function=function, payload=payload))
        with contextlib.suppress(EOFError, OSError):  # it has ended, however
            self._forked.begin(work, self._descriptors, self._variables)
            self._working.set()
            # Not before: the child reads its work first.
            self.member.on_stop(self._stop)
            self.member.on_finish(lambda: self._say("finish"))

    def finish(self) -> Any:
        """The second half of `run`."""
        last: tuple[Any, ...] = ()
        with contextlib.suppress(EOFError, OSError):
            while not last:
                last = self._serve(self._pipe.recv())
            self._finish_by(time.monotonic() + self._limits.child_stop_timeout)
        self._watch.join()
        self._forked.output.end()
        self._end_calls()
        return self._outcome(last)

    def on_end(self, callback: Callable[[], Any]) -> None:
        """Call `callback` as soon as the process is gone; it must not block."""
        self._process.ended.add_done_callback(lambda _: callback())

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Have the running child call `function` on a thread of its own; from any thread."""
        return self.call_pickled(dumps((function, args, kwargs)))

    def call_pickled(self, call: bytes) -> Any:
        """`call` of a function, arguments and keyword arguments that only the child opens.

        Raises
        ------
        MemberLost
            If the child ends before it has answered.
        Exception
            What the function raised.
        """
        number, answer = next(self._numbers), futures.Future[tuple[Any, ...]]()
        self._working.wait()
        self._calls[number] = answer
        self._say("call", number, call)
        if self._process.ended.done():
            self._end_calls()
        return self._outcome(answer.result())

    def _end_calls(self) -> None:
        """Nobody answers any more."""
        self._working.set()
        while self._calls:
            _, answer = self._calls.popitem()
            answer.set_result(())

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
            case ("keep", step, state):
                self.member.keep(step, state)
            case ("fails", *error):
                self._fail(tuple(error))
            case ("answer", number, *answer):
                self._calls.pop(number).set_result(tuple(answer))
            case _:
                return words
        return ()

    def _answer(self, number: int, method: str, request: dict[str, Any]) -> None:
        try:
            answer = self.member.ask(method, **request)
        except OSError as gone:
            answer = {"ended": f"the scheduler is gone: {gone}"}
        self._say("answer", number, answer)

    def _fail(self, words: tuple[Any, ...]) -> None:
        try:
            self._outcome(words)
        except Exception as error:
            self.member.fail(error)

    def _say(self, *words: Any) -> None:
        with contextlib.suppress(OSError), self._sending:
            self._pipe.send(words)

    def _pass_on(self, stream: str, text: str) -> None:
        self.member.emit(Log, text=text, stream=stream)

    # What came of it

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
                raise MemberFailed(f"{member.label}: {member.name} raised {text}", *where)
        if member.stopping and self._killed_because == member.stopping:
            raise MemberStopped(member.stopping)
        said = self._forked.output.last_lines
        raise MemberLost(
            f"{member.label}: {member.name} was lost, with its process {self.pid} on {where[1]}: "
            f"{self._how_it_ended()}." + (f" It said last:\n{said}" if said else ""), *where
        )  # fmt: skip

    def _how_it_ended(self) -> str:
        if self._killed_because:
            return self._killed_because
        code = self._process.ended.result()
        if code is None:
            return "the fork server of its worker was killed, and it with it"
        if code >= 0:
            return f"it ended without a result, with exit code {code}, as after os._exit({code})"
        name = signal.Signals(-code).name
        if name != "SIGKILL":
            return f"it crashed ({name})"
        if _killings_for_memory() > self._killings[0]:
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
            self._killings = [self._killings[1], _killings_for_memory()]
            if silence >= self._limits.hang_timeout and quiet >= HOLD * self._limits.hang_timeout:
                self.kill(f"it was frozen: no heartbeat for {silence:.0f} s and no processor time used")
            elif now >= self._deadline:
                self.kill(self.member.stopping or "it did not exit")
            if now >= self._killed_at + KILLING:
                self._process.server.end()

    def _ended(self, pause: float) -> bool:
        return bool(futures.wait([self._process.ended], pause).done)

    def _time_used(self) -> float:
        try:
            return time_used(self.pid)
        except (OSError, psutil.Error):  # it has just ended
            return -1.0

    def _stop(self) -> None:
        """Ask the child to stop."""
        self._finish_by(time.monotonic() + self._limits.child_stop_timeout)
        self._say("stop", self.member.stopping)

    def _finish_by(self, deadline: float) -> None:
        self._deadline = min(self._deadline, deadline)

    def kill(self, reason: str) -> None:
        """End it at once; `reason` is what is said of its loss."""
        if not self._killed_because and not self._process.ended.done():  # or calls would be told a wrong reason
            self._killed_because, self._killed_at = reason, time.monotonic()
            self._process.kill()

    def end(self) -> None:
        """See to it that the child is gone."""
        self.kill("its member has ended")
        self._watch.join()
        self.member.processes.discard(self.pid)
        self._forked.output.end()
        self._end_calls()
        self._pipe.close()


def _unless_stopped(member: WorkerMember, forked: Forked) -> Process:
    """Wait for a child, as long as its member goes on."""
    asked, stopped = forked.process, futures.Future[Any]()
    member.on_stop(lambda: stopped.set_result(None))
    futures.wait([asked, stopped], return_when=futures.FIRST_COMPLETED)
    if not asked.done():
        raise MemberStopped(member.stopping or "")
    try:
        return asked.result()
    except OSError as error:  # no more processes, or the fork server has just ended
        worker = member.spec.workers[member.rank]
        raise MemberLost(
            f"{member.label}: {member.name} was lost before it had a process on {worker}: {error}",
            member.rank, worker, member.host,
        ) from error  # fmt: skip


def _killings_for_memory() -> int:
    """How many processes the kernel has killed for memory, in all control groups."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/vmstat").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("oom_kill ")).split()[1])
    return 0
