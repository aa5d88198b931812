"""The ranks of a training on devices of their own, which neither jobs nor other trainings have meanwhile."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dask.array as da
import numpy as np
import psutil
import pytest
from distributed import Client
from tests.core.devices_at_work import held, see, workers_of
from tests.core.jobs_at_work import Flags, claim, claimed, hold

from dask_bridges import DataError, PlacementError
from dask_bridges.jobs import DevicePool

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(sys.platform != "linux", reason="ranks live in child processes, which need Linux"),
    pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs TensorFlow"),
]

ROWS = 64


class AtFirst:
    """A loss that does something when a rank first asks for it, before the rank's first step."""

    def __init__(self, work: Callable[[Flags, int], None], flags: Flags) -> None:
        self.work, self.flags = work, flags
        self.done = False
        self.__name__ = "at_first"

    def __call__(self, y_true: Any, y_pred: Any) -> Any:
        import keras

        from dask_keras import current

        if not self.done and hasattr(y_pred, "numpy"):
            self.done = True
            self.work(self.flags, current().rank)
        return keras.losses.mean_squared_error(y_true, y_pred)


def tell(flags: Flags, rank: int) -> None:
    flags.set(f"rank-{rank}", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))


def tell_and_wait(flags: Flags, rank: int) -> None:
    with claimed(flags):
        tell(flags, rank)
        flags.wait("go")


def die_at_first_with_dask_worker(flags: Flags, rank: int) -> None:
    """The fork server's parent is the Dask worker."""
    if rank == 1 and not (flags.folder / "died").exists():
        flags.set("died")
        os.kill(psutil.Process().parent().ppid(), signal.SIGKILL)
        signal.pause()  # the kernel ends this process
    tell(flags, rank)


def made(work: Callable[[Flags, int], None], flags: Flags) -> Any:
    import keras

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", AtFirst(work, flags), run_eagerly=True)
    return model


def fit(client: Client, model: Any, **options: Any) -> Any:
    import dask_keras

    X = np.random.default_rng(0).normal(size=(ROWS, 3)).astype("float32")
    data = da.from_array(X, chunks=(16, 3)), da.from_array(X[:, 0] * 2, chunks=16)
    return dask_keras.fit(client, model, *data, batch_size=32, verbose=0, **options)


@contextlib.contextmanager
def meanwhile(client: Client, model: Any, flags: Flags, **options: Any) -> Iterator[Any]:
    """A training that has begun when the block does, and may go on after it."""
    with ThreadPoolExecutor(1) as threads:
        training = threads.submit(fit, client, model, **options)
        flags.wait("rank-0")
        try:
            yield training
        finally:
            flags.set("go")
        assert training.result(timeout=60).epoch == [0]


def seen(flags: Flags) -> list[str]:
    """What each rank has told."""
    return [path.read_text() for path in sorted(flags.folder.glob("rank-*"))]


@pytest.mark.slow
def test_each_rank_sees_a_device_of_its_own_which_is_free_afterwards(client: Client, flags: Flags) -> None:
    with meanwhile(client, made(tell_and_wait, flags), flags, gpus_per_member=1):
        first, second = flags.wait("rank-0"), flags.wait("rank-1")
        assert {first, second} == {"0", "1"}
        assert held(client) == {first: "Keras training member 0", second: "Keras training member 1"}
    assert held(client) == {}


@pytest.mark.slow
def test_one_rank_has_both_and_the_other_worker_takes_no_part(client: Client, flags: Flags) -> None:
    fit(client, made(tell, flags), gpus_per_member=2)
    assert seen(flags) == ["0,1"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_of_workers_that_see_the_same_device_either_can_be_named(client: Client, flags: Flags, number: int) -> None:
    see(client, "5", "5")
    try:
        fit(client, made(tell, flags), gpus_per_member=1, workers=workers_of(client)[number])
        fit(client, made(tell, flags), gpus_per_member=1)
    finally:
        see(client, None, None)
    assert seen(flags) == ["5"]


@pytest.mark.slow
def test_without_asking_a_rank_sees_what_its_worker_sees(client: Client, flags: Flags) -> None:
    fit(client, made(tell, flags))
    assert seen(flags) == ["all", "all"]


def test_jobs_never_get_the_device_of_a_rank(client: Client, flags: Flags) -> None:
    with DevicePool(client, preload=()) as pool:
        options = {"gpus_per_member": 1, "workers": 1, "exclusive": False}
        with meanwhile(client, made(tell_and_wait, flags), flags, **options):
            (mine,) = seen(flags)
            assert set(client.gather(pool.map(claim, [flags] * 8))) == {"0", "1"} - {mine}
            both = pool.submit(claim, flags, gpus=2)
        assert both.result(timeout=60) == "0,1"


@pytest.mark.slow
def test_a_rank_waits_for_the_device_of_a_job_and_who_has_it_is_told_where_that_takes_too_long(
    client: Client, flags: Flags
) -> None:
    with DevicePool(client, preload=()) as pool:
        job = pool.submit(hold, flags, "job", "end", gpus=2)
        flags.wait("job")
        options = {"gpus_per_member": 1, "workers": 1, "exclusive": False}
        who = rf"member 0 had no 1 of its 2 devices within 1 s: 0 is held.*: job {job.key}; 1 is held"
        with pytest.raises(PlacementError, match=who):
            fit(client, made(tell, flags), timeout="1s", **options)
        assert seen(flags) == []
        flags.set("end")
        fit(client, made(tell, flags), **options)
        assert seen(flags) in (["0"], ["1"])
        assert job.result() == "0,1"


@pytest.mark.slow
def test_a_training_that_goes_on_after_a_loss_has_its_devices_again(client: Client, flags: Flags) -> None:
    history = fit(
        client, made(die_at_first_with_dask_worker, flags), gpus_per_member=1, checkpoint=flags.folder / "kept"
    )
    assert history.epoch == [0]
    assert sorted(seen(flags)) == ["0", "1"]
    client.wait_for_workers(2, timeout=60)


@pytest.mark.parametrize("count", [0, -1, True, 0.5, "1"])
def test_odd_numbers_are_refused(client: Client, flags: Flags, count: Any) -> None:
    with pytest.raises(ValueError, match=f"gpus_per_member={count!r}: pass how many devices each member gets"):
        fit(client, made(tell, flags), gpus_per_member=count)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpus_per_member": 3}, r"needs 3 of the devices of one host for each member, and .* has 2"),
        ({"gpus_per_member": 2, "workers": 2}, r"workers=2, and the cluster has 1 to use with 2 GPUs for each: tcp:"),
        (
            {"gpus_per_member": 2, "workers": ["0", "1"]},
            r"too few devices for all of the workers named, .*none for tcp:",
        ),
    ],
)
def test_more_than_there_is_is_refused_with_what_there_is(
    client: Client, flags: Flags, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(PlacementError, match=said):
        fit(client, made(tell, flags), **options)
    assert seen(flags) == []


def test_parameter_servers_have_a_cluster_to_name_gpus_for(client: Client, flags: Flags) -> None:
    with pytest.raises(DataError, match=r"gpus_per_member is for strategy='sync': .*gpus=\{'worker': 1\}"):
        fit(client, made(tell, flags), gpus_per_member=1, strategy="ps")
