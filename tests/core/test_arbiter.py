"""Turns: who gets which workers when, and whose token is accepted."""

from __future__ import annotations

import asyncio
import functools
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import dask
import pytest
from distributed import Client, LocalCluster, Scheduler
from distributed.protocol.pickle import dumps

from dask_bridges import PlacementError, turns
from dask_bridges.arbiter import KEPT_TOPICS, OPERATION, STOP, Arbiter
from dask_bridges.config import Deadlines

Scenario = Callable[["Turns"], Coroutine[Any, Any, None]]
Play = Callable[[Scenario], None]


class Turns:
    """Asks the arbiter as gangs and members do, on the loop of an asynchronous client."""

    def __init__(self, client: Client, cluster: LocalCluster) -> None:
        self.client = client
        self.scheduler = cluster.scheduler
        self.there = {worker.address: worker for worker in cluster.workers.values()}
        self.workers = sorted(self.there)
        self.stopped: list[tuple[int, str]] = []  # rank and gang, as members are asked to stop
        for rank, address in enumerate(self.workers):
            self.there[address].stream_handlers[STOP] = functools.partial(self._stop, rank)

    def _stop(self, rank: int, gang: str, reason: str) -> None:
        self.stopped.append((rank, gang))

    async def lose(self, index: int) -> None:
        """End a worker."""
        await self.there[self.workers[index]].close()

    async def acquire(
        self,
        gang: str,
        candidates: Sequence[int] = (0, 1, 2),
        places: int = 0,
        wait: float = 0,
        stop_timeout: float | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        request = {"client": self.client.id, "label": f"gang {gang}", "attempt": 1, "exclusive": True,
                   "names": [f"member {rank}" for rank in range(9)], "replaceable": ()}  # fmt: skip
        request["deadlines"] = asdict(Deadlines.configured(stop_timeout=stop_timeout))
        return await turns.ask(
            self.client, "acquire", gang=gang, candidates=[self.workers[i] for i in candidates],
            places=places or len(candidates), wait=wait, topic=f"topic-{gang}", **{**request, **options},
        )  # fmt: skip

    async def granted(self, gang: str, candidates: Sequence[int] = (0, 1, 2), **options: Any) -> bool:
        return "granted" in await self.acquire(gang, candidates, **options)

    async def ask(self, method: str, gang: str, rank: int = 0, **request: Any) -> dict[str, Any]:
        return await turns.ask(self.client, method, gang=gang, **{"attempt": 1, "rank": rank, **request})

    async def present(self, gang: str, rank: int, **request: Any) -> dict[str, Any]:
        return await self.ask("present", gang, rank, **{"worker": self.workers[rank], "incarnation": 0, **request})

    async def settle(self, gang: str) -> dict[str, Any]:
        return await turns.ask(self.client, "settle", gang=gang, reason="a member failed")

    async def release(self, gang: str) -> None:
        await turns.ask(self.client, "release", gang=gang, reason="finished")

    async def gangs(self) -> list[str]:
        return [gang["gang"] for gang in (await turns.ask(self.client, "status"))["gangs"]]

    async def queued(self, number: int) -> None:
        """Wait until so many gangs hold or wait."""
        while len(await self.gangs()) < number:
            pass

    def leave(self, gang: str, rank: int, **changes: Any) -> None:
        """What the worker of a member says when the member is done."""
        message = {"gang": gang, "attempt": 1, "rank": rank, "outcome": "finished", "left": True,
                   "worker": self.workers[rank]}  # fmt: skip
        self.scheduler.stream_handlers[OPERATION](**{**message, **changes})


@asynccontextmanager
async def arbitrated(cluster: LocalCluster) -> AsyncIterator[Turns]:
    """A client of that cluster; when it has gone, so have its gangs."""
    async with Client(cluster.scheduler_address, asynchronous=True) as client:
        await turns.register(client)
        yield Turns(client, cluster)
    async with Client(cluster.scheduler_address, asynchronous=True) as other:
        assert await Turns(other, cluster).gangs() == []


@pytest.fixture
def play(threads_cluster: LocalCluster) -> Play:
    """Run a scenario against the arbiter of a real scheduler."""

    async def run(scenario: Scenario) -> None:
        async with arbitrated(threads_cluster) as turns:
            await scenario(turns)

    return lambda scenario: threads_cluster.sync(run, scenario)


@pytest.fixture
def play_with_losses() -> Play:
    """The same, on workers of its own: ``turns.lose(0)`` ends one."""

    async def run(scenario: Scenario) -> None:
        async with (
            LocalCluster(n_workers=2, processes=False, asynchronous=True, dashboard_address=":0") as cluster,
            arbitrated(cluster) as turns,
        ):
            await scenario(turns)

    return lambda scenario: asyncio.run(run(scenario))


# Turns


def test_places_are_given_all_or_none(play: Play) -> None:
    async def scenario(turns: Turns) -> None:
        assert await turns.granted("a", [0])
        assert not await turns.granted("all", [0, 1, 2])
        assert (await turns.acquire("other", [1]))["waiting_for"][0]["gang"] == "all"
        await turns.release("a")
        assert (await turns.acquire("all", [0, 1, 2]))["granted"] == turns.workers

    play(scenario)


def test_turns_come_in_the_order_asked(play: Play) -> None:
    async def scenario(turns: Turns) -> None:
        assert await turns.granted("first")
        order: list[str] = []

        async def take_a_turn(name: str) -> None:
            assert "granted" in await turns.acquire(name, wait=30)
            order.append(name)
            await turns.release(name)

        waiting = []
        for number, name in enumerate(("second", "third", "fourth")):
            waiting.append(asyncio.ensure_future(take_a_turn(name)))
            await turns.queued(number + 2)
        await turns.release("first")
        await asyncio.gather(*waiting)
        assert order == ["second", "third", "fourth"]

    play(scenario)


def test_who_waits_is_told_for_whom(play: Play) -> None:
    async def scenario(turns: Turns) -> None:
        await turns.acquire("runs", [0, 1])
        await turns.acquire("queues", [1, 2])
        answer = await turns.acquire("asks", [2])
        assert answer == {
            "waiting_for": [
                {"gang": "queues", "label": "gang queues", "client": turns.client.id, "workers": [turns.workers[2]],
                 "running": False},
            ]
        }  # fmt: skip
        ahead = (await turns.acquire("queues", [1, 2]))["waiting_for"]
        assert [(who["gang"], who["running"], who["workers"]) for who in ahead] == [("runs", True, [turns.workers[1]])]

    play(scenario)


def test_nobody_overtakes_on_a_worker_that_others_wait_for(play: Play) -> None:
    async def scenario(turns: Turns) -> None:
        await turns.acquire("small", [0])
        assert not await turns.granted("large", [0, 1])
        assert not await turns.granted("overtakes", [1])
        assert await turns.granted("elsewhere", [2])
        await turns.release("small")
        assert await turns.granted("large", [0, 1])
        assert not await turns.granted("overtakes", [1])
        await turns.release("large")
        assert await turns.granted("overtakes", [1])

    play(scenario)


def test_a_gang_takes_the_workers_that_are_free_among_more(play: Play) -> None:
    async def scenario(turns: Turns) -> None:
        await turns.acquire("one", [1])
        answer = await turns.acquire("two of three", [0, 1, 2], places=2)
        assert answer == {"granted": [turns.workers[0], turns.workers[2]]}

    play(scenario)


def test_sharing_gangs_overlap_and_exclusive_ones_do_not(play: Play) -> None:
    async def scenario(turns: Turns) -> None:
        assert await turns.granted("shares", [0, 1], exclusive=False)
        assert await turns.granted("shares too", [0, 1], exclusive=False)
        assert not await turns.granted("alone", [1])
        assert not await turns.granted("came later", [1], exclusive=False)
        await turns.release("shares")
        assert not await turns.granted("alone", [1])
        await turns.release("shares too")
        assert await turns.granted("alone", [1])
        assert not await turns.granted("came later", [1], exclusive=False)

    play(scenario)


def test_a_client_that_is_gone_frees_its_places_and_leaves_the_queue(play: Play, threads_cluster: LocalCluster) -> None:
    async def scenario(turns: Turns) -> None:
        async with Client(threads_cluster.scheduler_address, asynchronous=True) as doomed:
            theirs = Turns(doomed, threads_cluster)
            assert await theirs.granted("held", [0])
            assert not await theirs.granted("queued", [0])
            next_in_line = asyncio.ensure_future(turns.acquire("next", [0], wait=30))
            await turns.queued(3)
        assert "granted" in await next_in_line
        assert await turns.gangs() == ["next"]

    play(scenario)


def test_a_client_the_scheduler_does_not_know_gets_no_place(play: Play) -> None:
    async def scenario(turns: Turns) -> None:
        answer = await turns.acquire("ghost", client="client-of-yesterday")
        assert answer == {"lacking": [], "reason": "the client is gone"}

    play(scenario)


# Members


def test_a_token_is_accepted_once_from_its_own_worker(play: Play) -> None:
    async def scenario(turns: Turns) -> None:
        await turns.acquire("g", [0, 1])
        assert await turns.present("g", 0, worker=turns.workers[1]) == {
            "refused": f"its place is on {turns.workers[0]}"
        }
        assert await turns.present("g", 0) == {}
        assert await turns.present("g", 0) == {"refused": "it has run already"}
        assert await turns.present("g", 1, attempt=2) == {"refused": "its gang has ended"}
        assert await turns.present("unknown", 0) == {"refused": "its gang has ended"}
        turns.leave("g", 0)

    play(scenario)


def test_a_token_is_refused_before_the_turn_and_after_the_end(play: Play) -> None:
    async def scenario(turns: Turns) -> None:
        await turns.acquire("g", [0])
        await turns.acquire("later", [0])
        assert await turns.present("later", 0) == {"refused": "its gang has ended"}
        assert await turns.settle("g") == {"outcomes": [], "stuck": [], "absent": [0], "reasons": []}
        assert await turns.present("g", 0) == {"refused": "a member failed"}

    play(scenario)


def test_a_place_stays_taken_until_its_member_has_left(play: Play) -> None:
    async def scenario(turns: Turns) -> None:
        await turns.acquire("g", [0, 1])
        await turns.present("g", 0)
        await turns.release("g")
        assert await turns.granted("one", [1])
        assert not await turns.granted("zero", [0])
        # Another worker's word does not free it, nor does another attempt's.
        turns.leave("g", rank=0, worker=turns.workers[1])
        turns.leave("g", rank=0, attempt=2)
        assert not await turns.granted("zero", [0])
        turns.leave("g", rank=0)
        assert await turns.granted("zero", [0])

    play(scenario)


def test_a_failure_asks_the_others_to_stop_and_tells_who_left_how_in_that_order(play: Play) -> None:
    async def scenario(turns: Turns) -> None:
        await turns.acquire("g")
        for rank in range(3):
            await turns.present("g", rank)
        settled = asyncio.ensure_future(turns.settle("g"))
        while len(turns.stopped) < 3:
            await asyncio.sleep(0)
        for rank, outcome in ((2, "collateral"), (0, "failed"), (1, "finished")):
            turns.leave("g", rank, outcome=outcome)
        assert await settled == {
            "outcomes": [(2, "collateral"), (0, "failed"), (1, "finished")],
            "stuck": [],
            "absent": [],
            "reasons": [],
        }

    play(scenario)


def test_what_a_member_said_first_of_its_end_holds_and_its_place_is_taken_until_it_leaves(play: Play) -> None:
    async def scenario(turns: Turns) -> None:
        await turns.acquire("g", [0, 1])
        for rank in range(2):
            await turns.present("g", rank)
        turns.leave("g", 1, outcome="failed", left=False)
        turns.leave("g", 0, outcome="collateral")
        assert not await turns.granted("one", [1])
        turns.leave("g", 1, outcome="late")
        assert (await turns.settle("g"))["outcomes"] == [(1, "failed"), (0, "collateral")]
        assert await turns.granted("one", [1])

    play(scenario)


def test_settling_does_not_wait_for_ever_and_says_who_is_left(play: Play) -> None:
    async def scenario(turns: Turns) -> None:
        await turns.acquire("g", [0, 1], stop_timeout=0.05)
        await turns.present("g", 0)
        await turns.present("g", 1)
        turns.leave("g", 1)
        settled = await turns.settle("g")
        assert settled["outcomes"] == [(1, "finished")]
        assert settled["stuck"] == [0]
        assert "had not ended after 0.05 s, and has no nanny" in dict(settled["reasons"])[0]
        turns.leave("g", 0)

    play(scenario)


def test_members_gather_what_all_say_by_rank(play: Play) -> None:
    async def scenario(turns: Turns) -> None:
        await turns.acquire("g")
        for step in (1, 2):
            answers = await asyncio.gather(
                *(
                    turns.ask("exchange", "g", rank, step=step, payload=f"{step}-{rank}", timeout=30)
                    for rank in (2, 0, 1)
                )
            )
            assert answers == [{"payloads": [f"{step}-0", f"{step}-1", f"{step}-2"]}] * 3

    play(scenario)


def test_what_was_exchanged_does_not_stay_on_the_scheduler(play: Play) -> None:
    async def scenario(turns: Turns) -> None:
        await turns.acquire("g", [0])
        for step in range(3):
            await turns.ask("exchange", "g", step=step, payload=b"x" * 1000, timeout=30)
        assert turns.scheduler.plugins[OPERATION].gangs["g"].payloads == {}

    play(scenario)


def test_an_exchange_names_who_has_not_come(play: Play) -> None:
    async def scenario(turns: Turns) -> None:
        await turns.acquire("g")
        answer = await turns.ask("exchange", "g", 1, step=1, payload=None, timeout=0.01)
        assert answer == {"ended": "", "missing": [0, 2]}

    play(scenario)


def test_an_exchange_ends_with_its_gang(play: Play) -> None:
    async def scenario(turns: Turns) -> None:
        await turns.acquire("g", [0, 1])
        await turns.present("g", 0)
        waits = asyncio.ensure_future(turns.ask("exchange", "g", 0, step=1, payload=None, timeout=30))
        await turns.ask("exchange", "g", 0, step=2, payload=None, timeout=0)  # the first has arrived too
        settled = asyncio.ensure_future(turns.settle("g"))
        assert (await waits)["ended"] == "a member failed"
        assert await turns.ask("exchange", "g", 0, attempt=2, step=1, payload=None, timeout=30) == {
            "ended": "its gang has ended"
        }
        turns.leave("g", 0)
        await settled

    play(scenario)


# Losses


def test_a_lost_worker_ends_its_gang_and_the_client_hears_of_it(play_with_losses: Play) -> None:
    async def scenario(turns: Turns) -> None:
        heard: asyncio.Queue[Any] = asyncio.Queue()
        turns.client.subscribe_topic("topic-g", heard.put_nowait)
        await turns.acquire("g", [0, 1])
        await turns.present("g", 0)
        await turns.present("g", 1)
        await turns.lose(0)
        event = (await heard.get())[1]
        assert (event["event"], event["gang"], event["attempt"], event["rank"]) == ("Lost", "g", 1, 0)
        turns.leave("g", 1, outcome="collateral")
        assert (await turns.settle("g"))["outcomes"] == [(0, "lost"), (1, "collateral")]

    play_with_losses(scenario)


@pytest.mark.parametrize(
    ("before", "after"),
    [("finished", "finished, then lost"), ("failed", "failed"), ("collateral", "lost")],
)
def test_a_worker_lost_after_its_member_left(play_with_losses: Play, before: str, after: str) -> None:
    async def scenario(turns: Turns) -> None:
        await turns.acquire("g", [0, 1])
        await turns.present("g", 0)
        await turns.present("g", 1)
        turns.leave("g", 0, outcome=before)
        await turns.lose(0)
        turns.leave("g", 1, outcome="collateral")
        assert dict((await turns.settle("g"))["outcomes"])[0] == after

    play_with_losses(scenario)


def test_who_waits_for_a_worker_that_is_lost_is_told_so(play_with_losses: Play) -> None:
    async def scenario(turns: Turns) -> None:
        await turns.acquire("holds", [0, 1])
        waits = asyncio.ensure_future(turns.acquire("waits", [0, 1], wait=30))
        may_choose = asyncio.ensure_future(turns.acquire("may choose", [0, 1], places=1, wait=30))
        await turns.queued(3)
        await turns.lose(0)
        assert (await waits)["lacking"] == [turns.workers[0]]
        assert await may_choose == {"granted": [turns.workers[1]]}

    play_with_losses(scenario)


def test_a_worker_that_joins_is_left_out_and_the_client_hears_of_it() -> None:
    async def scenario() -> None:
        async with (
            LocalCluster(n_workers=1, processes=False, asynchronous=True, dashboard_address=":0") as cluster,
            arbitrated(cluster) as turns,
        ):
            heard: asyncio.Queue[Any] = asyncio.Queue()
            turns.client.subscribe_topic("topic-g", heard.put_nowait)
            await turns.acquire("g", [0])
            cluster.scale(2)
            event = (await heard.get())[1]
            newcomer = next(worker for worker in cluster.scheduler.workers if worker not in turns.workers)
            assert event["text"] == f"goes on with its 1 workers; {newcomer}, which has just joined, is left out"

    asyncio.run(scenario())


_CLIENT_TO_BE_KILLED = """
import sys
from dataclasses import asdict
from distributed import Client
from dask_bridges import turns
from dask_bridges.config import Deadlines
client = Client(sys.argv[1])
client.sync(turns.register, client)
answer = client.sync(turns.ask, client, "acquire", gang="doomed", client=client.id, wait=0, label="doomed", attempt=1,
                     exclusive=True, candidates=[sys.argv[2]], places=1, topic="doomed",
                     names=["member 0"], replaceable=[], deadlines=asdict(Deadlines.configured()))
print("granted" in answer, flush=True)
sys.stdin.read()
"""


@pytest.mark.cluster
def test_a_killed_client_frees_its_place() -> None:
    async def scenario() -> None:
        async with (
            LocalCluster(
                n_workers=1, processes=False, protocol="tcp", asynchronous=True, dashboard_address=":0"
            ) as cluster,
            arbitrated(cluster) as turns,
        ):
            command = [sys.executable, "-c", _CLIENT_TO_BE_KILLED, cluster.scheduler_address, turns.workers[0]]
            doomed = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert doomed.stdout is not None
            assert (await asyncio.to_thread(doomed.stdout.readline)).strip() == "True"
            waits = asyncio.ensure_future(turns.acquire("next", [0], wait=30))
            await turns.queued(2)
            doomed.send_signal(signal.SIGKILL)
            assert "granted" in await waits
            doomed.communicate()

    asyncio.run(scenario())


# On the scheduler


def test_the_events_of_many_ended_gangs_do_not_fill_the_scheduler(play: Play) -> None:
    async def scenario(turns: Turns) -> None:
        async def a_gang(name: str) -> None:
            await turns.acquire(name, [0])
            await turns.client.log_event(f"topic-{name}", {"hello": name})
            await turns.release(name)

        await a_gang("old")
        assert len(await turns.client.get_events("topic-old")) == 1
        for number in range(KEPT_TOPICS):
            await a_gang(str(number))
        assert await turns.client.get_events("topic-old") == ()
        assert len(await turns.client.get_events("topic-0")) == 1

    play(scenario)


def test_a_scheduler_that_takes_no_plugins_is_a_placement_error() -> None:
    async def scenario() -> None:
        blocked = {"distributed.scheduler.blocked-handlers": ["register_scheduler_plugin"]}
        with dask.config.set(blocked):
            async with (
                LocalCluster(n_workers=0, processes=False, asynchronous=True, dashboard_address=":0") as cluster,
                Client(cluster, asynchronous=True) as client,
            ):
                with pytest.raises(PlacementError, match=r"refused the plugin .* distributed\.scheduler\.blocked-hand"):
                    await turns.register(client)

    asyncio.run(scenario())


def test_a_scheduler_that_comes_back_at_its_address_gets_the_arbiter_again() -> None:
    async def scenario() -> None:
        first = await Scheduler(host="127.0.0.1", port=0, dashboard_address=":0")
        async with Client(first.address, asynchronous=True) as client:
            await turns.register(client)
            await first.close()
            async with Scheduler(host="127.0.0.1", port=first.port, dashboard_address=":0") as second:
                while str(second.id) != client.scheduler_info().get("id"):
                    await asyncio.sleep(0)  # the client connects by itself
                with pytest.raises(ConnectionResetError, match="was restarted"):
                    await turns.ask(client, "status")
                await turns.register(client)
                assert not (await turns.ask(client, "status"))["gangs"]

    asyncio.run(scenario())


_BARE = """
import asyncio, sys
from distributed import Scheduler
from distributed.protocol.pickle import loads

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("dask_bridges"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())

async def main():
    arbiter = loads(sys.stdin.buffer.read())
    async with Scheduler(host="127.0.0.1", port=0, dashboard_address=":0") as scheduler:
        await scheduler.register_scheduler_plugin(arbiter, idempotent=True)
        print(await scheduler.handlers[arbiter.name]("status"), "dask_bridges" in sys.modules)

asyncio.run(main())
"""


def test_the_arbiter_runs_where_this_package_is_not_installed() -> None:
    run = subprocess.run([sys.executable, "-c", _BARE], input=dumps(Arbiter()), capture_output=True)
    assert run.stdout.decode().strip() == "{'gangs': []} False", run.stderr.decode()
