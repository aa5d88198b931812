"""`predict` is lazy, and gives what `model.predict` gives, in the form of its input."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import types
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask.distributed import Client
from distributed.protocol.pickle import dumps
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dask_keras
from dask_bridges import DataError, PlacementError
from dask_serializers import CannotMove

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("keras", "tensorflow"))), reason="needs Keras and TensorFlow"
)
cluster = pytest.mark.cluster
lazily = dask.config.set(scheduler="threads")
ROWS = 60


def refuse_to_run(*_: Any, **__: Any) -> None:
    raise AssertionError("something was computed")


@pytest.fixture(scope="module")
def keras() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    return pytest.importorskip("keras")


@pytest.fixture(scope="module")
def X() -> Any:
    return np.random.default_rng(0).random((ROWS, 4), dtype="float32")


@pytest.fixture(scope="module")
def dense(keras: Any) -> Any:
    """Four features to (rows, 3)."""
    layers = [keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(3)]
    return keras.Sequential(layers)


@pytest.fixture(scope="module")
def two(keras: Any) -> Any:
    """Inputs `age` and `size` of one feature each, outputs `price` (rows, 2) and `risk` (rows, 1)."""
    age, size = keras.Input((1,), name="age"), keras.Input((1,), name="size")
    hidden = keras.layers.Dense(4)(keras.layers.Concatenate()([age, size]))
    outputs = [keras.layers.Dense(2, name="price")(hidden), keras.layers.Dense(1, name="risk")(hidden)]
    return keras.Model([age, size], outputs)


def close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-5, atol=1e-6)


# What comes out is what was declared


@given(chunks=st.lists(st.integers(0, 30), min_size=1, max_size=5), batch_size=st.integers(1, 40))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_chunks_of_rows_are_predicted_as_declared(dense: Any, chunks: list[int], batch_size: int) -> None:
    rows = np.random.default_rng(1).random((sum(chunks), 4))
    with dask.config.set(scheduler=refuse_to_run):
        found = dask_keras.predict(
            None, dense, da.from_array(rows, chunks=(tuple(chunks), (4,))), batch_size=batch_size
        )
    assert found.chunks == (tuple(chunks), (3,))
    with lazily:
        blocks = [found.blocks[i].compute() for i in range(len(chunks))]
    assert [block.shape for block in blocks] == [(n, 3) for n in chunks]
    assert {block.dtype for block in blocks} == {found.dtype} == {np.dtype("float32")}
    if len(rows):
        close(np.concatenate(blocks), dense.predict_on_batch(rows.astype("float32")))


@pytest.mark.parametrize("kind", ["images", "columns in chunks", "unknown chunks", "a sequence of any length"])
def test_an_array_may_have(keras: Any, kind: str) -> None:
    layers = keras.layers
    rng = np.random.default_rng(2)
    if kind == "images":
        model = keras.Sequential([keras.Input((6, 6, 1)), layers.Conv2D(2, 3)])
        values: Any = rng.random((ROWS, 6, 6, 1), dtype="float32")
    elif kind == "a sequence of any length":
        model = keras.Sequential([keras.Input((None, 2)), layers.Conv1D(3, 2, padding="same")])
        values = rng.random((ROWS, 5, 2), dtype="float32")
    else:
        model = keras.Sequential([keras.Input((4,)), layers.Dense(1), layers.Reshape(())])
        values = rng.random((ROWS, 4), dtype="float32")
    lazy = da.from_array(values, chunks=(25, *values.shape[1:]))
    if kind == "columns in chunks":
        lazy = lazy.rechunk((25, 3))
    if kind == "unknown chunks":
        lazy = dd.from_dask_array(lazy).to_dask_array()
    found = dask_keras.predict(None, model, lazy, batch_size=16)
    wanted = model.predict(values, verbose=0)
    assert found.shape[1:] == wanted.shape[1:]
    with lazily:
        close(found.compute(), wanted)


@pytest.mark.parametrize("units", [1, 3])
def test_a_frame_keeps_index_and_partitions(keras: Any, X: Any, units: int) -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(units)])
    frame = pd.DataFrame(X.astype("float64"), columns=list("abcd"), index=np.arange(ROWS) * 3)
    cuts = [slice(0, 20), slice(20, 20), slice(20, None)]
    ddf = dd.from_map(lambda cut: frame[cut], cuts, meta=frame[:0], divisions=(0, 60, 60, frame.index[-1]))
    with dask.config.set(scheduler=refuse_to_run):
        found = dask_keras.predict(None, model, ddf, batch_size=16)
    assert found.divisions == ddf.divisions
    with lazily:
        result, empty = found.compute(), found.partitions[1].compute()
    pd.testing.assert_frame_equal(result, pd.DataFrame(model.predict(X, verbose=0), index=frame.index), rtol=1e-4)
    pd.testing.assert_frame_equal(found._meta, result[:0])
    pd.testing.assert_frame_equal(empty, result[:0])


def test_columns_are_numbers_of_any_kind(keras: Any, dense: Any) -> None:
    class Own(keras.Model):  # type: ignore[misc]
        def __init__(self, **keywords: Any) -> None:
            super().__init__(**keywords)
            self.dense = keras.layers.Dense(2)

        def build(self, shape: Any) -> None:
            self.dense.build(shape)
            self.built = True

        def call(self, x: Any) -> Any:
            return self.dense(x)

    own = Own()
    own.build((None, 4))
    frame = pd.DataFrame({"a": [1.5, 2.0], "b": pd.array([1, 2], "Int64"), "c": [True, False], "d": [3, 4]})
    rows = frame.astype("float32").to_numpy()
    with lazily:
        for model in (dense, own):
            found = dask_keras.predict(None, model, dd.from_pandas(frame, npartitions=1), batch_size=8)
            close(found.compute(), model.predict(rows, verbose=0))
        missing = dd.from_pandas(frame.assign(b=pd.array([1, None], "Int64")), npartitions=1)
        for model in (keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), own):
            found = dask_keras.predict(None, model, missing, batch_size=8).compute()
            assert found.isna().all(axis=1).tolist() == [False, True]
        words = dd.from_map(lambda _: frame.assign(c=["x", "y"]).astype({"c": object}), [0], meta=frame[:0])
        with pytest.raises(DataError, match=r"\['a', 'b', 'c', 'd'\] are not all of numbers"):
            dask_keras.predict(None, dense, words, batch_size=8).compute()


def test_one_number_a_row_is_a_series_and_a_matrix_a_row_an_array(keras: Any, X: Any) -> None:
    frame = pd.DataFrame(X, index=np.arange(ROWS) + 7)
    lazy = dd.from_pandas(frame, npartitions=3)
    base = [keras.Input((4,)), keras.layers.Dense(4)]
    number = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1), keras.layers.Reshape(())])
    matrix = keras.Sequential([*base, keras.layers.Reshape((2, 2))])
    with lazily:
        series = dask_keras.predict(None, number, lazy, batch_size=16).compute()
        array = dask_keras.predict(None, matrix, lazy, batch_size=16)
        assert array.shape[1:] == (2, 2)
        close(array.compute(), matrix.predict(X, verbose=0))
    pd.testing.assert_series_equal(series, pd.Series(number.predict(X, verbose=0), index=frame.index), rtol=1e-4)


# Several inputs and outputs


def both(two: Any, X: Any) -> Any:
    return two.predict([X[:, :1], X[:, 1:2]], verbose=0)


@pytest.mark.parametrize("form", ["tuple", "dict", "dict of series", "frame", "array and frame", "frame and array"])
def test_several_inputs_and_outputs(two: Any, X: Any, form: str) -> None:
    frame = pd.DataFrame({"size": X[:, 1], "name": ["x"] * ROWS, "age": X[:, 0]}, index=np.arange(ROWS) * 2)
    ddf = dd.from_pandas(frame, npartitions=3)
    arrays = [da.from_array(X[:, i : i + 1], chunks=((20, 20, 20), 1)) for i in (0, 1)]
    data = {
        "tuple": tuple(arrays),
        "dict": {"size": arrays[1].rechunk((33, 1)), "age": arrays[0]},
        "dict of series": {"age": ddf.age, "size": ddf["size"]},
        "frame": ddf,
        "array and frame": (arrays[0], ddf[["size"]]),
        "frame and array": (ddf[["age"]], arrays[1]),
    }[form]
    with dask.config.set(scheduler=refuse_to_run):
        found = dask_keras.predict(None, two, data, batch_size=16)
    assert isinstance(found, tuple)
    with lazily:
        results = dask.compute(*found)
    for lazy, result, wanted in zip(found, results, both(two, X), strict=True):
        close(result, wanted)
        assert lazy.shape[1] == result.shape[1]
        if form in ("frame", "dict of series", "frame and array"):
            assert result.index.equals(frame.index)
            assert lazy.divisions == ddf.divisions
        else:
            assert isinstance(result, np.ndarray)


def test_outputs_are_chosen_by_name(two: Any, X: Any) -> None:
    arrays = tuple(da.from_array(X[:, i : i + 1], chunks=(25, 1)) for i in (0, 1))
    price, risk = both(two, X)
    with lazily:
        close(dask_keras.predict(None, two, arrays, batch_size=16, output="risk").compute(), risk)
        chosen = dask_keras.predict(None, two, arrays, batch_size=16, output=["risk", "price"])
        for found, wanted in zip(chosen, (risk, price), strict=True):
            close(found.compute(), wanted)


def test_a_model_with_a_dict_of_outputs_gives_one(keras: Any, X: Any) -> None:
    class Doubles(keras.Model):  # type: ignore[misc]
        def __init__(self, **keywords: Any) -> None:
            super().__init__(**keywords)
            self.dense = keras.layers.Dense(2)

        def build(self, shape: Any) -> None:
            self.dense.build(shape)
            self.built = True

        def call(self, x: Any) -> Any:
            return {"one": self.dense(x), "sum": keras.ops.sum(self.dense(x), axis=-1)}

    model = Doubles()
    model(X[:1])
    found = dask_keras.predict(None, model, da.from_array(X, chunks=(25, 4)), batch_size=16)
    wanted = model.predict(X, verbose=0)
    with lazily:
        assert {name: lazy.ndim for name, lazy in found.items()} == {"one": 2, "sum": 1}
        for name, result in dask.compute(found)[0].items():
            close(result, wanted[name])


def test_rows_that_are_here_are_predicted_here(dense: Any, X: Any) -> None:
    wanted = dense.predict(X, verbose=0)
    array = dask_keras.predict(None, dense, X, batch_size=16)
    assert isinstance(array, np.ndarray)
    close(array, wanted)
    frame = dask_keras.predict(None, dense, pd.DataFrame(X, index=np.arange(ROWS) + 1), batch_size=16)
    assert frame.index[0] == 1
    close(frame, wanted)


def test_a_predict_step_of_ones_own_is_followed(keras: Any, X: Any) -> None:
    @keras.saving.register_keras_serializable("tests")
    class Rounding(keras.Model):  # type: ignore[misc]
        def predict_step(self, data: Any) -> Any:
            return keras.ops.cast(keras.ops.round(super().predict_step(data)), "int32")

    inputs = keras.Input((4,))
    model = Rounding(inputs, keras.layers.Dense(2)(inputs))
    found = dask_keras.predict(None, model, da.from_array(X, chunks=(25, 4)), batch_size=16)
    assert found.dtype == np.dtype("int32")
    with lazily:
        np.testing.assert_array_equal(found.compute(), model.predict(X, verbose=0))


# The graph, and the model on the workers


def test_the_model_is_one_node_of_the_graph(dense: Any, two: Any, X: Any) -> None:
    ddf = dd.from_pandas(pd.DataFrame(X), npartitions=4)
    for found in (
        dask_keras.predict(None, dense, da.from_array(X, chunks=(15, 4)), batch_size=16),
        dask_keras.predict(None, dense, ddf, batch_size=16),
        dask_keras.predict(None, two, {"age": ddf[0], "size": ddf[1]}, batch_size=16, output="risk"),
    ):
        (lazy,) = dask.optimize(found)
        assert sum("keras-model" in str(key) for key in dict(lazy.__dask_graph__())) == 1


@pytest.mark.parametrize("kind", ["array", "frame", "frame and array"])
def test_a_scheduler_needs_nothing_of_ours(
    dense: Any, two: Any, X: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ddf = dd.from_pandas(pd.DataFrame(X, columns=["age", "size", "c", "d"]), npartitions=2)
    array = da.from_array(X, chunks=(30, 4))
    model, data = {
        "array": (dense, array),
        "frame": (dense, ddf),
        "frame and array": (two, (ddf.age, array[:, :1])),
    }[kind]
    found = dask_keras.predict(None, model, data, batch_size=16)
    sent = dumps(dask.base.collections_to_expr(found))
    for name in list(sys.modules):
        if name.partition(".")[0] in ("keras", "tensorflow", "dask_keras", "dask_bridges", "dask_serializers"):
            monkeypatch.setitem(sys.modules, name, None)
    pickle.loads(sent).__dask_graph__()


@pytest.fixture
def rebuilt(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that this process has rebuilt, from now on, of none."""
    from dask_keras import kept

    found: list[Any] = []

    def counting(raw: bytes, rebuild: Any = kept._rebuilt) -> Any:
        found.append(rebuild(raw))
        return found[-1]

    monkeypatch.setattr(kept, "_rebuilt", counting)
    kept._models.clear()
    return found


def test_a_model_is_rebuilt_once_until_its_weights_change(keras: Any, X: Any, rebuilt: list[Any]) -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    lazy = da.from_array(X, chunks=(5, 4))

    def predicted() -> Any:
        return dask_keras.predict(None, model, lazy, batch_size=16)

    with lazily:
        before, first = predicted(), model.predict(X, verbose=0)
        close(before.compute(), first)
        model.compile("adam", "mse")
        close(predicted().compute(), first)
        uncompiled = len(rebuilt)
        model.evaluate(X, X[:, 0], verbose=0)  # which leaves running values in metrics
        close(predicted().compute(), first)
        assert len(rebuilt) == uncompiled
        model.fit(X, X[:, 0], verbose=0)
        close(predicted().compute(), model.predict(X, verbose=0))
        assert len(rebuilt) == uncompiled + 1
        close(before.compute(), first)
    assert uncompiled <= 2


def test_a_model_travels_without_its_optimizer(keras: Any, X: Any) -> None:
    from dask_keras.kept import pack

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(500), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    model.fit(X, X[:, 0], verbose=0)
    assert len(pack(model).raw) < 1.5 * sum(w.nbytes for w in model.get_weights()) + 10_000
    assert model.optimizer.built


def test_several_outputs_of_a_partition_are_predicted_together(
    two: Any, X: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dask_keras.kept import Kept

    batches: list[int] = []

    def counting(self: Any, x: Any, predict: Any = Kept.predict) -> Any:
        batches.append(1)
        return predict(self, x)

    monkeypatch.setattr(Kept, "predict", counting)
    ddf = dd.from_pandas(pd.DataFrame({"age": X[:, 0], "size": X[:, 1]}), npartitions=3)
    arrays = tuple(da.from_array(X[:, i : i + 1], chunks=(20, 1)) for i in (0, 1))
    for data in (ddf, arrays):
        batches.clear()
        with lazily:
            dask.compute(*dask_keras.predict(None, two, data, batch_size=100))
        assert len(batches) == 3


def test_models_that_are_kept_are_few(monkeypatch: pytest.MonkeyPatch, rebuilt: list[Any], keras: Any) -> None:
    from dask_keras import kept

    monkeypatch.setattr(kept, "KEEP", 0)
    packs = [kept.pack(keras.Sequential([keras.Input((2,)), keras.layers.Dense(n)])) for n in (1, 2)]
    for packed in (*packs, packs[1], packs[0]):
        kept.kept(packed.token, packed.raw)
    assert len(rebuilt) == 3


def test_threads_share_one_model(keras: Any, X: Any, rebuilt: list[Any]) -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(16), keras.layers.Dense(2)])
    found = dask_keras.predict(None, model, da.from_array(np.tile(X, (20, 1)), chunks=(13, 4)), batch_size=8)
    with dask.config.set(scheduler="threads", num_workers=8):
        close(found.compute(), np.tile(model.predict(X, verbose=0), (20, 1)))
    assert len(rebuilt) == 1
    assert threading.active_count() < 200


@cluster
def test_each_worker_rebuilds_a_model_once(keras: Any, X: Any, bridges_client: Client) -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    lazy = da.from_array(np.tile(X, (10, 1)), chunks=(20, 4))
    found = dask_keras.predict(bridges_client, model, lazy, batch_size=16)
    wanted = np.tile(model.predict(X, verbose=0), (10, 1))
    close(found.compute(), wanted)
    first = set(bridges_client.run(_identities).values())
    with Client(bridges_client.cluster, set_as_default=False) as other:
        close(other.compute(dask_keras.predict(None, model, lazy + 0, batch_size=16)).result(), wanted)
    close(found.compute(), wanted)
    again = set(bridges_client.run(_identities).values())
    assert first == again
    assert len(first) == 3
    model.set_weights([w + 1 for w in model.get_weights()])
    close(dask_keras.predict(None, model, lazy, batch_size=16).compute(), np.tile(model.predict(X, verbose=0), (10, 1)))


@cluster
def test_a_layer_that_a_worker_cannot_import_is_named(
    keras: Any, X: Any, bridges_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "only_here", types.ModuleType("only_here"))
    layer = type("Mine", (keras.layers.Layer,), {"__module__": "only_here", "call": lambda self, x: x * 2})
    sys.modules["only_here"].Mine = layer  # type: ignore[attr-defined]
    keras.saving.register_keras_serializable("only_here")(layer)
    model = keras.Sequential([keras.Input((4,)), layer()])
    found = dask_keras.predict(None, model, da.from_array(X, chunks=(30, 4)), batch_size=16)
    with pytest.raises(CannotMove, match="only_here"):
        bridges_client.compute(found).result(timeout=100)


def _identities() -> Any:
    """The model a worker used last: which one it is."""
    from dask_keras import kept

    token = next(reversed(kept._models), None)
    return token and (token, id(kept._models[token].model), os.getpid())


# Other backends


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_other_backends(backend: str) -> None:
    if not importlib.util.find_spec(backend):
        pytest.skip(f"{backend} is not installed")
    script = textwrap.dedent("""
        import dask.array as da, keras, numpy as np
        from dask.distributed import Client
        import dask_keras
        from dask_keras.kept import Kept
        X = np.random.default_rng(0).random((500, 4), dtype="float32")
        y = X.sum(1, keepdims=True)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.BatchNormalization(),
                                  keras.layers.Dense(2), keras.layers.Dense(1, kernel_regularizer="l2")])
        model.compile("adam", "mse", metrics=["mae", keras.metrics.AUC()])
        y = (y > 2).astype("float32")
        model.fit(X, y, verbose=0)
        lazy, lazy_y = da.from_array(X, chunks=((33, 0, 217, 250), 4)), da.from_array(y, chunks=(100, 1))
        with Client(processes=False, n_workers=1, threads_per_worker=4, dashboard_address=None) as client:
            lengths = set()
            def noting(self, x, predict=Kept.predict):
                lengths.add(len(x))
                return predict(self, x)
            Kept.predict = noting
            for _ in range(2):
                found = dask_keras.predict(client, model, lazy, batch_size=32).compute()
                np.testing.assert_allclose(found, model.predict(X, verbose=0), rtol=1e-5, atol=1e-5)
            if model.jit_compile:  # a compilation for each length
                assert lengths <= {1, 2, 4, 8, 16, 32}
            scores = dask_keras.evaluate(client, model, lazy, lazy_y, batch_size=32)
            np.testing.assert_allclose(scores, model.evaluate(X, y, verbose=0), rtol=1e-5)
            assert keras.backend.backend() == BACKEND
    """).replace("BACKEND", repr(backend))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


# What is refused


def test_rows_of_another_shape_are_refused_with_both(dense: Any, X: Any) -> None:
    for wrong in (da.ones((8, 3)), dd.from_pandas(pd.DataFrame(X[:, :3]), npartitions=2), da.ones(8)):
        with pytest.raises(
            DataError, match=r"rows of the shape \((3,)?\), and input .* takes rows of the shape \(4,\)"
        ):
            dask_keras.predict(None, dense, wrong, batch_size=8)


def test_missing_and_unknown_inputs_are_named(two: Any, X: Any) -> None:
    one = da.ones((8, 1))
    ddf = dd.from_pandas(pd.DataFrame(X, columns=["age", "b", "c", "d"]), npartitions=2)
    for wrong, message in (
        ({"age": one, "width": one}, r"missing \['size'\], unknown \['width'\]"),
        ((one,), r"1 input, and model .* takes 2: \['age', 'size'\]"),
        (one, "1 input, and model"),
        (ddf, r"no columns \['size'\]"),
    ):
        with pytest.raises(DataError, match=message):
            dask_keras.predict(None, two, wrong, batch_size=8)


def test_columns_that_are_no_numbers_are_named(dense: Any, X: Any) -> None:
    frame = pd.DataFrame(X, columns=list("abcd")).assign(c="text")
    with pytest.raises(DataError, match=r"no numbers.*c \(str"):
        dask_keras.predict(None, dense, dd.from_pandas(frame, npartitions=2), batch_size=8)


def test_inputs_of_different_lengths_are_refused(two: Any) -> None:
    with pytest.raises(DataError, match=r"data\['age'\] has 8 rows and data\['size'\] has 9"):
        dask_keras.predict(None, two, {"age": da.ones((8, 1)), "size": da.ones((9, 1))}, batch_size=8)


def test_an_unknown_output_is_refused(two: Any) -> None:
    with pytest.raises(DataError, match=r"output=\['cost'\] are not outputs .* \['price', 'risk'\]"):
        dask_keras.predict(None, two, (da.ones((8, 1)), da.ones((8, 1))), batch_size=8, output="cost")


def test_models_that_cannot_predict_are_refused(keras: Any) -> None:
    with pytest.raises(DataError, match=r"not built.*keras\.Input"):
        dask_keras.predict(None, keras.Sequential([keras.layers.Dense(1)]), da.ones((8, 2)), batch_size=8)
    with pytest.raises(TypeError, match=r"a keras\.Model, not dict"):
        dask_keras.predict(None, {}, da.ones((8, 2)), batch_size=8)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="batch_size is 0"):
        dask_keras.predict(None, model, da.ones((8, 2)), batch_size=0)


def test_an_output_without_a_row_for_each_row_is_refused(keras: Any) -> None:
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras.ops.sum(inputs, axis=0, keepdims=True))
    with pytest.raises(DataError, match="has no row for each row"):
        dask_keras.predict(None, model, da.ones((8, 2)), batch_size=8)


@pytest.mark.parametrize(("what", "message"), [("keras", "keras is .* and 0.0"), ("backend", "KERAS_BACKEND")])
def test_another_keras_is_refused(keras: Any, what: str, message: str) -> None:
    from dask_keras.kept import check_here

    here = {"keras": keras.__version__, "backend": keras.backend.backend()}
    check_here(here)
    with pytest.raises(PlacementError, match=message):
        check_here({**here, what: "0.0"})


def test_a_process_without_keras_is_told_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from dask_keras.kept import check_here

    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(PlacementError, match=r"this process cannot import keras.*dask-bridges\[keras\]"):
        check_here({"keras": "3", "backend": "tensorflow"})
