"""Gangs of all sizes, some of which fail by themselves, on workers of which one is killed every few seconds."""

from __future__ import annotations

import collections
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dask_bridges import MemberFailed, MemberLost, PlacementError
from dask_bridges.gang import Gang, GangPlan
from dask_bridges.task import WorkerMember
from dask_bridges.testing import command_line_cluster, leftovers

pytestmark = pytest.mark.cluster

WORKERS = 4
TROUBLES: dict[str, type[BaseException]] = {"raises": ValueError, "exits": SystemExit}


@dataclass(frozen=True)
class Wish:
    """A gang that is asked for: its size, its rounds, and who is to fail how in which round."""

    size: int
    rounds: int
    culprit: int
    trouble: str
    exclusive: bool

    @property
    def fails(self) -> bool:
        return self.culprit < self.size and self.trouble != "none"


wishes = st.builds(
    Wish,
    size=st.integers(1, WORKERS),
    rounds=st.integers(1, 20),
    culprit=st.integers(0, WORKERS - 1),
    trouble=st.sampled_from(["none", "none", *TROUBLES]),
    exclusive=st.booleans(),
)


def exchange_rounds(member: WorkerMember, payload: tuple[Wish, str]) -> int:
    """Note down that it runs, then exchange, and fail if it is the one to."""
    wish, log = payload
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{member.gang} {member.attempt} {member.rank}\n".encode())
    os.close(file)
    total = 0
    for number in range(wish.rounds):
        if wish.fails and member.rank == wish.culprit and number == wish.rounds // 2:
            raise TROUBLES[wish.trouble](number)
        total += sum(member.exchange(1))
    return total


@dataclass
class Killer:
    """Kills a random worker at every interval."""

    client: Client
    interval: float
    dice: random.Random
    killed: set[str] = field(default_factory=set)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        over = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(self._until, over)
            try:
                yield
            finally:
                over.set()
            work.result()

    def _until(self, over: threading.Event) -> None:
        while not over.wait(self.interval):
            processes = self.client.run(os.getpid, on_error="ignore")
            if processes:
                worker = self.dice.choice(sorted(processes))
                self.killed.add(worker)
                os.kill(processes[worker], signal.SIGKILL)


def fulfil(client: Client, wish: Wish, log: str) -> tuple[Wish, list[Any] | BaseException]:
    """Run a gang, again where workers had left before it had its place."""
    while True:
        client.wait_for_workers(wish.size, timeout=60)
        workers = list(client.scheduler_info(n_workers=-1)["workers"])
        plan = GangPlan("soak", exchange_rounds, [(wish, log)] * wish.size, workers, exclusive=wish.exclusive)
        try:
            return wish, client.sync(Gang(client, plan).run)
        except PlacementError:
            continue
        except (MemberFailed, MemberLost) as error:
            return wish, error


def assert_right(wish: Wish, outcome: Any, killed: set[str]) -> None:
    """Finished with the right results, failed by the one that was to, or lost with a worker that was killed."""
    match outcome:
        case MemberLost():
            assert outcome.worker in killed
        case MemberFailed():
            assert wish.fails
            assert outcome.rank == wish.culprit
            cause = outcome.__cause__
            assert isinstance(cause, ValueError) or "SystemExit" in str(outcome)
        case _:
            assert not wish.fails
            assert outcome == [wish.size * wish.rounds] * wish.size


@pytest.mark.parametrize(
    ("seconds", "interval", "examples"),
    [
        pytest.param(8, 2, 100, marks=[pytest.mark.slow, pytest.mark.timeout(120)]),
        pytest.param(300, 5, 10_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_whatever_is_killed_all_that_was_asked_for_ends_right_and_once(
    tmp_path: Path, seconds: float, interval: float, examples: int, caplog: pytest.LogCaptureFixture
) -> None:
    log, deadline, counts = tmp_path / "members.log", 0.0, collections.Counter[str]()

    @settings(
        max_examples=examples, phases=[Phase.generate], deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(wishes, min_size=6, max_size=12))
    def asked_for(batch: list[Wish]) -> None:
        if time.monotonic() > deadline:
            return
        for wish, outcome in pool.map(lambda wish: fulfil(cluster.client, wish, str(log)), batch):
            assert_right(wish, outcome, killer.killed)
            counts[type(outcome).__name__] += 1

    with command_line_cluster(workers=WORKERS, bare_scheduler=True) as cluster, ThreadPoolExecutor(3) as pool:
        killer = Killer(cluster.client, interval, random.Random(seconds))
        with killer.at_work():
            deadline = time.monotonic() + seconds
            asked_for()
        assert counts["list"] > 0
        assert counts["MemberFailed"] > 0
        ran = collections.Counter(log.read_text().splitlines())
        assert [line for line, times in ran.items() if times > 1] == []
        cluster.client.wait_for_workers(WORKERS, timeout=60)
        assert leftovers(cluster.client) == {}
    assert [record for record in caplog.records if "No event handler" in record.getMessage()] == []
    print(f"{sum(counts.values())} gangs, {len(killer.killed)} kills: {dict(counts)}")
