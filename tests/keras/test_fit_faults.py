"""What is lost, what goes on and what people are told when parts of a Keras training die."""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dask.array as da
import dask.config
import numpy as np
import psutil
import pytest
from distributed import Client, LocalCluster

from dask_bridges import DataError, MemberLost, PlacementError, safekeeping
from dask_bridges.checkpoints import Checkpoints
from dask_bridges.processes import memberspool
from dask_bridges.testing import command_line_cluster, leftovers, wait_until_free
from dask_keras.supervising import ATTEMPTS

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(sys.platform != "linux", reason="ranks live in child processes, which need Linux"),
    pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs TensorFlow"),
]

WORKERS, ROWS, BATCH, EPOCHS = 2, 96, 16, 3
STEPS = ROWS // BATCH


@pytest.fixture(scope="module")
def doomed() -> Iterator[LocalCluster]:
    """Dask workers of which some are killed; their nannies bring them back."""
    with LocalCluster(n_workers=WORKERS, threads_per_worker=1, dashboard_address=":0") as cluster:
        yield cluster


@pytest.fixture
def client(doomed: LocalCluster) -> Iterator[Client]:
    with Client(doomed, set_as_default=False) as client:
        client.wait_for_workers(WORKERS, timeout=60)
        yield client
        wait_until_free(client, timeout=10)
        assert [path for paths in client.run(spools).values() for path in paths] == []
        assert [kept for some in client.run(lambda: list(safekeeping._kept)).values() for kept in some] == []


def spools() -> list[str]:
    """Folders of partitions that a Dask worker has left in memory."""
    return [str(spool.path) for held in memberspool._spools.values() for spool in held if spool.path.exists()]


def data() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(ROWS, 4)).astype("float32")
    return da.from_array(X, chunks=(24, 4)), da.from_array(X[:, 0] * 2, chunks=24)


def made(kill: Kill | DyingHalfWay | None = None) -> Any:
    import keras

    keras.utils.set_random_seed(6)
    layers = [keras.Input((4,)), keras.layers.Dense(5, "tanh"), keras.layers.Dropout(0.2), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.Adam(0.01), kill or "mse", metrics=["mae"], run_eagerly=kill is not None)
    return model


class Kill:
    """A loss that ends its process, once or again and again, on a rank, when it has been asked for the n-th time."""

    def __init__(self, mark: Path, rank: int, call: int, kill: Callable[[], None], again: bool = False) -> None:
        self.mark, self.rank, self.call, self.kill, self.again = mark, rank, call, kill, again
        self.calls = 0
        self.__name__ = "kill"

    def __call__(self, y_true: Any, y_pred: Any) -> Any:
        import keras

        from dask_keras import current

        if hasattr(y_pred, "numpy"):
            self.calls += 1
            count(self.mark.parent, current().rank)
            if current().rank == self.rank and self.calls == self.call and (self.again or not self.mark.exists()):
                with self.mark.open("a") as file:
                    file.write("x")
                self.kill()
        return keras.losses.mean_squared_error(y_true, y_pred)


def count(folder: Path, rank: int) -> None:
    """One more batch that a rank has seen, in any attempt."""
    with (folder / f"calls-{rank}").open("a") as file:
        file.write("x")


def seen(folder: Path, rank: int) -> int:
    """How many it has seen, of training and of validation."""
    return len((folder / f"calls-{rank}").read_text())


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_with_dask_workers(pids: Sequence[int]) -> None:
    """All of them at once."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    signal.pause()


def die_with_dask_worker() -> None:
    """The fork server's parent is the Dask worker."""
    os.kill(psutil.Process().parent().ppid(), signal.SIGKILL)
    signal.pause()  # the kernel ends this process


class KillingCheckpoints(Checkpoints):
    """Ends the process that keeps the second checkpoint, when all of it but the manifest is written."""

    def _put_files(self, folder: str, files: Any) -> None:
        super()._put_files(folder, files)
        mark = Path(self._root).with_name("mark")
        if self.steps() and not mark.exists():
            mark.touch()
            die()


def fit(client: Client, model: Any, **options: Any) -> Any:
    import dask_keras

    X, y = data()
    return dask_keras.fit(
        client, model, X, y, batch_size=BATCH, epochs=EPOCHS, seed=11, validation_data=data(), verbose=0, **options
    )


@pytest.fixture(scope="module")
def undisturbed(doomed: LocalCluster) -> tuple[list[Any], dict[str, list[float]]]:
    """Weights and history of a training that nobody interrupts."""
    with Client(doomed, set_as_default=False) as client:
        model = made()
        history = fit(client, model)
        return model.get_weights(), history.history


def same(model: Any, history: Any, undisturbed: tuple[list[Any], dict[str, list[float]]]) -> None:
    weights, values = undisturbed
    for ours, theirs in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert history.history.keys() == values.keys()
    for name in values:
        np.testing.assert_allclose(history.history[name], values[name], atol=1e-6)
    assert history.epoch == list(range(EPOCHS))


# Without a checkpoint


@pytest.mark.parametrize(
    ("rank", "call"),
    [
        pytest.param(1, 1, id="start"),
        pytest.param(0, STEPS, id="epoch"),
        pytest.param(1, STEPS + 2, id="validation"),
    ],
)
@pytest.mark.slow
def test_a_killed_rank_ends_the_training_and_is_named(client: Client, tmp_path: Path, rank: int, call: int) -> None:
    model = made(Kill(tmp_path / "mark", rank, call, die))
    before = model.get_weights()
    with pytest.raises(MemberLost, match=rf"member {rank} was lost, with its process \d+ .*SIGKILL"):
        fit(client, model)
    assert leftovers(client) == {}
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(model.get_weights(), before))


@pytest.mark.slow
def test_a_killed_dask_worker_ends_the_training_and_is_named(client: Client, tmp_path: Path) -> None:
    with pytest.raises(MemberLost, match=r"member 1 was lost.*, with its worker tcp://"):
        fit(client, made(Kill(tmp_path / "mark", 1, 3, die_with_dask_worker)))
    client.wait_for_workers(WORKERS, timeout=60)


# With one


@pytest.mark.parametrize(
    ("rank", "call", "every"),
    [
        pytest.param(0, 1, None, id="first batch", marks=pytest.mark.slow),
        pytest.param(1, STEPS + 3, None, id="validation", marks=pytest.mark.slow),
        pytest.param(0, STEPS + 12, 4, id="in an epoch"),
        pytest.param(1, 2 * STEPS + 6 + 5, 4, id="in the last epoch", marks=pytest.mark.slow),
    ],
)
def test_a_training_goes_on_from_a_checkpoint_to_the_same_result(
    client: Client, tmp_path: Path, undisturbed: Any, rank: int, call: int, every: int | None
) -> None:
    model = made(Kill(tmp_path / "mark", rank, call, die))
    history = fit(client, model, checkpoint=tmp_path / "kept", checkpoint_every=every)
    assert (tmp_path / "mark").exists()
    assert not every or seen(tmp_path, rank) < call + EPOCHS * 2 * STEPS
    assert leftovers(client) == {}
    same(model, history, undisturbed)


@pytest.mark.slow
def test_a_rank_killed_while_it_keeps_a_checkpoint_goes_on_from_the_one_before(
    client: Client, tmp_path: Path, undisturbed: Any
) -> None:
    model = made()
    history = fit(client, model, checkpoint=KillingCheckpoints(tmp_path / "kept"))
    assert (tmp_path / "mark").exists()
    same(model, history, undisturbed)


@pytest.mark.slow
def test_a_training_goes_on_when_its_dask_worker_is_killed_and_comes_back(
    client: Client, tmp_path: Path, undisturbed: Any
) -> None:
    model = made(Kill(tmp_path / "mark", 1, STEPS + 5, die_with_dask_worker))
    with dask.config.set({"dask-bridges.worker-return-timeout": "60s"}):
        history = fit(client, model, checkpoint=tmp_path / "kept")
    assert (tmp_path / "mark").exists()
    same(model, history, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["folder", "memory://"])
def test_it_goes_on_with_fewer_workers_when_one_stays_away(tmp_path: Path, place: str) -> None:
    with (
        dask.config.set({"dask-bridges.worker-return-timeout": "1s"}),
        command_line_cluster(workers=2, nanny=False) as cluster,
    ):
        model = made(Kill(tmp_path / "mark", 1, STEPS + 5, die_with_dask_worker))
        history = fit(cluster.client, model, checkpoint=tmp_path / "kept" if place == "folder" else place)
        assert len(cluster.client.scheduler_info(n_workers=-1)["workers"]) == 1
        assert history.epoch == list(range(EPOCHS))
        assert int(model.optimizer.iterations.numpy()) == EPOCHS * STEPS


@pytest.mark.slow  # every time another process
def test_a_training_that_is_lost_again_and_again_is_given_up(client: Client, tmp_path: Path) -> None:
    with pytest.raises(MemberLost, match="member 0 was lost"):
        fit(client, made(Kill(tmp_path / "mark", 0, 2, die, again=True)), checkpoint=tmp_path / "kept")
    assert (tmp_path / "mark").read_text() == "x" * ATTEMPTS


@pytest.mark.slow
def test_a_later_call_goes_on_where_the_last_one_ended(client: Client, tmp_path: Path, undisturbed: Any) -> None:
    import dask_keras

    X, y = data()
    first, second = made(), made()
    options = {
        "batch_size": BATCH,
        "seed": 11,
        "validation_data": data(),
        "verbose": 0,
        "checkpoint": tmp_path / "kept",
    }
    dask_keras.fit(client, first, X, y, epochs=2, **options)
    history = dask_keras.fit(client, second, X, y, epochs=EPOCHS, **options)
    same(second, history, undisturbed)
    assert int(second.optimizer.iterations.numpy()) == EPOCHS * STEPS


@pytest.mark.slow
def test_the_checkpoint_of_another_model_is_refused(client: Client, tmp_path: Path) -> None:
    import keras

    fit(client, made(), checkpoint=tmp_path / "kept")
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    other.compile("adam", "mse")
    with pytest.raises(Exception, match="is of another model or optimizer"):
        fit(client, other, checkpoint=tmp_path / "kept")


def test_checkpoints_need_a_place(client: Client) -> None:
    with pytest.raises(DataError, match="need a place"):
        fit(client, made(), checkpoint_every=3)
    assert leftovers(client) == {}


# In the memory of the workers

#: Batches that a rank sees of a training that goes on from the eighth, in the second epoch.
SINCE_STEP_8 = EPOCHS * 2 * STEPS - (8 + STEPS)


def slower() -> Any:
    """A callback whose memory the learning rate of the next epoch depends on, and which rank 0 alone has."""
    import keras

    return keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=10.0)


class DiesHalfWay:
    """The pipe from a rank to its worker: it takes half of the second state, and the process is gone."""

    def __init__(self, pipe: Any, mark: Path) -> None:
        self.pipe, self.mark, self.states = pipe, mark, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)

    def send_bytes(self, packet: bytes) -> None:
        self.states += b"variables.npz" in packet
        if self.states == 2:
            self.mark.touch()
            os.write(self.pipe.fileno(), struct.pack("!i", len(packet)) + packet[: len(packet) // 2])
            die()
        self.pipe.send_bytes(packet)


class DyingHalfWay:
    """A loss that has its process, on each rank of the first attempt, die while it hands over its second state."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.waits = folder, True
        self.__name__ = "dying"

    def __call__(self, y_true: Any, y_pred: Any) -> Any:
        import keras

        from dask_keras import current

        if hasattr(y_pred, "numpy"):
            member = current()
            count(self.folder, member.rank)
            if self.waits and member.attempt == 1:
                member._pipe = DiesHalfWay(member._pipe, self.folder / f"mark-{member.rank}")  # type: ignore[assignment]
            self.waits = False
        return keras.losses.mean_squared_error(y_true, y_pred)


@pytest.mark.slow
def test_a_training_goes_on_from_what_the_workers_keep_in_memory(
    client: Client, tmp_path: Path, undisturbed: Any
) -> None:
    model = made(Kill(tmp_path / "mark", 0, STEPS + 12, die))
    history = fit(client, model, checkpoint="memory://", checkpoint_every=4)
    assert (tmp_path / "mark").exists()
    assert seen(tmp_path, 0) == STEPS + 12 + SINCE_STEP_8
    assert leftovers(client) == {}
    same(model, history, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "every", "since"),
    [
        pytest.param(STEPS + 12, 4, SINCE_STEP_8, id="in an epoch"),
        pytest.param(4 * STEPS + 3, None, 2 * STEPS, id="after it has changed the learning rate"),
    ],
)
def test_what_rank_0_alone_knows_outlives_its_dask_worker(
    client: Client, tmp_path: Path, call: int, every: int | None, since: int
) -> None:
    oracle = made()
    values = fit(client, oracle, callbacks=[slower()]).history
    assert values["learning_rate"][2] < values["learning_rate"][1]
    model = made(Kill(tmp_path / "mark", 0, call, die_with_dask_worker))
    with dask.config.set({"dask-bridges.worker-return-timeout": "60s"}):
        history = fit(client, model, checkpoint="memory://", checkpoint_every=every, callbacks=[slower()])
    assert (tmp_path / "mark").exists()
    assert seen(tmp_path, 0) == call + since
    same(model, history, (oracle.get_weights(), values))


@pytest.mark.slow
def test_a_state_that_came_half_way_to_the_worker_is_none(client: Client, tmp_path: Path, undisturbed: Any) -> None:
    model = made(DyingHalfWay(tmp_path))
    history = fit(client, model, checkpoint="memory://")
    assert list(tmp_path.glob("mark-*"))
    assert seen(tmp_path, 0) == 4 * 2 * STEPS  # two epochs with their validation, and two from the first one's end
    same(model, history, undisturbed)


@pytest.mark.slow
def test_a_later_call_begins_anew_where_an_earlier_one_kept_in_memory(
    client: Client, tmp_path: Path, undisturbed: Any
) -> None:
    first, second = made(), made(Kill(tmp_path / "mark", 0, 0, die))  # the second one only counts
    fit(client, first, checkpoint="memory://")
    same(second, fit(client, second, checkpoint="memory://"), undisturbed)
    assert seen(tmp_path, 0) == EPOCHS * 2 * STEPS


@pytest.mark.slow
def test_when_all_workers_are_lost_at_once_it_begins_anew_and_says_so(
    client: Client, tmp_path: Path, undisturbed: Any, caplog: pytest.LogCaptureFixture
) -> None:
    kill = functools.partial(die_with_dask_workers, list(client.run(os.getpid).values()))
    call = 2 * STEPS + 3  # the first epoch has been kept, by each of them
    model = made(Kill(tmp_path / "mark", 0, call, kill))
    with dask.config.set({"dask-bridges.worker-return-timeout": "60s"}):
        history = fit(client, model, checkpoint="memory://")
    assert (tmp_path / "mark").exists()
    assert seen(tmp_path, 0) == call + EPOCHS * 2 * STEPS
    assert "It begins anew" in caplog.text
    same(model, history, undisturbed)


@pytest.mark.slow
def test_when_all_workers_are_lost_for_good_their_names_are_told(tmp_path: Path) -> None:
    soon = {"dask-bridges.worker-return-timeout": "1s", "dask-bridges.timeout": "5s"}
    with command_line_cluster(workers=2, nanny=False) as cluster:
        kill = functools.partial(die_with_dask_workers, list(cluster.client.run(os.getpid).values()))
        model = made(Kill(tmp_path / "mark", 0, STEPS, kill))
        before = model.get_weights()
        with dask.config.set(soon), pytest.raises(PlacementError, match="has no workers, and none came") as lost:
            fit(cluster.client, model, checkpoint="memory://")
        assert isinstance(lost.value.__cause__, MemberLost)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(model.get_weights(), before))
