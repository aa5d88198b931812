"""All-reduce, broadcast, gather and barrier of a gang: what comes out, and how it ends when a member does."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import dask.config
import numpy as np
import pytest
from distributed import Client
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_bridges.collective import Collective, PeerLost, is_collective_error, meeting, operations, ring
from dask_bridges.collective.ring import Ring
from dask_bridges.collective.steps import PIECE
from dask_bridges.config import Deadlines
from dask_bridges.errors import BridgeError, GangTimeout, MemberLost, MemberStopped, PlacementError
from dask_bridges.gang import Gang, GangPlan
from dask_bridges.member import Member, MemberSpec
from dask_bridges.processes import ChildMember, run_in_child
from dask_bridges.task import WorkerMember
from dask_bridges.testing import footprint, leftovers

DTYPES = ("float32", "float64", "int32", "int64")
SMALL = operations.SMALL

Work = Callable[[Collective], Any]
Waiting = Callable[[int], None]


# Members without a cluster


class Board:
    """Where members without a cluster tell each other what they exchange."""

    def __init__(self, size: int) -> None:
        self.told: dict[int, Any] = {}
        self.all_there = threading.Barrier(size)
        self.spy: Callable[[dict[int, Any]], None] = lambda told: None

    def exchange(self, rank: int, payload: Any) -> dict[str, Any]:
        self.told[rank] = payload
        if self.all_there.wait(30) == 0:
            self.spy(self.told)
        self.all_there.wait(30)
        return {"payloads": [self.told[one] for one in sorted(self.told)]}


class ThreadMember(Member):
    """A member on a thread of the test."""

    def __init__(self, board: Board, rank: int, size: int) -> None:
        deadlines = Deadlines.configured(start_timeout=30)
        workers = tuple(f"tcp://127.0.0.1:{40000 + one}" for one in range(size))
        super().__init__(MemberSpec("g", 1, rank, workers, "summing", print, None, deadlines))
        self.board = board

    def send(self, message: dict[str, Any]) -> None:
        pass

    def ask(self, method: str, **request: Any) -> dict[str, Any]:
        return self.board.exchange(self.rank, request["payload"])

    def keep(self, step: int, state: Any) -> None:
        raise NotImplementedError

    def fail(self, error: BaseException) -> None:
        raise NotImplementedError


class Ranks:
    """A gang of threads that have joined."""

    def __init__(self, members: list[ThreadMember], collectives: list[Collective], pool: ThreadPoolExecutor) -> None:
        self.members, self.collectives, self._pool = members, collectives, pool

    def start(self, *works: Work) -> list[Any]:
        """Have each rank do its work, or all the same; their futures."""
        chosen = works * len(self.members) if len(works) == 1 else works
        return [self._pool.submit(work, one) for work, one in zip(chosen, self.collectives)]

    def do(self, *works: Work) -> list[Any]:
        return [future.result(30) for future in self.start(*works)]

    def errors(self, *works: Work) -> list[BaseException | None]:
        return [future.exception(30) for future in self.start(*works)]


@contextlib.contextmanager
def ranks(size: int, board: Board | None = None, **options: Any) -> Iterator[Ranks]:
    board = board or Board(size)
    members = [ThreadMember(board, rank, size) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool, contextlib.ExitStack() as stack:
        futures = [pool.submit(Collective.join, member, **options) for member in members]
        wait(futures, 60)
        yield Ranks(members, [stack.enter_context(one.result()) for one in futures], pool)


@pytest.fixture(scope="module")
def worlds() -> Iterator[Callable[[int], Ranks]]:
    """``worlds(size)`` gives ranks that stay joined for all examples."""
    with contextlib.ExitStack() as stack:
        joined: dict[int, Ranks] = {}

        def world(size: int) -> Ranks:
            if size not in joined:
                joined[size] = stack.enter_context(ranks(size))
            return joined[size]

        yield world


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Waiting:
    """``waiting(n)`` returns once `n` members have nothing to do but to wait for their neighbours."""
    members: set[Ring] = set()
    changed = threading.Condition()
    wait_for_neighbours = Ring._wait

    def noticed(self: Ring, sending: bool, receiving: bool) -> None:
        with changed:
            members.add(self)
            changed.notify_all()
        wait_for_neighbours(self, sending, receiving)

    def until(number: int) -> None:
        with changed:
            assert changed.wait_for(lambda: len(members) >= number, 30)

    monkeypatch.setattr(Ring, "_wait", noticed)
    return until


def some(dtype: str, length: int, rank: int) -> Any:
    rng = np.random.default_rng([length, rank])
    values = rng.normal(size=length) if dtype.startswith("float") else rng.integers(-1000, 1000, length)
    return values.astype(dtype)


# What comes out

lengths = st.one_of(
    st.integers(0, 12),
    st.integers(SMALL // 8 - 3, SMALL // 8 + 3),
    st.integers(SMALL // 4 - 3, SMALL // 4 + 3),
    st.integers(PIECE // 4 - 3, PIECE + 7),
)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 5), dtype=st.sampled_from(DTYPES), length=lengths)
def test_all_reduce_is_the_sum_and_the_same_to_the_bit(
    worlds: Callable[[int], Ranks], size: int, dtype: str, length: int
) -> None:
    def work(collective: Collective) -> Any:
        buffer = some(dtype, length, collective.rank)
        collective.all_reduce(buffer)
        return buffer

    results = worlds(size).do(work)
    wanted = np.sum([some(dtype, length, rank) for rank in range(size)], axis=0)
    assert len({result.tobytes() for result in results}) == 1
    assert results[0].dtype == dtype
    if dtype.startswith("int"):
        np.testing.assert_array_equal(results[0], wanted)
    else:
        np.testing.assert_allclose(results[0], wanted, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 5), dtype=st.sampled_from(DTYPES), length=lengths, data=st.data())
def test_broadcast_gives_all_what_the_root_has(
    worlds: Callable[[int], Ranks], size: int, dtype: str, length: int, data: st.DataObject
) -> None:
    root = data.draw(st.integers(0, size - 1))

    def work(collective: Collective) -> Any:
        buffer = some(dtype, length, collective.rank)
        collective.broadcast(buffer, root)
        return buffer

    for result in worlds(size).do(work):
        np.testing.assert_array_equal(result, some(dtype, length, root))


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.one_of(st.binary(max_size=20), st.just(b"x" * 300_000)), min_size=1, max_size=5))
def test_all_gather_gives_the_bytes_of_all_by_rank(worlds: Callable[[int], Ranks], texts: list[bytes]) -> None:
    assert worlds(len(texts)).do(lambda collective: collective.all_gather(texts[collective.rank])) == [texts] * len(
        texts
    )


def test_nobody_passes_a_barrier_before_all_have_come(worlds: Callable[[int], Ranks], waiting: Waiting) -> None:
    come: list[int] = []

    def work(collective: Collective) -> int:
        if collective.rank == 2:
            waiting(3)
        come.append(collective.rank)
        collective.barrier()
        return len(come)

    assert worlds(4).do(work) == [4] * 4


def test_arrays_of_more_dimensions_are_summed_in_place(worlds: Callable[[int], Ranks]) -> None:
    def work(collective: Collective) -> Any:
        buffer = np.full((3, 4, 5), collective.rank + 1.0)
        collective.all_reduce(buffer)
        scalar = np.array(2)
        collective.all_reduce(scalar)
        return buffer, scalar

    for buffer, scalar in worlds(3).do(work):
        np.testing.assert_array_equal(buffer, np.full((3, 4, 5), 6.0))
        assert scalar == 6


@pytest.mark.parametrize("length", [5, PIECE])
def test_an_overflow_is_summed_like_any_number(worlds: Callable[[int], Ranks], length: int) -> None:
    def work(collective: Collective) -> Any:
        buffer = np.full(length, [np.inf, -np.inf, np.nan][collective.rank], "float32")
        with np.errstate(all="raise"):
            collective.all_reduce(buffer)
        return buffer

    results = worlds(3).do(work)
    assert np.isnan(results[0]).all()
    assert len({result.tobytes() for result in results}) == 1


def test_calls_of_several_threads_wait_for_each_other(worlds: Callable[[int], Ranks]) -> None:
    def work(collective: Collective) -> list[float]:
        buffers = [np.ones(PIECE) for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(collective.all_reduce, buffers))
        return [buffer.max() for buffer in buffers]

    assert worlds(3).do(work) == [[3.0] * 4] * 3


@pytest.mark.parametrize(
    ("buffer", "error", "said"),
    [
        (np.zeros(3, "float16"), TypeError, "array of float16"),
        ([1.0], TypeError, "buffer is a list"),
        (np.zeros((4, 4))[:, 1], ValueError, "C-contiguous"),
        (np.frombuffer(b"12345678"), ValueError, "writable"),
        (np.zeros(3, ">f8"), TypeError, "array of >f8"),
    ],
)
def test_a_buffer_that_cannot_be_summed_is_refused(
    worlds: Callable[[int], Ranks], buffer: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        worlds(1).collectives[0].all_reduce(buffer)


# Members that do not do the same


def reduce(length: int, dtype: str = "float32") -> Work:
    return lambda collective: collective.all_reduce(np.zeros(length, dtype))


def spread(length: int, root: int) -> Work:
    return lambda collective: collective.broadcast(np.zeros(length), root)


def barrier(collective: Collective) -> None:
    collective.barrier()


def reduce_late(collective: Collective) -> None:
    collective.barrier()
    collective.all_reduce(np.zeros(5))


@pytest.mark.parametrize("odd_one", range(3))
@pytest.mark.parametrize(
    ("usual", "odd", "said"),
    [
        (reduce(5), reduce(6), ("all_reduce of 5 float32", "all_reduce of 6 float32")),
        (reduce(0), reduce(1), ("all_reduce of 0 float32", "all_reduce of 1 float32")),
        (reduce(5), reduce(5, "int32"), ("float32", "int32")),
        (reduce(2_000_000), reduce(6), ("of 2000000 float32", "of 6 float32")),
        (reduce(2_000_000), reduce(2_000_001), ("of 2000000 float32", "of 2000001 float32")),
        (reduce(5), barrier, ("all_reduce of 5 float32", "barrier")),
        (spread(5, 0), spread(5, 1), ("from rank 0", "from rank 1")),
        (spread(500_000, 0), barrier, ("broadcast of 500000 float64", "barrier")),
        (spread(5, 0), barrier, ("broadcast of 5 float64", "barrier")),
        (lambda collective: collective.all_gather(b"a"), reduce(2), ("all_gather", "all_reduce of 2")),
        (reduce(5, "float64"), reduce_late, ("all_reduce of 5 float64 (operation 1)", "barrier (operation 1)")),
    ],
)
def test_members_that_do_not_do_the_same_are_told_so_all(
    usual: Work, odd: Work, said: tuple[str, str], odd_one: int
) -> None:
    works = [odd if rank == odd_one else usual for rank in range(3)]
    with ranks(3) as gang:
        for error in gang.errors(*works):
            assert isinstance(error, BridgeError), error
            assert not is_collective_error(error)
            assert all(part in str(error) for part in said), error
            assert f"rank {odd_one} on tcp://127.0.0.1:4000{odd_one} is in" in str(error) or (
                f"and rank {odd_one} on tcp://127.0.0.1:4000{odd_one} in" in str(error)
            )
        with pytest.raises(BridgeError, match="do not do the same"):
            gang.collectives[0].barrier()


# Strangers


@pytest.fixture
def knocking() -> Iterator[Callable[[bytes | None], Board]]:
    """``knocking(words)`` is a board: before members connect, strangers come to each, and say `words`."""
    with contextlib.ExitStack() as stack:

        def board_of_three(words: bytes | None) -> Board:
            def knock(told: dict[int, Any]) -> None:
                for host, port, _ in told.values():
                    for _ in range(3):
                        stranger = stack.enter_context(socket.create_connection((host, port), timeout=30))
                        stranger.sendall(words or b"")

            board = Board(3)
            board.spy = knock
            return board

        yield board_of_three


@pytest.mark.parametrize("words", [None, b"GET / HTTP/1.1\r\n\r\n", b"x" * 64, b"y" * 100_000])
def test_strangers_disturb_nobody(knocking: Callable[[bytes | None], Board], words: bytes | None) -> None:
    with ranks(3, knocking(words)) as gang:
        assert gang.do(lambda one: one.all_gather(b"%d" % one.rank)) == [[b"0", b"1", b"2"]] * 3


class Deceived(ThreadMember):
    """Is told an address, or a secret, that is not its peer's."""

    def __init__(self, rank: int, deceive: Callable[[list[Any]], Any], board: Board | None = None) -> None:
        super().__init__(board or Board(1), rank, 2)
        self._deceive = deceive

    def ask(self, method: str, **request: Any) -> dict[str, Any]:
        return {"payloads": self._deceive(super().ask(method, **request)["payloads"])}


@contextlib.contextmanager
def joining(deceive: Callable[[list[Any]], Any], **options: Any) -> Iterator[tuple[Deceived, Future[Collective]]]:
    """A member that joins with nobody; `deceive` is given what it tells, and gives what both tell."""
    with ThreadPoolExecutor(1) as pool:
        member = Deceived(0, deceive)
        yield member, pool.submit(Collective.join, member, **options)


def test_a_silent_stranger_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "HANDSHAKE", 0.05)
    addresses: SimpleQueue[Any] = SimpleQueue()

    def deceive(told: list[Any]) -> Any:
        addresses.put(told[0][:2])
        return [told[0], (*never.getsockname(), "")]

    with socket.create_server(("127.0.0.1", 0)) as never, joining(deceive) as (member, joined):
        with socket.create_connection(addresses.get(timeout=30), timeout=30) as stranger:
            assert len(stranger.recv(100)) == meeting.SIZE
            assert stranger.recv(100) == b""
        assert not joined.done()
        member.stop("enough")
        assert isinstance(joined.exception(5), MemberStopped)


def test_who_calls_and_does_not_know_the_secret_is_no_peer() -> None:
    board = Board(2)
    deceived = Deceived(1, lambda told: [(*told[0][:2], "00" * 32), told[1]], board)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(Collective.join, one, timeout=10) for one in (ThreadMember(board, 0, 2), deceived)]
        for future in futures:
            with pytest.raises(PeerLost, match=r"rank . on tcp://.* could not connect to it at 127\.0\.0\.1"):
                future.result(5)


def test_who_listens_and_does_not_know_the_secret_is_no_peer() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as stranger,
        joining(lambda told: [told[0], (*stranger.getsockname(), "")]) as (_, joined),
        stranger.accept()[0] as connection,
    ):
        connection.sendall(b"n" * meeting.SIZE + b"p" * meeting.SIZE)
        with pytest.raises(BridgeError, match=r"who listens at 127\.0\.0\.1:.* is not rank 1 on tcp://.*:40001"):
            joined.result(5)


def test_a_peer_that_does_not_come_is_named() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as never,
        joining(lambda told: [told[0], (*never.getsockname(), "")], timeout=0.1) as (_, joined),
        pytest.raises(GangTimeout, match=r"rank 1 on tcp://.*:40001 had not joined .*firewall"),
    ):
        joined.result(5)


def test_stop_wakes_who_waits_to_join() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as never,
        joining(lambda told: [told[0], (*never.getsockname(), "")]) as (member, joined),
        never.accept()[0],
    ):
        member.stop("the client gave up")
        with pytest.raises(MemberStopped, match="the client gave up"):
            joined.result(5)


def test_behind_another_address_a_member_listens_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    member = ThreadMember(Board(1), 0, 2)
    member.host = "192.0.2.1"
    with meeting._listener(member, 0) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"


# Ends


@pytest.mark.parametrize("length", [9, 1_000_000])
def test_a_peer_that_leaves_is_lost_to_the_others(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr(ring, "GRACE", 60.0)  # they are told so, and need not wait
    with ranks(4) as gang:
        errors = gang.errors(reduce(length), reduce(length), Collective.close, reduce(length))
        assert errors[2] is None
        for rank in (0, 1, 3):
            assert isinstance(errors[rank], PeerLost)
            assert "rank 2 on tcp://127.0.0.1:40002" in str(errors[rank])


def test_who_waits_for_others_hears_that_a_peer_leaves(waiting: Waiting) -> None:
    with ranks(4) as gang, ThreadPoolExecutor(1) as pool:
        future = pool.submit(barrier, gang.collectives[1])
        waiting(1)
        gang.collectives[2].close()
        with pytest.raises(PeerLost, match=r"rank 2 on .* has left the collective, before operation 1"):
            future.result(5)


def test_a_peer_that_leaves_after_its_part_is_no_loss() -> None:
    def last(collective: Collective) -> float:
        buffer = np.ones(700_000)
        collective.all_reduce(buffer)
        collective.close()
        return float(buffer.min())

    for _ in range(5):
        with ranks(3) as gang:
            assert gang.do(last) == [3.0] * 3


def test_a_peer_that_fails_in_the_middle_is_lost_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    fails_at = {"rank 1": 20}
    receive = Ring._receive

    def failing(self: Ring, into: memoryview) -> int:
        name = str(self._peer_before)[:6]
        fails_at[name] = fails_at.get(name, 1 << 60) - 1
        if not fails_at[name]:
            raise ZeroDivisionError("user code")
        return receive(self, into)

    monkeypatch.setattr(Ring, "_receive", failing)
    with ranks(3) as gang:
        errors = gang.errors(reduce(5_000_000))
    assert isinstance(errors[2], ZeroDivisionError)
    assert all(isinstance(errors[rank], PeerLost) and "rank 2" in str(errors[rank]) for rank in (0, 1)), errors


@pytest.mark.parametrize(("size", "rank"), [(2, 0), (3, 0), (3, 2)])
def test_a_connection_that_ends_without_a_word_is_a_lost_peer(
    monkeypatch: pytest.MonkeyPatch, size: int, rank: int
) -> None:
    """As when a process is killed; also where the others have not noticed yet."""
    monkeypatch.setattr(ring, "GRACE", 0.05)
    with ranks(size) as gang:
        killed = gang.collectives[1]._ring
        assert killed is not None
        killed.shut()
        with pytest.raises(PeerLost, match="rank 1 on"):
            gang.collectives[rank].all_reduce(np.zeros(9))


def test_stop_wakes_who_waits_in_every_thread(waiting: Waiting) -> None:
    with ranks(2) as gang, ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(reduce(1_000_000), gang.collectives[0]) for _ in range(2)]
        waiting(1)
        gang.members[0].stop("the client gave up")
        for future in futures:
            with pytest.raises(MemberStopped, match="the client gave up"):
                future.result(5)
        with pytest.raises(MemberStopped):
            gang.collectives[0].barrier()
        with pytest.raises(PeerLost, match="rank 0"):
            gang.collectives[1].all_reduce(np.zeros(1_000_000, "float32"))


def test_close_ends_an_operation_of_another_thread(waiting: Waiting) -> None:
    with ranks(2) as gang, ThreadPoolExecutor(1) as pool:
        future = pool.submit(barrier, gang.collectives[0])
        waiting(1)
        gang.collectives[0].close()
        gang.collectives[0].close()
        with pytest.raises(BridgeError, match="collective of member 0 was closed meanwhile"):
            future.result(5)
        with pytest.raises(BridgeError, match="is closed"):
            gang.collectives[0].barrier()


def caused(error: BaseException, **by: BaseException) -> BaseException:
    """An exception that was raised while another was handled."""
    for name, one in by.items():
        setattr(error, name, one)
    return error


def test_a_lost_peer_is_told_apart_by_its_echoes() -> None:
    error = PeerLost("rank 1")
    assert is_collective_error(caused(ValueError("in a framework"), __cause__=error))
    assert is_collective_error(
        caused(ValueError("while that was handled"), __context__=caused(KeyError(), __cause__=error))
    )
    assert is_collective_error(pickle.loads(pickle.dumps(error)))
    assert not is_collective_error(ValueError("loss is NaN"))
    with ranks(2) as gang:
        gang.collectives[1].close()
        with pytest.raises(PeerLost) as caught:
            gang.collectives[0].barrier()
    assert is_collective_error(RuntimeError(f"UnknownError: PeerLost: {caught.value}\nTraceback …"))


# What is left


def test_the_range_of_ports_is_kept_to_and_freed() -> None:
    first = 20_000 + os.getpid() % 2000 * 3  # below those that connections are given
    wanted = {first, first + 1, first + 2}
    ports: list[int] = []
    with contextlib.ExitStack() as stack, dask.config.set({"dask-bridges.collective-port": f"{first}:{first + 2}"}):
        for _ in range(2):  # also while others are connected by them, and right after
            for _ in range(2):
                board = Board(3)
                board.spy = lambda told: ports.extend(port for _, port, _ in told.values())
                gang = stack.enter_context(ranks(3, board))
                assert set(ports) == wanted
                for port in wanted:
                    with pytest.raises(ConnectionRefusedError):
                        socket.create_connection(("127.0.0.1", port), timeout=5)
                assert gang.do(lambda collective: collective.all_gather(b"")) == [[b""] * 3] * 3
            stack.pop_all().close()


def test_no_free_port_is_an_error_that_names_the_setting() -> None:
    with socket.create_server(("", 0)) as busy, pytest.raises(PlacementError, match="collective-port"):
        Collective.join(ThreadMember(Board(2), 0, 2), port=busy.getsockname()[1])


def test_no_thread_and_no_socket_stays() -> None:
    def held() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    before = held()
    with ranks(4) as gang:
        gang.do(reduce(100_000))
    assert held() == before
    with ranks(3) as gang:
        gang.errors(barrier, reduce(4), barrier)
    assert held() == before


# On a cluster, in child processes


def in_child(member: WorkerMember, work: tuple[Callable[[ChildMember, Any], Any], Any]) -> Any:
    return run_in_child(member, *work)


def sums(member: Member, length: int) -> Any:
    with Collective.join(member) as collective:
        buffer = np.arange(length, dtype="float64") * (member.rank + 1)
        collective.all_reduce(buffer)
        return float(buffer.sum()), collective.all_gather(b"%d" % member.rank)


def sums_until_one_dies(member: ChildMember, file: str) -> None:
    """Rank 1 dies by SIGKILL with its peers in the middle of an all-reduce."""
    with Collective.join(member) as collective:
        buffer = np.zeros(5_000_000)
        collective.all_reduce(buffer)
        if member.rank == 1:
            _die_in(collective)
        try:
            collective.all_reduce(buffer)
        except BaseException as error:
            Path(f"{file}-{member.rank}").write_text(f"{type(error).__name__} {is_collective_error(error)} {error}")
            raise


def _die_in(collective: Collective) -> None:
    receive, left = Ring._receive, [10]

    def dying(self: Ring, into: memoryview) -> int:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return receive(self, into)

    Ring._receive = dying  # type: ignore[method-assign]
    collective.all_reduce(np.zeros(5_000_000))


def wait_for_a_peer(member: ChildMember, payload: Any) -> None:
    """Rank 1 fails while the others wait for it."""
    with Collective.join(member) as collective:
        if member.rank == 1:
            raise LookupError("user code")
        collective.barrier()


@pytest.fixture
def gang_of_three(bridges_client: Client) -> Callable[..., Any]:
    """``gang_of_three(function, payload)`` runs it; nothing is left."""

    def run(function: Callable[..., Any], payload: Any) -> Any:
        workers = sorted(bridges_client.scheduler_info(n_workers=-1)["workers"])
        plan = GangPlan("summing", function, [payload] * 3, workers, collateral=is_collective_error)
        try:
            return bridges_client.sync(Gang(bridges_client, plan).run)
        finally:
            assert leftovers(bridges_client) == {}
            assert [found["children"] for found in footprint(bridges_client).values()] == [[], [], []]

    return run


@pytest.mark.cluster
@pytest.mark.parametrize("child", [False, True])
def test_members_on_workers_and_in_children_sum(gang_of_three: Callable[..., Any], child: bool) -> None:
    length = 300_001
    results = gang_of_three(in_child, (sums, length)) if child else gang_of_three(sums, length)
    assert results == [(6.0 * sum(range(length)), [b"0", b"1", b"2"])] * 3


@pytest.mark.cluster
def test_a_killed_child_is_the_cause_and_its_lost_peers_are_echoes(
    gang_of_three: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(MemberLost, match=r"member 1 .* killed from outside") as caught:
        gang_of_three(in_child, (sums_until_one_dies, str(tmp_path / "end")))
    assert caught.value.rank == 1
    for rank in (0, 2):
        end = (tmp_path / f"end-{rank}").read_text()
        assert end.startswith(("PeerLost True rank 1 on", "MemberStopped"))


@pytest.mark.cluster
def test_user_code_that_fails_is_the_cause_and_its_lost_peers_are_echoes(gang_of_three: Callable[..., Any]) -> None:
    with pytest.raises(Exception, match=r"member 1 on .* raised LookupError: user code"):
        gang_of_three(in_child, (wait_for_a_peer, None))
