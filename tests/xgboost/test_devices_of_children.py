"""Ranks in child processes, where workers own no GPUs of their own. XGBoost finds none here, and uses CPUs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import xgboost as xgb
from distributed import Client
from tests.core.devices_at_work import client_of, cluster_with_devices, held, see, workers_of
from tests.core.jobs_at_work import Flags, claim, gone, hold, wait_until
from tests.xgboost.ranks_at_work import Diary, Dies, fail, go_on, wait

import dask_bridges
import dask_xgboost
from dask_bridges import MemberFailed, MemberLost, PlacementError
from dask_bridges.devices import leases_here
from dask_bridges.events import Event, Log, Metrics, Progress
from dask_bridges.jobs import DevicePool
from dask_bridges.processes import folders, spool
from dask_bridges.testing import footprint
from dask_bridges.testing.traces import wait_until_same

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(sys.platform != "linux", reason="ranks live in child processes, which need Linux"),
    pytest.mark.skipif(
        xgb.build_info().get("USE_CUDA", False) and Path("/dev/nvidiactl").exists(),
        reason="the devices of these tests are not there, and XGBoost would look for them",
    ),
]

ROWS, COLUMNS, CHUNK, ROUNDS, EVERY = 8000, 10, 2000, 7, 3
PARAMS = {"objective": "binary:logistic", "max_depth": 3, "subsample": 0.5, "verbosity": 2}

CLUSTER = {"resources": None}


@pytest.fixture
def shared(client: Client) -> Iterator[Client]:
    """A client of two workers that see the same two devices."""
    see(client, "0,1", "0,1")
    yield client
    see(client, None, None)


def data() -> tuple[Any, Any]:
    """Rows whose cuts depend on which of them are together, in parts that go through the spool."""
    X = np.random.default_rng(4).normal(size=(ROWS, COLUMNS)).astype("float32")
    y = (X[:, 0] * X[:, 1] > 0).astype("float32")
    return da.from_array(X, chunks=(CHUNK, COLUMNS)), da.from_array(y, chunks=CHUNK)


class Training:
    """Trainings on the same partitions, which stay where they are."""

    def __init__(self, client: Client, flags: Flags) -> None:
        self.client, self.flags = client, flags
        self.X = dask_xgboost.DMatrix(client, *data())

    def run(self, deed: Any = go_on, device: str = "cuda", **options: Any) -> tuple[xgb.Booster, Any, list[int]]:
        """The booster, the history, and the rounds that rank 0 remembers."""
        history: dict[str, Any] = {}
        diary = Diary(self.flags, deed)
        booster = dask_xgboost.train(
            self.client, {**PARAMS, "device": device}, self.X, num_boost_round=ROUNDS, checkpoint_every=EVERY,
            evals=[(self.X, "train")], evals_result=history, callbacks=[diary], progress=False, **options,
        )  # fmt: skip
        return booster, history, diary.rounds

    @contextlib.contextmanager
    def meanwhile(self, ranks: int = 2, **options: Any) -> Iterator[Any]:
        """A training that goes on as long as the block: of each rank, its device and its process."""
        with ThreadPoolExecutor(1) as threads:
            training = threads.submit(self.run, wait, **options)
            try:
                told = [self.flags.wait(f"rank-{rank}").split() for rank in range(ranks)]
                yield {device: int(pid) for device, pid in told}
            finally:
                self.flags.set("go")
            training.result(timeout=60)

    def as_on_cpus(self) -> tuple[xgb.Booster, Any, list[int]]:
        """What comes of it in the workers' own processes."""
        see(self.client, "", "")
        try:
            return self.run(device="cpu")
        finally:
            see(self.client, "0,1", "0,1")


def assert_same(ours: tuple[xgb.Booster, Any, list[int]], theirs: tuple[xgb.Booster, Any, list[int]]) -> None:
    """Bit for bit."""
    assert ours[0].get_dump() == theirs[0].get_dump()
    assert ours[1:] == theirs[1:]
    assert ours[2] == [*range(ROUNDS)]


def assert_went_on(told: list[Event]) -> None:
    """The second attempt began after the last round that was kept."""
    rounds = [event.done for event in told if isinstance(event, Progress) and event.attempt == 2]
    assert rounds == [*range(EVERY + 1, ROUNDS + 1)]


def spooled(gang: str) -> list[Path]:
    """What the members of a gang have in memory as files."""
    return list(folders.home(spool.MEMORY).glob(f"*{gang}*/*/*"))


# Who trains, and where


def test_the_model_is_that_of_the_workers_own_processes(shared: Client, flags: Flags) -> None:
    training, told = Training(shared, flags), list[Event]()
    assert_same(training.run(listen=told.append), training.as_on_cpus())
    assert held(shared) == {}
    warned = {event.rank for event in told if isinstance(event, Log) and "changed from GPU to CPU" in event.text}
    assert warned == {0, 1}  # which XGBoost does in the processes that were told to use a GPU
    assert [event.done for event in told if isinstance(event, Progress)] == [*range(1, ROUNDS + 1)]
    assert [event.step for event in told if isinstance(event, Metrics)] == [*range(ROUNDS)]


@pytest.mark.parametrize("visible", [("0,1", "0,1"), pytest.param(("0,1", "0"), marks=pytest.mark.slow)])
def test_each_rank_has_a_device_and_a_process_of_its_own(
    client: Client, flags: Flags, visible: tuple[str, str]
) -> None:
    see(client, *visible)
    with Training(client, flags).meanwhile() as ranks:
        assert {device: holder[:-1] for device, holder in held(client).items()} == dict.fromkeys(
            "01", "XGBoost training member "
        )
        assert ranks.keys() == {"0", "1"}
        assert not set(ranks.values()) & set(client.run(os.getpid).values())
        (gang,) = dask_bridges.gangs(client)
        wait_until(lambda: not spooled(gang.id), 10, "partitions that are binned are still in the spool")
    assert held(client) == {}
    wait_until(lambda: all(map(gone, ranks.values())), 10, "a rank is left")


@pytest.mark.slow
def test_as_many_workers_take_part_as_there_are_devices(client: Client, flags: Flags) -> None:
    see(client, "0", "0")
    with Training(client, flags).meanwhile(ranks=1) as ranks:
        assert held(client) == {"0": "XGBoost training member 0"}
        assert ranks.keys() == {"0"}
        assert (flags.folder / "rank-1").exists() is False


def test_workers_that_are_named_each_need_a_device(client: Client, flags: Flags) -> None:
    see(client, "0", "0")
    first, second = workers_of(client)
    with pytest.raises(PlacementError, match=rf"none for {second}: .* Name those that have one, {first}, by workers="):
        Training(client, flags).run(workers=[first, second])


@pytest.mark.slow
def test_a_cross_validation_is_that_of_the_workers_own_processes(shared: Client) -> None:
    X = dask_xgboost.DMatrix(shared, *data())

    def cv(device: str) -> Any:
        return dask_xgboost.cv(
            shared, {"objective": "binary:logistic", "device": device}, X, num_boost_round=3, as_pandas=False
        )

    ours = cv("cuda")
    assert ours == cv("cpu")


# Beside jobs


def test_jobs_never_get_the_device_of_a_rank(shared: Client, flags: Flags) -> None:
    with DevicePool(shared, preload=()) as pool:
        with Training(shared, flags).meanwhile(ranks=1, n_workers=1, exclusive=False) as ranks:
            assert set(shared.gather(pool.map(claim, [flags] * 8))) == {"0", "1"} - ranks.keys()
            both = pool.submit(claim, flags, gpus=2)
        assert both.result(timeout=60) == "0,1"


def test_ranks_wait_for_the_devices_of_a_job_and_have_them_before_a_later_one(shared: Client, flags: Flags) -> None:
    training, options = Training(shared, flags), {"exclusive": False}
    with DevicePool(shared, preload=()) as pool, ThreadPoolExecutor(1) as threads:
        job = pool.submit(hold, flags, "job", "end", gpus=2)
        flags.wait("job")
        with pytest.raises(PlacementError, match=rf"no 1 of its 2 devices within 1 s: 0 is held.*: job {job.key}"):
            training.run(timeout="1s", **options)
        assert not list(flags.folder.glob("rank-*"))
        result = threads.submit(training.run, **options)
        wait_until(lambda: sum(shared.run(lambda: len(leases_here()._requests)).values()) == 2, 30, "nobody waits")
        later = pool.submit(lambda: sorted(path.name for path in flags.folder.glob("rank-*")), gpus=2)
        flags.set("end")
        assert result.result(timeout=60)[2] == [*range(ROUNDS)]
        assert later.result(timeout=60) == ["rank-0", "rank-1"]


# How it ends


def test_a_training_ends_after_a_round_where_somebody_asks_for_it(shared: Client, flags: Flags) -> None:
    training = Training(shared, flags)
    with ThreadPoolExecutor(1) as threads:
        result = threads.submit(training.run, wait)
        flags.wait("rank-0")
        (gang,) = dask_bridges.gangs(shared)
        gang.stop()
        flags.set("go")
        booster, history, rounds = result.result(timeout=60)
    assert 1 <= booster.num_boosted_rounds() < ROUNDS
    assert len(history["train"]["logloss"]) == len(rounds) == booster.num_boosted_rounds()


def test_what_the_user_raises_is_the_cause(shared: Client, flags: Flags) -> None:
    training = Training(shared, flags)
    before = footprint(shared)
    with pytest.raises(MemberFailed, match=r"member 1 on tcp://.* raised RuntimeError: deliberate") as caught:
        training.run(fail)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert held(shared) == {}
    wait_until_same(shared, before, timeout=10)


def test_a_killed_rank_is_lost_and_the_training_goes_on_from_what_was_kept(shared: Client, flags: Flags) -> None:
    training = Training(shared, flags)
    oracle, before = training.as_on_cpus(), footprint(shared)
    with pytest.raises(MemberLost, match=r"member 1 was lost, with its process \d+ on tcp://.*killed from outside"):
        training.run(Dies(EVERY + 1), max_restarts=0)
    (flags.folder / "died").unlink()
    told: list[Event] = []
    assert_same(training.run(Dies(EVERY + 1), listen=told.append), oracle)
    assert_went_on(told)
    assert held(shared) == {}
    wait_until_same(shared, before, timeout=10)


@pytest.fixture
def doomed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of workers of which one is killed, that see the same two devices."""
    with (
        cluster_with_devices(tmp_path_factory.mktemp("devices"), resources=None) as cluster,
        client_of(cluster) as client,
    ):
        see(client, "0,1", "0,1")
        yield client


@pytest.mark.slow
def test_ranks_go_on_in_children_when_a_worker_is_killed(doomed: Client, flags: Flags) -> None:
    training = Training(doomed, flags)
    oracle = training.as_on_cpus()
    told: list[Event] = []
    assert_same(training.run(Dies(EVERY + 1, with_worker=True), listen=told.append), oracle)
    assert_went_on(told)
    assert gone(int(flags.wait("died")))
    pids = {int(path.read_text().split()[1]) for path in flags.folder.glob("rank-*")}
    assert not pids & set(doomed.run(os.getpid).values())
    assert [file for gang in {event.gang for event in told} for file in spooled(gang)] == []
    doomed.wait_for_workers(2, timeout=60)


CLIENT = """
import sys
from pathlib import Path
from distributed import Client
from tests.core.jobs_at_work import Flags
from tests.xgboost.ranks_at_work import wait
from tests.xgboost.test_devices_of_children import Training

if __name__ == "__main__":
    with Client(sys.argv[1]) as client:
        Training(client, Flags(Path(sys.argv[2]))).run(wait)
"""


@pytest.mark.slow
def test_a_client_is_killed_and_nothing_of_its_training_is_left(shared: Client, flags: Flags, tmp_path: Path) -> None:
    Training(shared, flags).run()  # what is imported stays
    before, script, of_client = footprint(shared), tmp_path / "client.py", Flags(tmp_path / "client")
    of_client.folder.mkdir()
    script.write_text(CLIENT)
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    command = [sys.executable, str(script), shared.scheduler.address, str(of_client.folder)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})
    try:
        pids = [int(of_client.wait(f"rank-{rank}").split()[1]) for rank in range(2)]
        (gang,) = dask_bridges.gangs(shared)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: all(map(gone, pids)), 10, "a rank outlives its client")
    wait_until(lambda: held(shared) == {}, 10, "a device is held")
    wait_until_same(shared, before, timeout=10)
    assert list(folders.home(spool.MEMORY).glob(f"*{gang.id}*")) == []
