"""A Dask worker's fork servers: started on first use, one for each framework and environment, replaced when stale.

A child forked from one has the framework imported after some 10 ms. What it
imports itself it finds as its worker does now; what its server has imported is as
it was when that started, so a server is replaced after an upload, an
installation, or a change of the worker's plugins or environment variables.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from distributed import Worker

from dask_bridges.errors import PlacementError
from dask_bridges.processes.server import hear, tell

__all__ = ["Environment", "ForkServer", "Process", "end_servers", "fork_server", "servers"]

#: The server's first lines. It finds what its worker finds, whatever has changed `sys.path` there.
_START = """
import pickle, socket, sys
control = socket.socket(fileno=int(sys.argv[1]))
sys.path[:] = pickle.loads(control.recv(1 << 16))
from dask_bridges.processes import server
fds = server.serve(control, int(sys.argv[2]))
from dask_bridges.processes.child import main
main(server.child_pipe(fds))
"""

#: Suffixes of what `upload_file` makes importable.
_MODULES = (".py", ".zip", ".egg", ".pyz")

_NAME = "dask-bridges-fork-servers"


@dataclass(frozen=True)
class Environment:
    """What children find imported and set.

    Attributes
    ----------
    modules : tuple of str
        Imported by the server before it forks: they may not start threads, nor touch a device, as they are imported.
    variables : tuple of (str, str or None)
        Environment variables beside the worker's own, which lose; set, or with None removed, before the
        modules are imported.
    """

    modules: tuple[str, ...] = ()
    variables: tuple[tuple[str, str | None], ...] = ()


class Process:
    """A child, as its worker sees it.

    Attributes
    ----------
    pid : int
    ended : Future
        Its exit code, as `subprocess` counts; None where its server was lost with it.
    """

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.server = server
        self.pid = pid
        self.ended: Future[int | None] = Future()

    def kill(self) -> None:
        """End it and what it has started, if it has not ended."""
        self.server.kill(self.pid)


class ForkServer:
    """One fork server, from its start to its end.

    Parameters
    ----------
    environment : Environment
    variables : mapping
        The worker's environment variables.
    """

    def __init__(self, environment: Environment, variables: dict[str, str]) -> None:
        self.environment = environment
        merged = {**variables, **dict(environment.variables)}
        self.variables = {name: value for name, value in merged.items() if value is not None}
        self._control, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        self._numbers = count()
        self._ready: Future[None] = Future()
        self._ended = False
        self._asked: dict[int, Future[Process]] = {}
        self._children: dict[int, Process] = {}
        self._process: subprocess.Popen[bytes] | None = None
        # The kernel ends the server with the thread that has started it.
        self._thread = threading.Thread(target=self._run, name=_NAME, daemon=True)
        self._thread.start()

    @property
    def usable(self) -> bool:
        """Whether it can fork, now or once it is ready."""
        return not self._ended and (not self._ready.done() or self._ready.exception() is None)

    @property
    def pid(self) -> int:
        """Its process; 0 until it is started."""
        return 0 if self._process is None else self._process.pid

    def fork(self, fds: Sequence[int]) -> Future[Process]:
        """Fork a child that gets duplicates of these descriptors.

        Returns
        -------
        Future of Process
            `PlacementError` if the modules cannot be imported; `OSError` if there can be no more processes.
        """
        number, asked = next(self._numbers), Future[Process]()
        copies = tuple(map(os.dup, fds))  # the caller's may be closed before the server is ready

        def ask(ready: Future[None]) -> None:
            try:
                ready.result()
                with self._lock:
                    self._asked[number] = asked
                tell(self._control, "fork", number, fds=copies)
            except Exception as error:
                self._asked.pop(number, None)
                if not asked.done():
                    asked.set_exception(error)
            finally:
                for fd in copies:
                    os.close(fd)

        self._ready.add_done_callback(ask)
        return asked

    def kill(self, pid: int) -> None:
        """Kill a child; nothing if it has ended."""
        with contextlib.suppress(OSError):
            tell(self._control, "kill", pid)

    def retire(self) -> None:
        """Fork no more, and end with the last child."""
        with contextlib.suppress(OSError):
            tell(self._control, "retire")

    def join(self) -> None:
        """Wait until it has ended."""
        self._thread.join()

    def end(self) -> None:
        """End at once, with all children."""
        if self._process is not None:
            self._process.kill()

    # On the thread of its own

    def _run(self) -> None:
        command = [sys.executable, "-c", _START, str(self._theirs.fileno()), str(os.getpid())]
        try:
            with self._theirs:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    pass_fds=[self._theirs.fileno()],
                    env=self.variables,
                    start_new_session=True,
                )
            self._control.send(pickle.dumps(sys.path))
            tell(self._control, "import", self.environment.modules)
            while self._heed(*hear(self._control)):
                pass
            self._process.wait()
            self._over(f"the fork server {self._process.pid} has ended ({self._process.returncode})")
        except Exception as error:
            self._over(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._control.close()

    def _heed(self, words: tuple[Any, ...], fds: list[int]) -> bool:
        """Do what the server says; whether it goes on."""
        match words:
            case ("ready",):
                self._ready.set_result(None)
            case ("unfit", text):
                modules = ", ".join(self.environment.modules)
                self._ready.set_exception(PlacementError(f"{modules} cannot be imported in a child process: {text}"))
            case ("forked", number, pid):
                with self._lock:
                    process = self._children[pid] = Process(self, pid)
                    asked = self._asked.pop(number)
                asked.set_result(process)
            case ("unforked", number, text):
                with self._lock:
                    asked = self._asked.pop(number)
                asked.set_exception(OSError(f"a child process cannot be started: {text}"))
            case ("ended", pid, code):
                with self._lock:
                    process = self._children.pop(pid)
                process.ended.set_result(code)
        return bool(words)

    def _over(self, text: str) -> None:
        with self._lock:
            self._ended = True
            asked, self._asked = self._asked, {}
            children, self._children = self._children, {}
        if not self._ready.done():
            self._ready.set_exception(OSError(text))
        for future in asked.values():
            future.set_exception(OSError(text))
        for process in children.values():
            process.ended.set_result(None)


class _Servers:
    """The fork servers of one Dask worker; a worker plugin, to end with it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.current: dict[Environment, tuple[ForkServer, Any]] = {}

    def teardown(self, worker: Worker) -> None:
        for server, _ in self.current.values():
            server.end()


_making = threading.Lock()


def fork_server(worker: Worker, environment: Environment) -> ForkServer:
    """The worker's fork server for an environment; started, where there is none or it is stale."""
    with _making:
        servers: _Servers = worker.plugins.setdefault(_NAME, _Servers())
    with servers.lock:
        server, state = servers.current.get(environment, (None, None))
        now = _state(worker)
        if server is None or state != now or not server.usable:
            if server is not None:
                server.retire()
            server = ForkServer(environment, now[0])
            servers.current[environment] = server, now
        return server


def end_servers(worker: Worker, environments: Iterable[Environment]) -> None:
    """End the worker's fork servers for these environments, with their last children; returns when they have ended."""
    with _making:
        kept: _Servers = worker.plugins.setdefault(_NAME, _Servers())
    with kept.lock:
        ending = [kept.current.pop(environment)[0] for environment in environments if environment in kept.current]
    for server in ending:
        server.retire()
    for server in ending:
        server.join()


def servers(worker: Worker) -> set[int]:
    """The processes of the worker's fork servers, which outlive the members they were started for."""
    kept = worker.plugins.get(_NAME, _Servers()).current.values()
    return {server.pid for server, _ in kept if server.pid}


def _state(worker: Worker) -> tuple[dict[str, str], Any, Any]:
    """What makes a server stale when it changes: variables, plugins, what is installed and what was uploaded."""
    plugins = sorted(
        (name, id(plugin)) for name, plugin in worker.plugins.items() if not name.startswith("dask-bridges-")
    )
    # A file that is uploaded again leaves the time of its folder as it was.
    uploaded = [path for path in Path(worker.local_directory).glob("*") if path.suffix in _MODULES]
    installed = [Path(folder) for folder in sys.path if folder.endswith("-packages")]
    return dict(os.environ), plugins, sorted((str(path), _changed(path)) for path in (*uploaded, *installed))


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
