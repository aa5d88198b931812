"""Children forked from a worker's fork server: what they find, what they say, and that nothing stays."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask.config
import numpy as np
import psutil
import pytest
from distributed import Client, WorkerPlugin

from dask_bridges import MemberLost, PlacementError
from dask_bridges.events import Log
from dask_bridges.gang import Gang, GangPlan
from dask_bridges.processes import ChildMember, Environment, forkserver, run_in_child
from dask_bridges.task import WorkerMember
from dask_bridges.testing import footprint, leftovers

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(sys.platform != "linux", reason="child processes need Linux")]

Function = Callable[[ChildMember, Any], Any]


def in_child(member: WorkerMember, work: tuple[Function, Any, Environment]) -> Any:
    return run_in_child(member, *work)


# What children do


def speaks(member: ChildMember, payload: Any) -> None:
    print("from Python")
    print("an error from Python", file=sys.stderr)
    os.write(1, b"from C\n")
    os.write(2, b"an error from C\nwithout an end")


def dies_talking(member: ChildMember, payload: Any) -> None:
    if member.rank == 1:
        print("a first word", flush=True)
        os.write(2, b"the last words\n")
        os._exit(3)
    member.exchange()


def finds(member: ChildMember, module: str) -> tuple[int, int, bool, Any]:
    """The server of this child, where and whether its module was imported, and the module's VALUE."""
    there = module in sys.modules
    found = __import__(module)
    return os.getppid(), found.PID, there, found.VALUE


def server_and(member: ChildMember, name: str) -> tuple[int, str | None]:
    return os.getppid(), os.environ.get(name)


def waits_for(member: ChildMember, work: tuple[str, str, str]) -> Any:
    """Say with a file that this child runs, and wait for another file."""
    up, go, module = work
    Path(f"{up}-{member.rank}").write_text(f"{os.getpid()} {os.getppid()}")
    stopped = threading.Event()
    member.on_stop(stopped.set)
    while not Path(go).exists() and not stopped.wait(0.01):
        pass
    member.check()
    return __import__(module).VALUE if module else None


def connections(member: ChildMember, payload: Any) -> tuple[list[Any], list[Any]]:
    """Internet sockets of this child and of its server."""
    member.exchange()
    return psutil.Process().net_connections("inet"), psutil.Process(os.getppid()).net_connections("inet")


def open_files(member: ChildMember, payload: Any) -> tuple[set[str], set[str]]:
    """Pipes and sockets that this child has open, while its peers live, and those of its server."""
    member.exchange()
    found = _pipes(os.getpid()), _pipes(os.getppid())
    member.exchange()
    return found


def _pipes(pid: int) -> set[str]:
    folder = Path(f"/proc/{pid}/fd")
    links = []
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(folder / name))
    return {link for link in links if link.startswith(("pipe:", "socket:"))}


def floods(member: ChildMember, size: int) -> str:
    if member.rank == 1:
        for _ in range(size // 1000):
            print("x" * 999)
    return "done"


def prints_and_waits(member: ChildMember, folder: str) -> None:
    """Print a line and go on once it was read."""
    print("read me")
    while not Path(folder, "read").exists():
        time.sleep(0.01)


def draws(member: ChildMember, payload: Any) -> float:
    return float(np.random.random())


# Running them


@pytest.fixture
def children(bridges_client: Client) -> Callable[..., Any]:
    """``children(function, payload, environment)`` runs a gang of two on two workers, each in a child."""

    def run(
        function: Function,
        payload: Any = None,
        environment: Environment = Environment(),  # noqa: B008 - frozen
        listener: Any = None,
        workers: Sequence[str] = (),
    ) -> Any:
        gang = Gang(bridges_client, planned(bridges_client, function, payload, environment, workers))
        if listener:
            gang.events.listen(listener)
        return bridges_client.sync(gang.run)

    return run


def planned(
    client: Client, function: Function, payload: Any, environment: Environment, workers: Sequence[str] = ()
) -> GangPlan:
    places = list(workers) or addresses(client)[:2]
    return GangPlan("gang", in_child, [(function, payload, environment)] * 2, places, exclusive=False)


def addresses(client: Client) -> list[str]:
    return sorted(client.scheduler_info(n_workers=-1)["workers"])


@contextlib.contextmanager
def waiting(
    client: Client, folder: Path, environment: Environment, module: str = ""
) -> Iterator[tuple[Future[Any], list[psutil.Process], list[psutil.Process], Path]]:
    """A gang of two that waits for a file: its future, its children, their servers, and that file."""
    up, go = folder / "up", folder / "go"
    gang = Gang(client, planned(client, waits_for, (str(up), str(go), module), environment))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.sync, gang.run)
        try:
            found = [_read(Path(f"{up}-{rank}"), future) for rank in range(2)]
            children, servers = ([psutil.Process(pids[at]) for pids in found] for at in range(2))
            yield future, children, servers, go
        finally:
            go.touch()


def _read(file: Path, future: Future[Any]) -> list[int]:
    while not (file.exists() and len(found := file.read_text().split()) == 2):
        assert not future.done(), future.exception()
    return [int(pid) for pid in found]


def parent_of(process: psutil.Process) -> psutil.Process:
    parent = process.parent()
    assert parent is not None
    return parent


def assert_gone(processes: Sequence[psutil.Process]) -> None:
    assert psutil.wait_procs([process for process in processes if process.is_running()], timeout=10)[1] == []


@pytest.fixture
def on_workers(bridges_client: Client, tmp_path: Path) -> Iterator[Callable[[str, str], str]]:
    """``on_workers(name, text)`` puts a module on the workers' path and gives its name."""
    folder = tmp_path / "modules"
    folder.mkdir()
    bridges_client.run(sys_path_append, str(folder))

    def put(name: str, text: str) -> str:
        (folder / f"{name}.py").write_text(text)
        return name

    yield put
    bridges_client.run(sys_path_remove, str(folder))


def sys_path_append(folder: str) -> None:
    sys.path.append(folder)


def sys_path_remove(folder: str) -> None:
    sys.path.remove(folder)


MODULE = "import os\nPID = os.getpid()\nVALUE = 1\n"


def test_what_a_child_prints_is_read_as_it_comes(children: Callable[..., Any], tmp_path: Path) -> None:
    def notice(event: Any) -> None:
        if isinstance(event, Log) and event.text == "read me":
            (tmp_path / "read").touch()

    buffered = Environment(variables=(("PYTHONUNBUFFERED", None),))
    children(prints_and_waits, str(tmp_path), buffered, notice)


# What they say


def test_all_that_children_write_reaches_the_worker_s_log_and_the_events_with_rank_and_stream(
    children: Callable[..., Any], bridges_client: Client
) -> None:
    events: list[Log] = []
    children(speaks, listener=lambda event: events.append(event) if isinstance(event, Log) else None)
    for rank, worker in enumerate(addresses(bridges_client)[:2]):
        said = {
            stream: sorted(line for e in events if (e.rank, e.stream) == (rank, stream) for line in e.text.splitlines())
            for stream in ("stdout", "stderr")
        }
        assert said["stdout"] == ["from C", "from Python"]
        assert said["stderr"] == ["an error from C", "an error from Python", "without an end"]
        log = [line for _, line in bridges_client.get_worker_logs(workers=[worker])[worker]]
        for line in (*said["stdout"], *said["stderr"]):
            assert any(f"member {rank}" in text and text.endswith(f"] {line}") for text in log), line


def test_the_last_lines_of_a_lost_child_are_in_the_error(children: Callable[..., Any]) -> None:
    with pytest.raises(MemberLost, match=r"exit code 3(.|\n)*said last:\n(.|\n)*the last words") as caught:
        children(dies_talking)
    assert "a first word" in str(caught.value)
    assert caught.value.rank == 1


@pytest.mark.parametrize("size", [1_000_000, pytest.param(10_000_000, marks=pytest.mark.slow)])
def test_a_flood_of_output_arrives_whole_and_is_not_piled_up_on_the_worker(
    children: Callable[..., Any], bridges_client: Client, size: int
) -> None:
    events: list[Log] = []
    children(floods, 1000)
    before = bridges_client.run(memory)
    result = children(floods, size, listener=lambda e: events.append(e) if isinstance(e, Log) else None)
    assert result == ["done", "done"]
    assert sum(len(event.text.splitlines()) for event in events if event.rank == 1) == size // 1000
    assert max(len(event.text) for event in events) <= 2**17
    worker = addresses(bridges_client)[1]
    # The log keeps 10,000 lines of any length.
    assert bridges_client.run(memory)[worker] - before[worker] < size + 30_000_000


def memory() -> int:
    return int(psutil.Process().memory_info().rss)


# What they find


def test_modules_are_imported_once_by_a_server_that_is_used_again(
    children: Callable[..., Any], on_workers: Callable[[str, str], str]
) -> None:
    environment = Environment((on_workers("imported_once", MODULE),))
    first = children(finds, "imported_once", environment)
    for server, imported_by, there, value in first:
        assert (imported_by, there, value) == (server, True, 1)
    assert children(finds, "imported_once", environment) == first


def test_environments_have_servers_and_variables_of_their_own(children: Callable[..., Any]) -> None:
    found = [children(server_and, "SOME_VALUE", Environment((), (("SOME_VALUE", v),))) for v in ("a", "b", "a")]
    assert [[value for _, value in workers] for workers in found] == [["a", "a"], ["b", "b"], ["a", "a"]]
    assert found[0] == found[2]
    assert {server for server, _ in found[0]}.isdisjoint(server for server, _ in found[1])


def test_children_see_the_present_path_of_their_worker_and_the_server_stays(
    children: Callable[..., Any], on_workers: Callable[[str, str], str]
) -> None:
    before = children(server_and, "")
    on_workers("added_later", MODULE)
    found = children(finds, "added_later")
    assert [server for server, *_ in found] == [server for server, _ in before]
    assert [(there, value) for *_, there, value in found] == [(False, 1), (False, 1)]


def test_a_module_that_was_uploaded_again_is_not_stale_and_older_children_go_on(
    children: Callable[..., Any], bridges_client: Client, tmp_path: Path
) -> None:
    file, environment = tmp_path / "uploaded_twice.py", Environment(("uploaded_twice",))
    file.write_text(MODULE)
    bridges_client.upload_file(str(file))
    with waiting(bridges_client, tmp_path, environment, "uploaded_twice") as (older, processes, servers, go):
        file.write_text(MODULE.replace("VALUE = 1", "VALUE = 2"))
        bridges_client.upload_file(str(file))
        found = children(finds, "uploaded_twice", environment)
        assert [value for *_, value in found] == [2, 2]
        assert {pid for pid, *_ in found}.isdisjoint(server.pid for server in servers)
        assert all(process.is_running() for process in (*processes, *servers))
        go.touch()
        assert older.result(30) == [1, 1]
    assert_gone([*processes, *servers])


def test_a_change_of_the_worker_s_variables_reaches_children(
    children: Callable[..., Any], bridges_client: Client
) -> None:
    before = children(server_and, "CHANGED")
    bridges_client.run(set_variable, "CHANGED", "yes")
    try:
        after = children(server_and, "CHANGED")
        assert [value for _, value in before + after] == [None, None, "yes", "yes"]
        assert {server for server, _ in before}.isdisjoint(server for server, _ in after)
    finally:
        bridges_client.run(set_variable, "CHANGED", None)
    assert [value for _, value in children(server_and, "CHANGED")] == [None, None]


def set_variable(name: str, value: str | None) -> None:
    if value is None:
        del os.environ[name]
    else:
        os.environ[name] = value


class Nothing(WorkerPlugin):  # type: ignore[misc]
    name = "nothing"


def test_a_new_plugin_of_the_workers_makes_new_servers(children: Callable[..., Any], bridges_client: Client) -> None:
    before = children(server_and, "")
    bridges_client.register_plugin(Nothing())
    try:
        assert {server for server, _ in before}.isdisjoint(server for server, _ in children(server_and, ""))
    finally:
        bridges_client.unregister_worker_plugin("nothing")


def test_children_do_not_draw_the_same_random_numbers(children: Callable[..., Any]) -> None:
    numbers = [*children(draws, None, Environment(("numpy",))), *children(draws, None, Environment(("numpy",)))]
    assert len(set(numbers)) == 4


def test_a_server_that_dies_before_it_forks_is_a_lost_member(
    children: Callable[..., Any], on_workers: Callable[[str, str], str]
) -> None:
    module = on_workers("ends_its_process", "import os\nos._exit(3)\n")
    with pytest.raises(MemberLost, match=r"member \d was lost before it had a process on tcp://.* has ended \(3\)"):
        children(draws, None, Environment((module,)))


def test_a_module_that_cannot_be_imported_is_named_with_what_it_said(
    children: Callable[..., Any], on_workers: Callable[[str, str], str]
) -> None:
    text = "import os\nos.write(2, b'libfoo.so was not found\\n')\nraise ImportError('no foo here')\n"
    with pytest.raises(
        PlacementError,
        match=r"breaks_at_import cannot be imported(.|\n)*no foo here(.|\n)*libfoo\.so was not found",
    ):
        children(finds, "breaks_at_import", Environment((on_workers("breaks_at_import", text),)))
    # Mended, it is tried again.
    on_workers("breaks_at_import", MODULE)
    found = children(finds, "breaks_at_import", Environment(("breaks_at_import",)))
    assert [value for *_, value in found] == [1, 1]


# What they keep


def test_neither_children_nor_servers_have_a_port_open(children: Callable[..., Any]) -> None:
    assert children(connections) == [([], []), ([], [])]


def test_children_of_one_server_have_none_of_each_other_s_pipes(
    children: Callable[..., Any], bridges_client: Client
) -> None:
    shared = addresses(bridges_client)[:1] * 2
    (one, server), (other, same_server) = children(open_files, workers=shared)
    assert server == same_server
    assert one
    assert len(one) == len(other)
    assert one.isdisjoint(other)
    assert one.isdisjoint(server)


def test_no_child_stays_and_none_as_a_zombie(children: Callable[..., Any], bridges_client: Client) -> None:
    children(server_and, "")
    before = footprint(bridges_client)
    for _ in range(5):
        children(server_and, "")
    after = footprint(bridges_client)
    for worker, found in after.items():
        assert found["children"] == []
        assert found["files"] == before[worker]["files"]
    for states in bridges_client.run(states_below).values():
        assert psutil.STATUS_ZOMBIE not in states


def states_below() -> list[str]:
    return [process.status() for process in psutil.Process().children(recursive=True)]


# How they end


def test_a_killed_fork_server_is_told_and_the_next_gang_has_another(
    children: Callable[..., Any], bridges_client: Client, tmp_path: Path
) -> None:
    with waiting(bridges_client, tmp_path, Environment()) as (gang, processes, servers, _):
        servers[1].kill()
        with pytest.raises(MemberLost, match=r"member 1 .*fork server of its worker was killed") as caught:
            gang.result(10)
        assert caught.value.rank == 1
        assert_gone([*processes, servers[1]])
    after = [server for server, _ in children(server_and, "")]
    assert after[0] == servers[0].pid
    assert after[1] != servers[1].pid


def test_a_fork_server_that_is_killed_while_nobody_needs_it_is_replaced(
    children: Callable[..., Any], bridges_client: Client
) -> None:
    before = [server for server, _ in children(server_and, "")]
    killed = psutil.Process(before[0])
    killed.kill()
    assert_gone([killed])
    after = [server for server, _ in children(server_and, "")]
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_servers_and_children_are_gone_with_their_killed_worker(bridges_doomed_client: Client, tmp_path: Path) -> None:
    client = bridges_doomed_client
    with waiting(client, tmp_path, Environment()) as (gang, processes, servers, _):
        parent_of(servers[1]).kill()
        with pytest.raises(MemberLost, match="member 1 was lost"):
            gang.result(10)
        assert_gone([*processes, servers[1]])
    assert leftovers(client) == {}


def test_servers_are_gone_with_a_worker_that_closes(bridges_doomed_client: Client, tmp_path: Path) -> None:
    client = bridges_doomed_client
    with waiting(client, tmp_path, Environment()) as (gang, processes, servers, go):
        go.touch()
        assert gang.result(10) == [None, None]
    client.retire_workers(addresses(client)[:2])
    assert_gone([*processes, *servers])


# What the worker feels


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs TensorFlow")
def test_the_worker_s_event_loop_goes_on_while_its_server_imports_tensorflow(bridges_client: Client) -> None:
    environment = Environment(("tensorflow",), (("OF_ITS_OWN", "1"),))
    bridges_client.run(begin_to_measure)
    try:
        gang = Gang(bridges_client, planned(bridges_client, server_and, "", environment))
        with dask.config.set({"dask-bridges.start-timeout": "120s"}):
            bridges_client.sync(gang.run)
    finally:
        lags = bridges_client.run(measured)
    told = {worker: (len(found), *np.quantile(found, [0.5, 0.99, 1]).round(4)) for worker, found in lags.items()}
    print("looks, median, p99 and most of the loops' lag in seconds:", told)
    for worker in addresses(bridges_client)[:2]:
        assert np.median(lags[worker]) < 0.2
    bridges_client.run(end_servers, environment)


_lags: list[float] = []
_measuring: list[asyncio.Task[None]] = []


async def begin_to_measure() -> None:
    async def measure() -> None:
        loop = asyncio.get_running_loop()
        while True:
            start = loop.time()
            await asyncio.sleep(0.01)
            _lags.append(loop.time() - start - 0.01)

    _lags.clear()
    _measuring.append(asyncio.ensure_future(measure()))


async def measured() -> list[float]:
    _measuring.pop().cancel()
    return list(_lags)


def end_servers(environment: Environment, dask_worker: Any) -> None:
    """Give back the memory of a server that no other test uses."""
    forkserver.fork_server(dask_worker, environment).end()
