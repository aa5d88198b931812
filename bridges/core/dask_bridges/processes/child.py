"""The child process of a member: one function, run once, over a pipe that it inherits.

What it says to its host, the member in the worker: ``("event", message)``,
``("ask", number, method, request)``, ``("keep", step, state)``, ``("alive",)``, and last ``("result",
pickle)``, ``("raised", pickled exception, pickled traceback)``, ``("exited",
text)`` or ``("stopped", reason)``; before these, while it cleans up, ``("fails", …)`` with
the same words. What it is told: ``("stop", reason)``, ``("finish",)``,
``("answer", number, answer)``, and ``("call", number, pickle)``, to which it says
``("answer", number, …)`` with words like its last.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import itertools
import os
import pickle
import queue
import select
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from distributed.core import error_message
from distributed.protocol.pickle import dumps

from dask_bridges.errors import MemberStopped
from dask_bridges.member import Member, MemberSpec

__all__ = ["ChildMember", "main"]

#: Longest pause between two signs of life, in seconds, and share of the hang timeout.
BEAT, BEATS = 1.0, 0.1


class ChildMember(Member):
    """A member in a child process of its worker."""

    def __init__(self, spec: MemberSpec, pipe: Connection) -> None:
        super().__init__(spec)
        self._pipe = pipe
        self._sending = threading.Lock()
        self._numbers = itertools.count()
        self._answers: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}

    def say(self, *words: Any) -> None:
        """Say something to the host."""
        # The pipe's own `send` makes a pickler that touches many pages, each of which is copied for this process.
        packet = pickle.dumps(words)
        with self._sending:
            self._pipe.send_bytes(packet)

    def send(self, message: dict[str, Any]) -> None:
        """Send an event, as plain data."""
        self.say("event", message)

    def ask(self, method: str, **request: Any) -> dict[str, Any]:
        """Ask the arbiter on the scheduler, by way of the worker, with this member's token."""
        number, answer = next(self._numbers), queue.SimpleQueue[dict[str, Any]]()
        self._answers[number] = answer
        self.say("ask", number, method, request)
        return answer.get()

    def keep(self, step: int, state: Any) -> None:
        """Keep a state in the worker's memory, whole or not at all, in place of the one before."""
        self.say("keep", step, state)

    def fail(self, error: BaseException) -> None:
        """Have the host tell of a failure at once."""
        self.say("fails", *_raised(error))

    def leave(self) -> None:
        """End this process at once, as a member that was asked to stop; other threads and what they hold are left."""
        self.say("stopped", self.stopping or "")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def live(self) -> None:
        """Listen to the host and give signs of life, on a thread of its own."""
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        pause = min(BEAT, BEATS * self.spec.deadlines.hang_timeout)
        heard = select.poll()
        heard.register(self._pipe.fileno(), select.POLLIN)
        beat = time.monotonic() + pause
        try:
            while True:
                if heard.poll(1e3 * max(0.0, beat - time.monotonic())):
                    self._heed(self._pipe.recv())
                else:
                    self.say("alive")
                    beat = time.monotonic() + pause
        except (EOFError, OSError):  # the worker is gone
            os.killpg(0, signal.SIGKILL)

    def _heed(self, words: tuple[Any, ...]) -> None:
        """Do what the host says."""
        match words:
            case ("stop", reason):
                self.stop(reason)
            case ("finish",):
                self.finish()
            case ("answer", number, answer):
                self._answers.pop(number).put(answer)
            case ("call", number, call):
                threading.Thread(target=self._call, args=(number, call), daemon=True).start()

    def _call(self, number: int, call: bytes) -> None:
        """Do what the host asks for meanwhile."""
        try:
            function, args, kwargs = pickle.loads(call)
            words = ("result", dumps(function(*args, **kwargs)))
        except BaseException as error:
            words = _raised(error)
        self.say("answer", number, *words)


def main(pipe: Connection) -> None:
    """Run what the pipe brings."""
    faulthandler.enable()
    try:
        spec: MemberSpec = pickle.loads(pipe.recv_bytes())
        member = ChildMember(spec, pipe)
    except BaseException as error:
        pipe.send(_raised(error))
        _leave()
    member.live()
    try:
        words = ("result", dumps(spec.function(member, spec.payload)))
    except BaseException as error:
        words = _raised(error)
    member.say(*words)
    _leave()


def _leave() -> NoReturn:
    """End as the children of `multiprocessing` do: what was registered for the end runs, the interpreter is left."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, OSError):
            stream.flush()
    os._exit(0)


def _raised(error: BaseException) -> tuple[Any, ...]:
    """An exception as it travels: whole where it can be pickled, its text where not."""
    if isinstance(error, SystemExit | KeyboardInterrupt | GeneratorExit):
        return "exited", f"{type(error).__name__}({error})"
    if isinstance(error, MemberStopped):
        return "stopped", str(error)
    message = error_message(error)
    traceback = message["traceback"]
    return "raised", message["exception"].data, traceback and traceback.data
