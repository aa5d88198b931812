"""`evaluate` gives what `model.evaluate` gives on all rows, however they are divided."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask.distributed import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dask_keras
from dask_bridges import DataError, PlacementError
from dask_keras import evaluation

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("keras", "tensorflow"))), reason="needs Keras and TensorFlow"
)
cluster = pytest.mark.cluster
ROWS = 90
CHUNKS = (40, 0, 7, 43)


@pytest.fixture(scope="module")
def keras() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    return pytest.importorskip("keras")


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    X = rng.random((ROWS, 4), dtype="float32")
    classes = np.digitize(X.sum(axis=1) + rng.normal(0, 0.5, ROWS), [1.7, 2.3])
    return {
        "X": X,
        "number": (X @ [1, -2, 3, 0.5] + 2).astype("float32")[:, None],
        "yes": (classes > 0).astype("float32")[:, None],
        "class": classes.astype("int32"),
        "one_hot": np.eye(3, dtype="float32")[classes],
        "weight": rng.uniform(0, 2, ROWS).astype("float32"),
    }


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`evaluate` with the tasks run here, by threads: the sums are what is tested, not the cluster."""
    monkeypatch.setattr(evaluation.clients, "current", lambda client: client)
    monkeypatch.setattr(
        evaluation.clients, "call", lambda client, function, _, result, *more: result.compute(scheduler="threads")
    )
    return lambda *args, **keywords: dask_keras.evaluate(None, *args, **keywords)


def lazy(values: Any, chunks: tuple[int, ...] = CHUNKS) -> Any:
    return da.from_array(values, chunks=(chunks, *values.shape[1:]))


def close(found: Any, wanted: Any) -> None:
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        found, wanted = list(found.values()), list(wanted.values())
    for one, other in zip(np.atleast_1d(found), np.atleast_1d(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-6)


def classifier(keras: Any, units: int, activation: str) -> Any:
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(6, "relu", kernel_regularizer=keras.regularizers.L2(0.1)),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(units, activation),
        ]
    )


def compiled(keras: Any, kind: str) -> tuple[Any, str]:
    """A model with the loss and the metrics of its kind, and the name of its targets."""
    metrics = keras.metrics
    if kind == "number":
        model, target = classifier(keras, 1, "linear"), "number"
        model.compile("adam", "mse", metrics=["mae", metrics.RootMeanSquaredError(), metrics.R2Score()])
    elif kind == "yes or no":
        model, target = classifier(keras, 1, "sigmoid"), "yes"
        found = ["accuracy", metrics.AUC(), metrics.AUC(curve="PR", name="pr"), metrics.Precision(), metrics.Recall()]
        model.compile("adam", "binary_crossentropy", metrics=found, weighted_metrics=["mae"])
    elif kind == "classes by number":
        model, target = classifier(keras, 3, "softmax"), "class"
        found = ["accuracy", metrics.SparseTopKCategoricalAccuracy(2)]
        model.compile("adam", "sparse_categorical_crossentropy", metrics=found)
    else:
        model, target = classifier(keras, 3, "softmax"), "one_hot"
        found = [metrics.F1Score(), "accuracy", metrics.OneHotMeanIoU(3)]
        model.compile("adam", "categorical_crossentropy", metrics=found)
    return model, target


KINDS = ["number", "yes or no", "classes by number", "classes in columns"]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_metrics_are_those_of_all_rows(keras: Any, data: Any, evaluated: Any, kind: str) -> None:
    model, target = compiled(keras, kind)
    keywords = {"batch_size": 16, "return_dict": True}
    weight = lazy(data["weight"], (50, 40))
    found = evaluated(model, lazy(data["X"]), lazy(data[target]), sample_weight=weight, **keywords)
    wanted = model.evaluate(data["X"], data[target], sample_weight=data["weight"], **keywords, verbose=0)
    assert list(found) == list(wanted)
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=2e-6, atol=1e-6, err_msg=name)


@given(chunks=st.lists(st.integers(0, 30), min_size=1, max_size=4), batch_size=st.integers(1, 40))
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_however_rows_are_divided(
    keras: Any, data: Any, evaluated: Any, one_model: Any, chunks: list[int], batch_size: int
) -> None:
    rows = sum(chunks)
    if not 0 < rows <= ROWS:
        return
    X, y = data["X"][:rows], data["yes"][:rows]
    found = evaluated(one_model, lazy(X, tuple(chunks)), lazy(y, (rows,)), batch_size=batch_size)
    close(found, one_model.evaluate(X, y, batch_size=rows, verbose=0))


@pytest.fixture(scope="module")
def one_model(keras: Any) -> Any:
    return compiled(keras, "yes or no")[0]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["lists", "dicts", "frame of inputs"])
def test_several_outputs_with_their_weights(keras: Any, data: Any, evaluated: Any, form: str) -> None:
    X, number, yes = data["X"], data["number"], data["yes"]
    inputs = [keras.Input((1,), name=name) for name in ("a", "b")]
    hidden = keras.layers.Dense(4)(keras.layers.Concatenate()(inputs))
    outputs = [keras.layers.Dense(1, name="n")(hidden), keras.layers.Dense(1, "sigmoid", name="p")(hidden)]
    model = keras.Model(inputs, outputs if form != "dicts" else {"n": outputs[0], "p": outputs[1]})
    one: Any = {"loss": ["mse", "binary_crossentropy"], "loss_weights": [0.3, 2.0], "metrics": [["mae"], ["accuracy"]]}
    two = {name: dict(zip("np", values)) for name, values in one.items()}
    model.compile("sgd", **(two if form == "dicts" else one))
    x = [X[:, :1], X[:, 1:2]]
    y: Any = {"n": number, "p": yes} if form == "dicts" else [number, yes]
    lazy_x: Any = tuple(map(lazy, x))
    lazy_y: Any = {name: lazy(v) for name, v in y.items()} if form == "dicts" else list(map(lazy, y))
    if form == "frame of inputs":
        lazy_x = dd.from_pandas(pd.DataFrame(X, columns=list("abcd")), npartitions=3)
        sizes = tuple(lazy_x.map_partitions(len).compute(scheduler="sync"))
        lazy_y = [lazy(each, sizes) for each in y]
    weights = [data["weight"], data["weight"][::-1].copy()]
    w: Any = dict(zip("np", weights)) if form == "dicts" else weights
    lazy_w: Any = {name: lazy(v) for name, v in w.items()} if form == "dicts" else [lazy(v) for v in w]
    if form == "frame of inputs":
        lazy_w = [lazy(each, sizes) for each in w]
    for return_dict, plain, ours in ((True, None, None), (False, None, None), (True, w, lazy_w)):
        found = evaluated(model, lazy_x, lazy_y, batch_size=16, return_dict=return_dict, sample_weight=ours)
        # In one batch: of several, Keras on TensorFlow averages the losses of outputs without their lengths.
        wanted = model.evaluate(x, y, batch_size=ROWS, verbose=0, return_dict=return_dict, sample_weight=plain)
        close(found, wanted)


def test_upstream_still_counts_batches_for_the_losses_of_outputs(keras: Any, data: Any) -> None:
    """When this fails, `upstream.output_losses` and the pieces of `evaluate` may go."""
    inputs = keras.Input((4,))
    model = keras.Model(inputs, [keras.layers.Dense(1, name=name)(inputs) for name in "ab"])
    model.compile("sgd", ["mse", "mae"])
    y = [data["number"] * np.arange(ROWS)[:, None]] * 2
    by_batches, at_once = (
        model.evaluate(data["X"], y, batch_size=n, verbose=0, return_dict=True) for n in (ROWS - 1, ROWS)
    )
    np.testing.assert_allclose(by_batches["loss"], at_once["loss"], rtol=1e-5)
    assert abs(by_batches["a_loss"] / at_once["a_loss"] - 1) > 0.1


def test_a_model_with_a_loss_alone_gives_one_number(keras: Any, data: Any, evaluated: Any) -> None:
    model = classifier(keras, 1, "linear")
    model.compile(loss="mse")
    found = evaluated(model, lazy(data["X"]), lazy(data["number"]))
    assert isinstance(found, float)
    close(found, model.evaluate(data["X"], data["number"], verbose=0))


def test_a_frame_with_its_target(keras: Any, data: Any, evaluated: Any) -> None:
    model, _ = compiled(keras, "number")
    frame = pd.DataFrame(data["X"], columns=list("abcd")).assign(late=data["number"][:, 0])
    found = evaluated(model, dd.from_pandas(frame, npartitions=3), "late")
    close(found, model.evaluate(data["X"], data["number"], verbose=0))
    with pytest.raises(DataError, match="y='early' names a column"):
        evaluated(model, dd.from_pandas(frame, npartitions=3), "early")


def test_the_model_here_is_left_alone(keras: Any, data: Any, evaluated: Any) -> None:
    model, target = compiled(keras, "number")
    model.evaluate(data["X"][:10], data[target][:10], verbose=0)
    before = [np.array(v) for v in model.metrics_variables] + model.get_weights()
    evaluated(model, lazy(data["X"]), lazy(data[target]))
    for one, other in zip(before, [np.array(v) for v in model.metrics_variables] + model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_sum_over_partitions_loses_nothing(keras: Any, data: Any, evaluated: Any, one_model: Any) -> None:
    """In float32, one at a time, 1.0 is lost on 2 ** 24."""
    from dask_keras.evaluation import Tally, finish
    from dask_keras.kept import pack

    packed = pack(one_model)
    example = {"x": data["X"][:1], "y": data["yes"][:1], "sample_weight": None}
    loss = [Tally(1, (np.array(v), np.array(2.0**20)), example) for v in (2.0**24, *[1.0] * 64)]
    found = finish(loss, model=packed.raw, token=packed.token, return_dict=True)
    assert found["loss"] == (2**24 + 64) / (2**20 * 65)


# On a cluster


@pytest.mark.slow
@cluster
def test_clients_of_every_kind(keras: Any, data: Any, bridges_client: Client) -> None:
    target, chunks = "yes", (50, 40)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, "sigmoid")])
    model.compile(loss="binary_crossentropy", metrics=["accuracy"])
    X, y = lazy(data["X"], chunks), lazy(data[target], chunks)
    wanted = model.evaluate(data["X"], data[target], verbose=0)
    close(dask_keras.evaluate(bridges_client, model, X, y, batch_size=16), wanted)

    async def asynchronously(address: str) -> Any:
        async with Client(address, asynchronous=True) as client:
            return await dask_keras.evaluate(client, model, X, y, return_dict=True, workers=[first])

    first = next(iter(bridges_client.scheduler_info()["workers"]))
    import asyncio

    by_name = asyncio.run(asynchronously(bridges_client.scheduler.address))
    close(by_name, model.evaluate(data["X"], data[target], verbose=0, return_dict=True))

    def in_a_task(model: Any) -> Any:
        return dask_keras.evaluate(None, model, X, y, batch_size=16)

    [held] = bridges_client.scatter([model])
    close(bridges_client.submit(in_a_task, held).result(timeout=100), wanted)
    with pytest.raises(PlacementError, match="are not in the cluster"):
        dask_keras.evaluate(bridges_client, model, X, y, workers="nobody")


# What is refused


def test_a_model_that_is_not_compiled_is_refused(keras: Any, data: Any, evaluated: Any) -> None:
    with pytest.raises(DataError, match=r"not compiled: call model\.compile"):
        evaluated(classifier(keras, 1, "linear"), lazy(data["X"]), lazy(data["number"]))


def test_lengths_that_differ_are_refused(keras: Any, data: Any, evaluated: Any) -> None:
    model, target = compiled(keras, "number")
    with pytest.raises(DataError, match="X has 90 rows and y has 80"):
        evaluated(model, lazy(data["X"]), lazy(data[target][:80], (80,)))
    with pytest.raises(DataError, match="y is a numpy ndarray"):
        evaluated(model, lazy(data["X"]), data[target])


def test_data_without_rows_is_refused(keras: Any, data: Any, evaluated: Any) -> None:
    model, target = compiled(keras, "number")
    with pytest.raises(DataError, match="no rows"):
        evaluated(model, lazy(data["X"][:0], (0, 0)), lazy(data[target][:0], (0, 0)))


def test_a_metric_that_is_no_sum_is_refused(keras: Any, data: Any, evaluated: Any) -> None:
    class Largest(keras.metrics.Metric):  # type: ignore[misc]
        def __init__(self, **keywords: Any) -> None:
            super().__init__(**keywords)
            self.value = self.add_variable((), initializer="ones", name="value")

        def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
            self.value.assign(keras.ops.maximum(self.value, keras.ops.max(y_pred)))

        def result(self) -> Any:
            return self.value

        def reset_state(self) -> None:
            self.value.assign(-1e9)

    model = classifier(keras, 1, "linear")
    model.compile("sgd", "mse", metrics=[Largest()])
    with pytest.raises(DataError, match="starts at other values than zero"):
        evaluated(model, lazy(data["X"]), lazy(data["number"]))


def test_results_that_no_metric_keeps_are_refused(keras: Any, data: Any, evaluated: Any) -> None:
    class Counting(keras.Model):  # type: ignore[misc]
        def test_step(self, data: Any) -> Any:
            return {**super().test_step(data), "mine": 1.0}

    inputs = keras.Input((4,))
    model = Counting(inputs, keras.layers.Dense(1)(inputs))
    model.compile("sgd", "mse")
    with dask.config.set(scheduler="threads"), pytest.raises(DataError, match=r"test_step .* gives .*'mine'"):
        evaluated(model, lazy(data["X"]), lazy(data["number"]))
