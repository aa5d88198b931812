"""Many gangs of several clients on few workers, while workers and a client are killed."""

import collections
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dask_bridges import turns
from dask_bridges.testing import command_line_cluster, leftovers

pytestmark = pytest.mark.cluster

WORKERS = 4

#: Runs gangs of three and four, one after the other, and prints a line of JSON for each.
CLIENT = """
import json, os, random, sys
from distributed import Client
from dask_bridges.errors import MemberLost, PlacementError
from dask_bridges.gang import Gang, GangPlan

def member(member, log):
    line = f"{member.gang} {member.attempt} {member.rank}\\n".encode()
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line)
    os.close(file)
    return member.exchange(member.rank)

if __name__ == "__main__":
    address, seed, count, log = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    dice = random.Random(seed)
    with Client(address) as client:
        done = 0
        while done < count:
            client.wait_for_workers(4, timeout=60)
            size = dice.choice([3, 4])
            workers = list(client.scheduler_info(n_workers=-1)["workers"])
            gang = Gang(client, GangPlan(f"client {seed}", member, [log] * size, workers))
            try:
                results = client.sync(gang.run)
                assert results == [list(range(size))] * size
                outcome = "finished"
            except (MemberLost, PlacementError) as error:
                outcome = "MemberLost" if isinstance(error, MemberLost) else "PlacementError"  # or a kind of these
            done += outcome != "PlacementError"
            print(json.dumps([gang.id, outcome]), flush=True)
"""


def _start(script: Path, address: str, seed: int, count: int, log: Path) -> subprocess.Popen[str]:
    arguments = [sys.executable, str(script), address, str(seed), str(count), str(log)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def _kill_some(client: Any, clients: list[subprocess.Popen[str]], dice: random.Random) -> None:
    """Read the clients' lines; after every few gangs of the first client kill a worker, and once the last client."""
    for number, _ in enumerate(clients[0].stdout or ()):
        if number == 2:
            clients[-1].kill()
        if number % 4 == 1:
            pids = list(client.run(os.getpid, on_error="ignore").values())
            if pids:
                os.kill(dice.choice(pids), signal.SIGKILL)


def _order_watcher() -> Any:
    """A function, sent by value, that has the scheduler note down how turns are given: how many, and who overtook."""

    def watch(dask_scheduler: Any) -> None:
        [arbiter] = [p for name, p in dask_scheduler.plugins.items() if name.startswith("dask_bridges_arbiter")]
        grant, dask_scheduler.bridges_order = arbiter.grant, (0, [])

        def watched() -> None:
            waiting = [gang for gang in arbiter.gangs.values() if not gang.workers and not gang.ending]
            grant()
            number, overtaken = dask_scheduler.bridges_order
            for place, gang in enumerate(waiting):
                number += bool(gang.workers)
                still = [other for other in waiting[:place] if not other.workers and not other.ending]
                if before := [other.gang for other in still if set(other.candidates) & set(gang.workers)]:
                    overtaken.append((gang.gang, before))
            dask_scheduler.bridges_order = number, overtaken

        arbiter.grant = watched

    return watch


@pytest.mark.parametrize(
    "gangs",
    [
        pytest.param(7, marks=pytest.mark.timeout(120)),
        pytest.param(170, marks=[pytest.mark.slow, pytest.mark.timeout(1500)]),
    ],
)
def test_all_gangs_end_none_runs_twice_and_nothing_is_left(tmp_path: Path, gangs: int) -> None:
    script, log = tmp_path / "client.py", tmp_path / "members.log"
    script.write_text(CLIENT)
    with command_line_cluster(workers=WORKERS, bare_scheduler=True) as cluster:
        client = cluster.client
        address = client.scheduler.address
        client.sync(turns.register, client)
        client.run_on_scheduler(_order_watcher())
        clients = [_start(script, address, seed, gangs, log) for seed in range(3)]
        try:
            _kill_some(client, clients, random.Random(gangs))
            outputs = [process.communicate(timeout=600)[0] for process in clients[1:]]
        finally:
            for process in clients:
                process.kill()
                process.wait()
        assert [process.returncode for process in clients[:2]] == [0, 0]
        assert clients[2].returncode == -signal.SIGKILL
        outcomes = collections.Counter(json.loads(line)[1] for line in outputs[0].splitlines())
        assert outcomes["finished"] + outcomes["MemberLost"] == gangs
        assert outcomes["finished"] >= 1
        ran = collections.Counter(log.read_text().split("\n"))
        assert [line for line, times in ran.items() if times > 1 and line] == []
        client.wait_for_workers(WORKERS, timeout=60)
        assert leftovers(client) == {}
        granted, overtaken = client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.bridges_order)
        assert granted >= gangs
        assert overtaken == []
