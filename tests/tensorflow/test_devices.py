"""Tasks of a TensorFlow cluster on devices of their own, as long as it lives; other tasks see none."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from distributed import Client
from tests.core.devices_at_work import held
from tests.core.jobs_at_work import Flags, hold

from dask_bridges import PlacementError
from dask_bridges.jobs import DevicePool

pytestmark = pytest.mark.cluster

Start = Callable[..., Any]


def visible() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def seen(cluster: Any, role: str) -> list[str | None]:
    return list(cluster.client.gather(cluster.run(role, visible)))


@pytest.mark.slow
def test_a_roles_tasks_have_devices_of_their_own_and_other_tasks_see_none(start: Start, client: Client) -> None:
    with start(client, ps=1, worker=2, gpus={"worker": 1}, share=True) as cluster:
        first, second = seen(cluster, "worker")
        assert {first, second} == {"0", "1"}
        assert held(client) == {
            first: "TensorFlow cluster worker:0",
            second: "TensorFlow cluster worker:1",
        }
        assert seen(cluster, "ps") + seen(cluster, "chief") == ["", ""]
    assert held(client) == {}


@pytest.mark.slow
def test_a_task_keeps_its_device_while_its_process_is_started_again(
    start: Start, client: Client, flags: Flags, watch: Any
) -> None:
    with DevicePool(client, preload=()) as pool, start(client, worker=2, gpus=1) as cluster:
        before = seen(cluster, "worker")
        job = pool.submit(hold, flags, "job", "go")
        os.kill(watch(cluster).row("worker:0")["pid"], signal.SIGKILL)
        watch(cluster).until_back("worker:0")
        cluster.restart("worker", 1)
        assert seen(cluster, "worker") == before
        assert sorted(before) == ["0", "1"]
        assert not (flags.folder / "job").exists()
        cluster.close()
        flags.set("go")
        assert job.result(timeout=60) in before


@pytest.mark.slow
def test_without_asking_a_task_sees_what_its_dask_worker_sees(start: Start, client: Client) -> None:
    with start(client, worker=1) as cluster:
        assert seen(cluster, "worker") == [None]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpus": {"gardener": 1}}, "no task 'gardener' was asked for, but ps, worker"),
        ({"gpus": {"worker": 0}}, r"gpus\['worker'\]=0: pass how many devices"),
        ({"gpus": {"worker": 0.5}}, r"gpus\['worker'\]=0\.5"),
        ({"gpus": True}, "gpus=True"),
        ({"gpus": 1, "environment": {"CUDA_VISIBLE_DEVICES": "0"}}, "CUDA_VISIBLE_DEVICES in environment="),
    ],
)
def test_what_makes_no_sense_is_refused(start: Start, client: Client, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        start(client, ps=1, worker=1, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"worker": 1, "gpus": 3},
            r"gpus=3 is 3 for worker:0, .*by itself, and .* has 2\. Ask for fewer, or .*share",
        ),
        ({"worker": 3, "share": True, "gpus": {"worker": 1}}, r"1 for worker:2, .* has 2\. Ask for fewer"),
        ({"worker": 3, "gpus": {"worker": 1}}, r"worker=3 is 3 tasks, one a Dask worker, and there are 2"),
    ],
)
def test_more_than_there_is_is_refused_with_what_there_is(
    start: Start, client: Client, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(PlacementError, match=said):
        start(client, **options)


@pytest.mark.slow
def test_who_holds_the_devices_is_told_where_they_do_not_become_free(
    start: Start, client: Client, flags: Flags
) -> None:
    with DevicePool(client, preload=()) as pool:
        job = pool.submit(hold, flags, "job", "go", gpus=2)
        flags.wait("job")
        with pytest.raises(
            PlacementError, match=rf"worker:0 had no 1 of its 2 devices within 1 s: 0 is held.*: job {job.key}; 1 is"
        ):
            start(client, worker=1, gpus=1, timeout="1s")
        flags.set("go")
        assert job.result() == "0,1"
