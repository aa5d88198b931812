"""The fork server: a process that has imported a framework, never used it, and forks the children of one worker.

It has one thread, and hears its worker over a socket that it inherits, one
message a packet: ``("fork", number)`` with the child's descriptors, ``("kill",
pid)`` and ``("retire",)``. It answers ``("ready",)`` or ``("unfit", text)``,
``("forked", number, pid)`` or ``("unforked", number, text)``, and for each child ``("ended", pid, exit code)``.
When its worker is gone, so is it, and every child with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import select
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

__all__ = ["child_pipe", "die_with", "hear", "pass_descriptors", "serve", "tell"]

#: Longest packet, in bytes, and most descriptors in one.
PACKET, DESCRIPTORS = 64 * 1024, 16


def tell(control: socket.socket, *words: Any, fds: tuple[int, ...] = ()) -> None:
    """Send one message, and descriptors with it."""
    socket.send_fds(control, [pickle.dumps(words)], fds)


def hear(control: socket.socket) -> tuple[tuple[Any, ...], list[int]]:
    """One message and its descriptors; an empty one at the end of all.

    Both ends are processes of ours, joined by an unnamed socket.
    """
    try:
        packet, fds, _, _ = socket.recv_fds(control, PACKET, DESCRIPTORS)
    except ConnectionResetError:
        return (), []
    return (pickle.loads(packet) if packet else ()), list(fds)


if sys.platform == "linux":
    _prctl = ctypes.CDLL(None).prctl  # looked up once, and not by each child


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; Linux only."""
    if sys.platform == "linux":
        _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def _adopt_orphans() -> None:
    """Have the kernel give this process the children of its children that lose their parent; Linux only."""
    if sys.platform == "linux":
        _prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


class _Server:
    """The children of one fork server."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.children: set[int] = set()
        self.retired = False
        self.wakeup, wake = socket.socketpair()
        wake.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self._wake = wake

    def serve(self) -> list[int]:
        """Serve until the worker is gone or wants no more; in a child that was forked, its descriptors at once."""
        look = select.poll()
        for heard in (self.control, self.wakeup):
            look.register(heard.fileno(), select.POLLIN)
        while not (self.retired and not self.children):
            ready = {fd for fd, _ in look.poll()}
            if self.wakeup.fileno() in ready:
                self.wakeup.recv(4096)
                self.reap()
            if self.control.fileno() in ready:
                words, fds = hear(self.control)
                match words:
                    case ("fork", number):
                        if self.fork(number, fds):
                            return fds
                    case ("kill", pid):
                        self.kill(pid)
                    case ("retire",):
                        self.retired = True
                    case _:
                        break
        for pid in list(self.children):
            self.kill(pid)
        os._exit(0)

    def fork(self, number: int, fds: list[int]) -> bool:
        """Fork; whether this is the child."""
        server = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            self.tell("unforked", number, str(error))
            pid = -1
        if pid == 0:
            os.setsid()  # Ctrl-C in a terminal is for the client to see to
            die_with(server)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for inherited in (self.control, self.wakeup, self._wake):
                inherited.close()
            return True
        for fd in fds:
            os.close(fd)
        if pid > 0:
            self.children.add(pid)
            self.tell("forked", number, pid)
        return False

    def kill(self, pid: int) -> None:
        """Kill a child and what it has started itself; a child that has been reaped is nobody any more."""
        if pid in self.children:
            os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it was just forked
                os.killpg(pid, signal.SIGKILL)

    def reap(self) -> None:
        """Tell of each child that has ended. Its number is its own until it is reaped."""
        ended = []
        with contextlib.suppress(ChildProcessError):  # there are none any more
            while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if found.si_pid in self.children:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(found.si_pid, signal.SIGKILL)
                _, status = os.waitpid(found.si_pid, 0)
                if found.si_pid in self.children:
                    self.children.discard(found.si_pid)
                    ended.append((found.si_pid, os.waitstatus_to_exitcode(status)))
            self.kill_orphans()
        for pid, code in ended:
            self.tell("ended", pid, code)

    def kill_orphans(self) -> None:
        """Kill what children that have ended had started in sessions of its own; it has come to this process."""
        me = os.getpid()
        with contextlib.suppress(OSError):
            for pid in map(int, Path(f"/proc/{me}/task/{me}/children").read_text().split()):
                with contextlib.suppress(ProcessLookupError):
                    if pid not in self.children and os.getsid(pid) not in self.children:
                        os.kill(pid, signal.SIGKILL)

    def tell(self, *words: Any) -> None:
        with contextlib.suppress(OSError):  # the worker is gone, which the next look at the socket says
            tell(self.control, *words)


@contextlib.contextmanager
def _unheard() -> Iterator[IO[bytes]]:
    """Keep what is written to standard error, also by C++, in a file that goes: frameworks greet at length."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            with open(f"/proc/self/fd/{file.fileno()}", "rb") as reader:
                yield reader
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def serve(control: socket.socket, worker: int) -> list[int]:
    """Import what the worker asks for and serve it; returns in children only, with their descriptors."""
    die_with(worker)
    _adopt_orphans()
    (_, modules), _ = hear(control)
    with _unheard() as said:
        try:
            for module in modules:
                importlib.import_module(module)
        except BaseException as error:
            lines = said.read().decode(errors="replace").splitlines()
            tell(control, "unfit", "\n".join([f"{type(error).__name__}: {error}", *lines[-20:]]))
            raise
    gc.collect()
    gc.freeze()  # or each child would copy what its collector touches
    server = _Server(control)
    tell(control, "ready")
    return server.serve()


def child_pipe(fds: list[int]) -> Connection:
    """Make the process at hand the child that its descriptors are for: its output, its input, and its pipe.

    Returns when it is given work.
    """
    pipe, out, err = fds
    for target, fd in enumerate((os.open(os.devnull, os.O_RDONLY), out, err)):
        os.dup2(fd, target)
        os.close(fd)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as long as the process
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # what it prints is read as it comes
    connection = Connection(pipe)
    sys.path[:], environment, folder, numbers = connection.recv()
    for name in [name for name in os.environ if name not in environment]:
        del os.environ[name]
    os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})
    with contextlib.suppress(OSError):  # the worker's folder may be gone
        os.chdir(folder)
    for fd, number in zip(_descriptors(connection, len(numbers)), numbers):
        os.dup2(fd, number, inheritable=True)
        os.close(fd)
    if "numpy.random" in sys.modules:  # Python's own generator sees to itself, and one imported later, too
        sys.modules["numpy.random"].seed()
    return connection


def pass_descriptors(pipe: Connection, fds: tuple[int, ...]) -> None:
    """Send descriptors over a pipe to a child, which takes them with its setting."""
    if fds:
        with socket.socket(fileno=os.dup(pipe.fileno())) as carrier:
            socket.send_fds(carrier, [b"."], fds)


def _descriptors(pipe: Connection, count: int) -> list[int]:
    if not count:
        return []
    with socket.socket(fileno=os.dup(pipe.fileno())) as carrier:
        return list(socket.recv_fds(carrier, 1, count)[1])
