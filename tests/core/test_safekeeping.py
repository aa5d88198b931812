"""What members keep in their workers' memory: who finds it after a loss, and that it does not stay."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import pytest
from distributed import Client

from dask_bridges import MemberLost, safekeeping
from dask_bridges.gang import Gang, GangPlan
from dask_bridges.processes import ChildMember, run_in_child
from dask_bridges.task import WorkerMember

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(sys.platform != "linux", reason="child processes need Linux")]


def keeps_in_child(member: WorkerMember, payload: Any) -> Any:
    return run_in_child(member, keeps, payload)


def keeps(member: ChildMember, killed: int) -> None:
    """All keep two states, and one a third, with which its process dies."""
    for step in (1, 2):
        member.keep(step, {"step": step, "of": member.rank, "bytes": bytes(2**20)})
    member.exchange()
    if member.rank == killed:
        member.keep(3, {"step": 3, "of": member.rank, "bytes": bytes(2**20)})
        os.kill(os.getpid(), signal.SIGKILL)
    member.exchange()


def run(client: Client, killed: int = -1) -> Gang:
    workers = sorted(client.scheduler_info(n_workers=-1)["workers"])[:2]
    gang = Gang(client, GangPlan("gang", keeps_in_child, [killed] * 2, workers))
    if killed < 0:
        client.sync(gang.run)
    else:
        with pytest.raises(MemberLost, match=f"member {killed} was lost"):
            client.sync(gang.run)
    return gang


def kept(client: Client) -> list[Any]:
    return [key for some in client.run(lambda: list(safekeeping._kept)).values() for key in some]


@pytest.mark.parametrize(
    ("killed", "expected"),
    [pytest.param(1, {"step": 3, "of": 1}, id="newest"), pytest.param(-1, {"step": 2, "of": 0}, id="lowest rank")],
)
def test_the_newest_state_is_handed_over_once(bridges_client: Client, killed: int, expected: dict[str, int]) -> None:
    gang = run(bridges_client, killed)
    workers = [*gang.plan.workers, "tcp://127.0.0.1:9"]  # one that is gone
    state = bridges_client.sync(safekeeping.collect, bridges_client, gang.id, workers)
    assert {name: state[name] for name in expected} == expected
    assert kept(bridges_client) == []
    assert bridges_client.sync(safekeeping.collect, bridges_client, gang.id, workers) is None


def test_what_nobody_wants_is_forgotten(bridges_client: Client) -> None:
    gang = run(bridges_client)
    assert len(kept(bridges_client)) == 2
    assert bridges_client.sync(safekeeping.collect, bridges_client, gang.id, gang.plan.workers, wanted=False) is None
    assert kept(bridges_client) == []


def test_what_no_client_asks_for_goes_by_itself(bridges_client: Client) -> None:
    def leave_for(seconds: float) -> None:
        safekeeping.LEFT_FOR = seconds

    bridges_client.run(leave_for, 0.01)
    try:
        run(bridges_client)
        deadline = time.monotonic() + 10
        while found := kept(bridges_client):
            assert time.monotonic() < deadline, found
    finally:
        bridges_client.run(leave_for, safekeeping.LEFT_FOR)


def test_a_frozen_worker_does_not_keep_others_from_answering(
    bridges_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    gang = run(bridges_client)
    frozen = bridges_client.run(os.getpid, workers=[gang.plan.workers[0]]).popitem()[1]
    monkeypatch.setattr(safekeeping._ask, "__kwdefaults__", {"within": 2.0})
    os.kill(frozen, signal.SIGSTOP)
    try:
        state = bridges_client.sync(safekeeping.collect, bridges_client, gang.id, gang.plan.workers)
    finally:
        os.kill(frozen, signal.SIGCONT)
    assert (state["step"], state["of"]) == (2, 1)
    bridges_client.sync(safekeeping.collect, bridges_client, gang.id, gang.plan.workers, wanted=False)
    assert kept(bridges_client) == []
