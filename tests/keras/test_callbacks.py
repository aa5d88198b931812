"""Callbacks do on a cluster what they do in one process: the user's own, run once, with all ranks following."""

from __future__ import annotations

import csv
import itertools
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from distributed import Client

from dask_bridges import DataError, MemberFailed
from dask_bridges.testing import leftovers, wait_until_free

keras = pytest.importorskip("keras")
tf = pytest.importorskip("tensorflow")
dask_keras = pytest.importorskip("dask_keras")

pytestmark = pytest.mark.cluster

#: Rows of the two ranks, and of a batch over both: 5 steps an epoch.
LAYOUT, BATCH, STEPS = (25, 15), 8, 5
NEAR = {"rtol": 1e-4, "atol": 1e-6}


def order() -> Any:
    """The rows of both ranks, batch after batch."""
    from dask_keras.shares import Shares

    shares, starts = Shares(LAYOUT, BATCH), np.cumsum([0, *LAYOUT])
    taken = [shares.before(step)[1] for step in range(shares.steps)] + [LAYOUT]
    return np.concatenate(
        [
            np.arange(starts[rank] + before[rank], starts[rank] + after[rank])
            for before, after in itertools.pairwise(taken)
            for rank in range(len(LAYOUT))
        ]
    )


def rows() -> tuple[Any, Any]:
    rng = np.random.default_rng(5)
    X = rng.normal(size=(sum(LAYOUT), 3)).astype("float32")
    return X, (X @ [1, -2, 0.5] + rng.normal(size=len(X)) / 10).astype("float32")


def collections(X: Any, y: Any) -> tuple[Any, Any]:
    return da.from_array(X, chunks=(LAYOUT, X.shape[1])), da.from_array(y, chunks=(LAYOUT,))


def model_of(rate: float = 0.05, metrics: Any = ("mae",)) -> Any:
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(rate, momentum=0.5), "mse", metrics=list(metrics))
    return model


class Both:
    """A training on the cluster, and the same in one process."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def alone(self, callbacks: Any, epochs: int = 3, rate: float = 0.05, validate: int = 0, **more: Any) -> Any:
        X, y = rows()
        told = {"validation_data": (X[:validate], y[:validate]), "validation_batch_size": 4} if validate else {}
        model = model_of(rate)
        at = order()
        options = {"epochs": epochs, "batch_size": BATCH, "shuffle": False, "verbose": 0, **told, **more}
        model.fit(X[at], y[at], callbacks=callbacks, **options)
        return model

    def together(
        self,
        callbacks: Any,
        epochs: int = 3,
        rate: float = 0.05,
        validate: int = 0,
        model: Any = None,
        **more: Any,
    ) -> Any:
        X, y = rows()
        model = model or model_of(rate)
        told = {"validation_data": parts_of(X[:validate], y[:validate])} if validate else {}
        options = {"workers": 2, "batch_size": BATCH, "shuffle": False, **told, **more}
        dask_keras.fit(self.client, model, *collections(X, y), callbacks=callbacks, epochs=epochs, **options)
        assert leftovers(self.client) == {}
        return model

    def same(self, callbacks: Callable[[str], Any], **options: Any) -> tuple[Any, Any]:
        """Train in both ways with what ``callbacks("alone")`` and ``callbacks("together")`` make; both models."""
        alone = self.alone(callbacks("alone"), **options)
        together = self.together(callbacks("together"), **options)
        for name, values in alone.history.history.items():
            np.testing.assert_allclose(together.history.history[name], values, err_msg=name, **NEAR)
        assert alone.history.history.keys() == together.history.history.keys()
        assert alone.history.epoch == together.history.epoch
        assert alone.stop_training == together.stop_training
        assert int(together.optimizer.iterations.numpy()) == int(alone.optimizer.iterations.numpy())
        same_weights(alone, together)
        return alone, together


def parts_of(X: Any, y: Any) -> tuple[Any, Any]:
    """In parts of five rows: one row is on one rank, and the other looks on."""
    return da.from_array(X, chunks=(5, 3)), da.from_array(y, chunks=5)


def same_weights(one: Any, other: Any) -> None:
    for ours, theirs in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, **NEAR)


@pytest.fixture
def both(bridges_client: Client) -> Both:
    return Both(bridges_client)


# Keras's own


@pytest.mark.slow
def test_schedules_logs_and_checkpoints_come_out_as_in_one_process(both: Both, tmp_path: Path) -> None:
    def callbacks(where: str) -> list[Any]:
        folder = tmp_path / where
        folder.mkdir()
        return [
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5 ** (epoch > 1)),
            keras.callbacks.CSVLogger(folder / "log.csv"),
            keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: (folder / f"epoch {epoch}").touch()),
            keras.callbacks.ModelCheckpoint(folder / "{epoch}-{val_loss:.3f}.keras", save_best_only=True),
            keras.callbacks.ModelCheckpoint(
                str(folder / "step-{batch}.weights.h5"), save_weights_only=True, save_freq=4
            ),
        ]

    both.same(callbacks, validate=9)
    alone, together = sorted(os.listdir(tmp_path / "alone")), sorted(os.listdir(tmp_path / "together"))
    assert together == alone
    assert sum(name.endswith(".keras") for name in alone) >= 2
    tables = [list(csv.reader((tmp_path / where / "log.csv").open())) for where in ("alone", "together")]
    assert tables[0][0] == tables[1][0]
    np.testing.assert_allclose(*[[list(map(float, line)) for line in table[1:]] for table in tables], **NEAR)
    for name in alone:
        if name.endswith(".keras"):
            same_weights(*[keras.models.load_model(tmp_path / where / name) for where in ("alone", "together")])
        elif name.endswith(".h5"):
            read = [model_of() for _ in range(2)]
            for model, where in zip(read, ("alone", "together")):
                model.load_weights(tmp_path / where / name)
            same_weights(*read)


@pytest.mark.slow
def test_early_stopping_restores_the_best_weights_and_plateaus_lower_the_rate(both: Both) -> None:
    made: dict[str, list[Any]] = {}

    def callbacks(where: str) -> list[Any]:
        made[where] = [
            Spoils(2),
            keras.callbacks.EarlyStopping(monitor="loss", patience=2, restore_best_weights=True),
            keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.3, patience=0, min_lr=1e-4),
        ]
        return made[where]

    both.same(callbacks, epochs=9)
    (_, stop, plateau), (_, ours, reduced) = made["alone"], made["together"]
    assert stop.stopped_epoch == ours.stopped_epoch == 3
    assert stop.best_epoch == ours.best_epoch == 1
    assert ours.best == pytest.approx(stop.best, rel=1e-4)
    assert reduced.best == pytest.approx(plateau.best, rel=1e-4)


class Spoils(keras.callbacks.Callback):  # type: ignore[misc]
    """Sets bad weights as an epoch begins."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == self.epoch:
            self.model.set_weights([weight + 3 for weight in self.model.get_weights()])


@pytest.mark.slow
def test_tensorboard_shows_what_it_shows_of_one_process(both: Both, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    both.same(lambda where: [keras.callbacks.TensorBoard(tmp_path / where)], epochs=2, validate=9)
    files = [
        sorted(path.parent.name for path in (tmp_path / where).rglob("events*")) for where in ("alone", "together")
    ]
    assert files[1] == files[0]
    alone, together = (scalars(tmp_path / where) for where in ("alone", "together"))
    assert together.keys() == alone.keys()
    assert {name.partition("/")[0] for name, _, _ in alone} == {"train", "validation"}
    for place, value in alone.items():
        assert together[place] == pytest.approx(value, rel=1e-4), place


def scalars(folder: Path) -> dict[tuple[str, str, int], float]:
    """By file, tag and step."""
    found = {}
    for path in folder.rglob("events*"):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars" and "per_second" not in value.tag:
                    found[path.parent.name, value.tag, event.step] = float(tf.make_ndarray(value.tensor))
    return found


class Breaks(keras.callbacks.Callback):  # type: ignore[misc]
    """Breaks off as an epoch begins."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == self.epoch:
            raise RuntimeError("the power is off")


@pytest.mark.slow
def test_a_training_goes_on_from_its_backup(both: Both, tmp_path: Path) -> None:
    def backup() -> Any:
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    model = model_of()
    before = model.get_weights()
    with pytest.raises(MemberFailed, match="the power is off") as failed:
        both.together([backup(), Breaks(2)], epochs=4, model=model)
    assert isinstance(failed.value.__cause__, RuntimeError)
    wait_until_free(both.client, timeout=30)
    for now, then in zip(model.get_weights(), before):
        np.testing.assert_array_equal(now, then)
    both.together([backup()], epochs=4, model=model)
    assert model.history.epoch == [2, 3]
    assert not (tmp_path / "backup").exists()
    alone = both.alone([], epochs=4)
    np.testing.assert_allclose(model.history.history["loss"], alone.history.history["loss"][2:], **NEAR)
    same_weights(alone, model)


@pytest.mark.parametrize("raises", [False, True])
def test_a_loss_that_is_no_number_ends_all_and_names_batch_and_rank(
    bridges_client: Client, caplog: pytest.LogCaptureFixture, raises: bool
) -> None:
    X, y = rows()
    y[-1] = np.nan  # the last row of rank 1, in the last batch
    model, stop = model_of(), keras.callbacks.TerminateOnNaN(raise_error=raises)
    options = {"epochs": 3, "batch_size": BATCH, "shuffle": False, "workers": 2, "callbacks": [stop]}
    if raises:
        with pytest.raises(MemberFailed, match="NaN or Inf loss encountered at batch 4"):
            dask_keras.fit(bridges_client, model, *collections(X, y), **options)
    else:
        dask_keras.fit(bridges_client, model, *collections(X, y), **options)
        assert int(model.optimizer.iterations.numpy()) == STEPS
        assert len(model.history.history["loss"]) == 1
    assert "rank 0: the loss is not finite at batch 4 on rank 1" in caplog.text
    wait_until_free(bridges_client, timeout=30)


# The user's own, for batches


class ByBatch(keras.callbacks.Callback):  # type: ignore[misc]
    """Changes weights and the learning rate by batches, and stops at one."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last, self.seen = last, []
        self.lock: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        self.lock = threading.Lock()  # cannot travel back

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.model.optimizer.learning_rate = 0.05 / (batch + 1)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seen.append(batch)
        kernel = self.model.layers[0].kernel
        if batch == 1:
            kernel.assign(kernel * 0.5)
        if len(self.seen) == self.last:
            self.model.stop_training = True

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.model.layers[1].kernel.assign(np.full((4, 1), 0.1 * (epoch + 1)))


def test_rates_weights_and_the_end_are_set_by_batches(both: Both) -> None:
    made = {where: ByBatch(last=8) for where in ("alone", "together")}
    alone, together = both.same(lambda where: [made[where]])
    assert int(together.optimizer.iterations.numpy()) == 8
    assert made["together"].seen == made["alone"].seen
    assert made["together"].lock is None
    assert made["together"].model is together
    assert float(together.optimizer.learning_rate.numpy()) == float(alone.optimizer.learning_rate.numpy())


class StopsEarly(keras.callbacks.Callback):  # type: ignore[misc]
    """Stops as an epoch begins."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.model.stop_training = epoch == 1


@pytest.mark.slow
def test_a_callback_that_stops_as_an_epoch_begins_lets_one_batch_pass_as_in_one_process(both: Both) -> None:
    _, together = both.same(lambda where: StopsEarly(), validate=9)  # one alone, not in a list
    assert int(together.optimizer.iterations.numpy()) == STEPS + 1


class Asks(keras.callbacks.Callback):  # type: ignore[misc]
    """Evaluates, predicts and asks for metrics wherever it can, and swaps weights for validation."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Any] = {}
        self.own: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        self.found["begin"] = self.model.evaluate(*rows(), verbose=0)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.model.get_metrics_result()
        if batch == 1:
            self.model.predict(rows()[0], verbose=0)

    def on_test_begin(self, logs: Any = None) -> None:
        self.own = self.model.get_weights()
        self.model.set_weights([weight * 0.5 for weight in self.own])

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self.model.get_metrics_result()

    def on_test_end(self, logs: Any = None) -> None:
        self.found["validation"] = logs
        self.model.get_metrics_result()
        self.model.set_weights(self.own)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.found[f"epoch {epoch}"] = self.model.evaluate(*rows(), verbose=0, return_dict=True)["mae"]

    def on_train_end(self, logs: Any = None) -> None:
        self.found["end"] = logs


@pytest.mark.slow
@pytest.mark.parametrize("rows", [9, 1])
def test_a_callback_may_evaluate_predict_and_swap_weights(both: Both, rows: int) -> None:
    made = {where: Asks() for where in ("alone", "together")}
    both.same(lambda where: [made[where]], epochs=2, validate=rows)
    alone, together = (flat(made[where].found) for where in ("alone", "together"))
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        np.testing.assert_allclose(together[name], value, err_msg=name, **NEAR)


def flat(found: Any) -> dict[str, Any]:
    return {
        f"{name} {inner}": value
        for name, each in found.items()
        for inner, value in (each.items() if isinstance(each, dict) else [("", each)])
    }


class Fails(keras.callbacks.Callback):  # type: ignore[misc]
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == 2:
            raise KeyError("no such thing")


def test_a_callback_that_raises_ends_all_with_its_error(both: Both) -> None:
    with pytest.raises(MemberFailed, match=r"no such thing") as failed:
        both.together([Fails()])
    assert isinstance(failed.value.__cause__, KeyError)
    assert failed.value.rank == 0
    wait_until_free(both.client, timeout=30)


# What comes back


@pytest.fixture
def workers_elsewhere(bridges_client: Client, tmp_path: Path) -> Iterator[Path]:
    """The workers work in another directory than the client."""
    home = os.getcwd()
    bridges_client.run(os.chdir, str(tmp_path))
    yield tmp_path
    bridges_client.run(os.chdir, home)


def test_where_files_with_relative_paths_are_is_said(
    both: Both, workers_elsewhere: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = [
        keras.callbacks.CSVLogger("log.csv"),
        keras.callbacks.ModelCheckpoint(str(workers_elsewhere / "last.keras")),
    ]
    model = both.together(callbacks, epochs=2, verbose=2)
    lines = [record for record in caplog.records if "relative paths" in record.message]
    assert [record.levelno for record in lines] == [logging.WARNING]
    assert f"CSVLogger(filename='log.csv'): relative paths are in {workers_elsewhere} on " in lines[0].message
    assert "tcp://" in lines[0].message
    assert "ModelCheckpoint" not in lines[0].message
    assert (workers_elsewhere / "log.csv").read_text().startswith("epoch,loss,mae")
    assert capsys.readouterr().out.splitlines() == [
        f"Epoch {epoch + 1}/2 - loss: {loss:.4f} - mae: {mae:.4f}"
        for epoch, (loss, mae) in enumerate(zip(model.history.history["loss"], model.history.history["mae"]))
    ]


@pytest.mark.slow
def test_metrics_that_are_no_single_number_and_a_history_of_the_users_own(
    both: Both, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of(metrics=[keras.metrics.R2Score(class_aggregation=None)])
    history = keras.callbacks.History()
    both.together([history], epochs=2, model=model, verbose=1)
    assert model.history is history
    assert re.search(r"Keras: 100%.* 10/10 .*loss=", capsys.readouterr().err)
    assert np.shape(history.history["r2_score"]) == (2, 1)


def test_a_callback_that_cannot_travel_is_named(both: Both) -> None:
    callback = Asks()
    callback.own = threading.Lock()
    with pytest.raises(DataError, match=r"callback Asks cannot be sent.*on_train_begin"):
        both.together([callback])
    with pytest.raises(TypeError, match=r"keras\.callbacks\.Callback objects, not 'early'"):
        both.together(["early"])
