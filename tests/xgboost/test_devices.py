"""Ranks on the GPUs that their workers own: who has one, and who waits. XGBoost finds none here, and uses CPUs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import xgboost as xgb
from distributed import Client
from tests.core import devices_at_work
from tests.core.devices_at_work import held, see, workers_of
from tests.core.jobs_at_work import Flags, claim, hold

import dask_xgboost
from dask_bridges import PlacementError
from dask_bridges.jobs import DevicePool

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        xgb.build_info().get("USE_CUDA", False) and Path("/dev/nvidiactl").exists(),
        reason="the devices of these tests are not there, and XGBoost would look for them",
    ),
]

ROWS = 240


#: Workers that use memory of any device which they ask for, as after a training.
CLUSTER = {"probe": "used_by_who_asks", "resources": None}


@pytest.fixture
def cuda(client: Client) -> Client:
    """A client of two workers that see both devices, each its own first, as dask-cuda starts them."""
    see(client, "0,1", "1,0")
    return client


class Waits(xgb.callback.TrainingCallback):  # type: ignore[misc]
    """Tells which device is its worker's own, and waits after the first round until it may go on."""

    def __init__(self, flags: Flags) -> None:
        self.flags = flags

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        self.flags.set(f"trains-on-{os.environ['CUDA_VISIBLE_DEVICES'][0]}", str(os.getpid()))
        self.flags.wait("go")
        return False


def train(client: Client, **options: Any) -> Any:
    X = np.random.default_rng(3).integers(0, 9, size=(ROWS, 3)).astype("float32")
    data = da.from_array(X, chunks=(60, 3)), da.from_array(X[:, 0], chunks=60)
    params = {"device": "cuda", "max_depth": 2, **options.pop("params", {})}
    return dask_xgboost.train(client, params, *data, num_boost_round=2, progress=False, **options)


@contextlib.contextmanager
def meanwhile(client: Client, flags: Flags, devices: str, **options: Any) -> Iterator[None]:
    """A training that goes on as long as the block, on these devices."""
    with ThreadPoolExecutor(1) as threads:
        training = threads.submit(train, client, callbacks=[Waits(flags)], **options)
        for device in devices:
            flags.wait(f"trains-on-{device}")
        try:
            yield
        finally:
            flags.set("go")
        assert training.result(timeout=60).num_boosted_rounds() == 2


# Who trains


def test_each_rank_has_the_device_that_its_worker_owns(cuda: Client, flags: Flags) -> None:
    with meanwhile(cuda, flags, "01"):
        assert {int(flags.wait(f"trains-on-{device}")) for device in "01"} == set(cuda.run(os.getpid).values())
        assert {device: holder[:-1] for device, holder in held(cuda).items()} == dict.fromkeys(
            "01", "XGBoost training member "
        )
    assert held(cuda) == {}


def test_training_on_cpus_leases_nothing(cuda: Client, flags: Flags) -> None:
    with meanwhile(cuda, flags, "01", params={"device": "cpu"}):
        assert held(cuda) == {}


def test_workers_that_own_none_take_no_part(client: Client, flags: Flags) -> None:
    see(client, "", "0")
    with meanwhile(client, flags, "0"):
        assert held(client) == {"0": "XGBoost training member 0"}


@pytest.mark.parametrize(
    ("visible", "named", "why"),
    [
        ((None, None), False, r"needs 1 of the devices .*none of the 2 workers has one: neither NVML .*CUDA_VISIBLE_"),
        (("", "0"), True, r"a GPU for each of the workers named, and there is none for tcp:.*Name those .*tcp:"),
    ],
)
def test_where_workers_see_none_it_is_told_what_to_do(
    client: Client, flags: Flags, visible: tuple[str | None, ...], named: bool, why: str
) -> None:
    see(client, *visible)
    with pytest.raises(PlacementError, match=why):
        train(client, workers=workers_of(client) if named else None)


def test_one_of_those_that_have_the_same_device_can_be_named(client: Client, flags: Flags) -> None:
    see(client, "0", "0")
    with meanwhile(client, flags, "0", workers=workers_of(client)[1:]):
        assert held(client) == {"0": "XGBoost training member 0"}


@pytest.mark.parametrize("device", ["cuda:1", "gpu:0"])
def test_a_device_is_not_chosen_by_its_number(client: Client, device: str) -> None:
    with pytest.raises(ValueError, match=f"device='{device}': each rank has one GPU"):
        train(client, params={"device": device})


class UsesMemory(xgb.callback.TrainingCallback):  # type: ignore[misc]
    def after_training(self, model: Any) -> Any:
        devices_at_work.use_unseen(2**30)
        return model


def test_what_a_training_leaves_of_a_device_in_use_does_not_keep_the_next_one_waiting(cuda: Client) -> None:
    try:
        train(cuda, callbacks=[UsesMemory()])
        assert train(cuda, timeout="3s").num_boosted_rounds() == 2
    finally:
        cuda.run(devices_at_work.use_unseen, 0)


# Beside jobs


def test_jobs_never_get_the_device_of_a_rank(cuda: Client, flags: Flags) -> None:
    with DevicePool(cuda, preload=()) as pool:
        with meanwhile(cuda, flags, "1", workers=workers_of(cuda)[1:], exclusive=False):
            assert set(cuda.gather(pool.map(claim, [flags] * 8))) == {"0"}
            both = pool.submit(claim, flags, gpus=2)
        assert both.result(timeout=60) == "0,1"


def test_a_rank_waits_for_the_device_of_a_job_and_who_has_it_is_told_where_that_takes_too_long(
    cuda: Client, flags: Flags
) -> None:
    with DevicePool(cuda, preload=()) as pool:
        job = pool.submit(hold, flags, "job", "end", gpus=2)
        flags.wait("job")
        options = {"workers": workers_of(cuda)[:1], "exclusive": False}
        with pytest.raises(PlacementError, match=rf"no 1 of its 1 devices within 1 s: 0 is held.*: job {job.key}"):
            train(cuda, timeout="1s", **options)
        flags.set("end")
        assert train(cuda, **options).num_boosted_rounds() == 2
        assert job.result() == "0,1"
