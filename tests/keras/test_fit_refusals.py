"""What cannot be trained is refused with the reason, before anything starts where that can be seen."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import Client

from dask_bridges import DataError, MemberFailed, PlacementError
from dask_bridges.testing import leftovers, wait_until_free
from dask_bridges.testing.packages import another_version, package_missing

keras = pytest.importorskip("keras")
dask_keras = pytest.importorskip("dask_keras")
layers = keras.layers

pytestmark = pytest.mark.cluster

ROWS, CHUNK = 24, 8


def array(*shape: int, dtype: str = "float32", rows: int = ROWS) -> Any:
    return da.zeros((rows, *shape), chunks=(CHUNK, *shape), dtype=dtype)


def model_of(*stack: Any, loss: Any = "mse", shape: tuple[int, ...] = (3,), **options: Any) -> Any:
    model = keras.Sequential([keras.Input(shape), *(stack or (layers.Dense(1),))])
    model.compile("sgd", loss, **options)
    return model


def classifier(loss: str) -> Any:
    return model_of(layers.Dense(4, "softmax"), loss=loss)


class OwnStep(keras.Model):  # type: ignore[misc]
    def train_step(self, data: Any) -> Any:
        return {"loss": 0.0}


def own_step() -> Any:
    inputs = keras.Input((3,))
    model = OwnStep(inputs, layers.Dense(1)(inputs))
    model.compile("sgd", "mse")
    return model


def uncompiled() -> Any:
    return keras.Sequential([keras.Input((3,)), layers.Dense(1)])


def without_loss() -> Any:
    model = uncompiled()
    model.compile("sgd")
    return model


def masked() -> Any:
    return model_of(layers.Embedding(9, 2, mask_zero=True), layers.Dense(1), shape=(5,))


def two_inputs() -> Any:
    left, right = keras.Input((3,), name="left"), keras.Input((2,), name="right")
    model = keras.Model([left, right], layers.Dense(1)(layers.Concatenate()([left, right])))
    model.compile("sgd", "mse")
    return model


def unbuilt() -> Any:
    model = keras.Sequential([layers.Dense(4, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def several_losses() -> Any:
    inputs = keras.Input((3,))
    model = keras.Model(inputs, {"a": layers.Dense(1, name="a")(inputs), "b": layers.Dense(4, name="b")(inputs)})
    model.compile("sgd", {"a": "mse", "b": "categorical_crossentropy"})
    return model


class Call:
    """Trains, and sees to it that nothing has started and the model is as it was."""

    def __init__(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        self.client = client
        self.started: list[Any] = []
        from dask_bridges.gang import Gang

        monkeypatch.setattr(Gang, "run", self._run)

    async def _run(self) -> None:
        raise AssertionError("it started")

    def refused(self, error: type[Exception], said: str, model: Any, *data: Any, **options: Any) -> None:
        before = state(model)
        with pytest.raises(error, match=said):
            dask_keras.fit(self.client, model, *data, **options)
        assert state(model) == before
        assert leftovers(self.client) == {}


def state(model: Any) -> Any:
    if not isinstance(model, keras.Model):
        return None
    weights = [weight.tobytes() for weight in model.get_weights()]
    return weights, model.built, model.compiled, type(model), getattr(getattr(model, "_compile_loss", None), "built", 0)


@pytest.fixture
def call(bridges_client: Client, monkeypatch: pytest.MonkeyPatch) -> Call:
    return Call(bridges_client, monkeypatch)


# The model


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (uncompiled, DataError, r"model 'sequential\w*' is not compiled: call model.compile"),
        (without_loss, DataError, r"model 'sequential\w*' is compiled without a loss, and none of its layers adds one"),
        (own_step, DataError, r"model 'own_step\w*' overrides train_step\(\) in OwnStep"),
        (lambda: model_of(steps_per_execution=4), DataError, "steps_per_execution=4.*Compile it without"),
        (
            lambda: model_of(loss=keras.losses.MeanSquaredError(reduction="sum")),
            DataError,
            "loss 'mean_squared_error' of model .* has reduction='sum': only means",
        ),
        (lambda: "a model", TypeError, "model is a keras.Model, not str"),
    ],
)
def test_models_that_cannot_be_divided_are_refused(
    call: Call, make: Callable[[], Any], error: type[Exception], said: str
) -> None:
    call.refused(error, said, make(), array(3), array())


def test_a_mask_that_reaches_the_loss_is_refused_and_one_that_ends_before_is_not(call: Call) -> None:
    words = array(5, dtype="int32")
    call.refused(DataError, r"outputs of model 'sequential\w*' carry a mask.*not over rows", masked(), words, array(5))
    ended = model_of(layers.Embedding(9, 2, mask_zero=True), layers.LSTM(2), layers.Dense(1), shape=(5,))
    call.refused(AssertionError, "it started", ended, words, array())


# Rows and labels


@pytest.mark.parametrize(
    ("make", "X", "y", "said"),
    [
        (
            model_of,
            (4,),
            (),
            r"input 'keras_tensor\w*' of model .* takes rows of shape \(3,\), and X has rows .*\(4,\)",
        ),
        (model_of, (3, 2), (), r"takes rows of shape \(3,\), and X has rows of shape \(3, 2\)"),
        (two_inputs, (3,), (), r"model 'functional\w*' has 2 inputs, and X is 1 collections"),
        (lambda: classifier("sparse_categorical_crossentropy"), (3,), (4,), r"y of shape \(4,\) a row, to outputs of"),
        (lambda: classifier("categorical_crossentropy"), (3,), (), r"outputs of shape \(4,\), with the loss categori"),
        (lambda: classifier("categorical_crossentropy"), (3,), (5,), r"y of shape \(5,\) a row"),
        (lambda: model_of(layers.Dense(2), loss="binary_crossentropy"), (3,), (3,), "with the loss binary_cross"),
        (lambda: model_of(layers.Dense(2)), (3,), (3,), r"y of shape \(3,\) a row, to outputs of shape \(2,\)"),
        (unbuilt, (3,), (4,), r"y of shape \(4,\) a row, to outputs of shape \(4,\), with the loss sparse"),
        (several_losses, (3,), (), "with the loss mse, categorical_crossentropy"),
    ],
)
def test_shapes_that_do_not_go_together_are_named(
    call: Call, make: Callable[[], Any], X: tuple[int, ...], y: tuple[int, ...], said: str
) -> None:
    call.refused(DataError, said, make(), array(*X), array(*y, dtype="int32"))


def test_targets_of_several_outputs_are_told_apart(call: Call) -> None:
    good, bad = {"a": array(), "b": array(4)}, {"a": array(), "b": array(3)}
    call.refused(AssertionError, "it started", several_losses(), array(3), good)
    call.refused(DataError, r"y of shape \(\) and shape \(3,\) a row", several_losses(), array(3), bad)
    call.refused(DataError, "y of none a row", model_of(), array(3))


def test_weights_that_do_not_go_with_the_targets_are_refused(call: Call) -> None:
    call.refused(DataError, "cannot be trained", model_of(), array(3), array(), sample_weight=array(7))
    call.refused(DataError, "sample_weight goes with targets.*no y", model_of(), array(3), sample_weight=array())
    targets = {"a": array(), "b": array(4)}
    weights = {"a": array(), "c": array()}
    call.refused(DataError, "cannot be trained", several_losses(), array(3), targets, sample_weight=weights)
    weights = {"a": array(), "b": array()}
    call.refused(AssertionError, "it started", several_losses(), array(3), targets, sample_weight=weights)
    of_classes = {"class_weight": {0: 1.0, 1: 2.0}}
    call.refused(
        DataError, "class_weight is for models with one output", several_losses(), array(3), targets, **of_classes
    )


def test_a_frame_is_one_target_or_those_of_several_outputs(call: Call) -> None:
    frame = dd.from_dask_array(array(3), columns=list("abc"))
    call.refused(AssertionError, "it started", model_of(layers.Dense(2)), array(3), frame[["a", "b"]])
    call.refused(
        DataError, r"y of shape \(3,\) a row, to outputs of shape \(2,\)", model_of(layers.Dense(2)), array(3), frame
    )
    call.refused(AssertionError, "it started", model_of(), frame, frame["a"])
    inputs = keras.Input((3,))
    two = keras.Model(inputs, {name: layers.Dense(1, name=name)(inputs) for name in "ab"})
    two.compile("sgd", {"a": "mse", "b": "mae"})
    call.refused(AssertionError, "it started", two, array(3), frame[["b", "a"]])
    call.refused(DataError, "cannot be trained", two, array(3), frame[["b", "c"]])


@pytest.mark.parametrize("role", ["X", "y", "sample_weight", "validation_y"])
def test_what_is_no_dask_collection_is_named(call: Call, role: str) -> None:
    given: dict[str, Any] = {"X": array(3), "y": array(), "sample_weight": array(), "validation_y": array()}
    given[role] = pd.Series(np.zeros(ROWS)) if role == "sample_weight" else np.zeros((ROWS, 3)[: 1 + (role == "X")])
    X, y = given["X"], given["y"]
    options = {"sample_weight": given["sample_weight"], "validation_data": (array(3), given["validation_y"])}
    call.refused(
        DataError, rf"{role} is a (numpy ndarray|pandas Series), not a Dask collection", model_of(), X, y, **options
    )


def test_unequal_lengths_are_named(call: Call) -> None:
    call.refused(DataError, r"X.*24.*y.*16|y.*16.*X.*24", model_of(), array(3), array(rows=16))
    validation = {"validation_data": (array(3), array(rows=16))}
    call.refused(DataError, r"validation_X.*24.*validation_y.*16", model_of(), array(3), array(), **validation)
    call.refused(DataError, "X has no rows", model_of(), array(3)[:0], array()[:0])


# Options


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"epochs": 0}, DataError, "epochs=0: pass a whole number"),
        ({"epochs": 2.0}, DataError, r"epochs=2\.0"),
        ({"batch_size": "32"}, DataError, "batch_size='32'"),
        ({"batch_size": None}, DataError, "batch_size=None"),
        ({"steps_per_epoch": -1}, DataError, "steps_per_epoch=-1"),
        ({"initial_epoch": -1}, DataError, "initial_epoch=-1"),
        ({"initial_epoch": "1"}, DataError, "initial_epoch='1'"),
        ({"validation_freq": 0}, DataError, "validation_freq=0"),
        ({"validation_freq": 1.5}, DataError, r"validation_freq=1\.5"),
        ({"seed": "x"}, DataError, "seed='x'"),
        ({"class_weight": {0: 1.0}, "sample_weight": array()}, DataError, "class_weight and sample_weight"),
        ({"class_weight": [1.0, 2.0]}, DataError, r"class_weight=\[1\.0, 2\.0\]: pass a dict"),
        ({"validation_data": array(3)}, DataError, r"validation_data is a tuple \(X, y\)"),
        ({"workers": 4}, PlacementError, "workers=4, and the cluster has 3 to use: tcp"),
        ({"workers": 0}, PlacementError, "workers=0"),
        ({"workers": ["tcp://1.2.3.4:5"]}, PlacementError, r"workers=\['tcp://1\.2\.3\.4:5'\] are not in the cluster"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    call: Call, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    call.refused(error, said, model_of(), array(3), array(), **options)


def test_more_workers_than_rows_are_refused(call: Call) -> None:
    call.refused(
        DataError, "X has 2 rows, which are fewer than the 3", model_of(), array(3)[:2], array()[:2], workers=3
    )


# The workers


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (package_missing, r'worker {} cannot import keras .*pip install "dask-bridges\[keras\]"'),
        (partial(another_version, version="1.0.0"), r"keras is 1\.0\.0 on worker {} and 3\.\S+ on the client"),
    ],
    ids=["missing", "another version"],
)
def test_a_worker_without_keras_or_with_another_is_named(call: Call, change: Callable[..., Any], said: str) -> None:
    worker = sorted(call.client.scheduler_info(n_workers=-1)["workers"])[1]
    with change(call.client, worker, package="keras"):
        call.refused(PlacementError, said.format(worker), model_of(), array(3), array())


def test_a_layer_that_workers_cannot_import_is_named(bridges_client: Client) -> None:
    code = "import keras\nclass Homemade(keras.layers.Dense):\n    pass\n"
    module = types.ModuleType("only_on_the_client")
    sys.modules[module.__name__] = module
    exec(code, vars(module))
    try:
        model = model_of(module.Homemade(1))
        before = state(model)
        with pytest.raises(MemberFailed, match=r"needs module only_on_the_client.*Install it on the workers"):
            dask_keras.fit(bridges_client, model, array(3), array())
    finally:
        del sys.modules[module.__name__]
    assert state(model) == before
    wait_until_free(bridges_client, timeout=30)


@pytest.mark.slow
def test_labels_out_of_range_come_out_with_the_frameworks_words(bridges_client: Client) -> None:
    model = classifier("sparse_categorical_crossentropy")
    before = state(model)
    with pytest.raises(MemberFailed, match=r"label value of 7 which is outside the valid range of \[0, 4\)"):
        dask_keras.fit(bridges_client, model, array(3), array(dtype="int32") + 7)
    assert state(model) == before
    wait_until_free(bridges_client, timeout=30)


@pytest.mark.slow
def test_floats_as_classes_train_as_in_keras(bridges_client: Client) -> None:
    model = classifier("sparse_categorical_crossentropy")
    history = dask_keras.fit(bridges_client, model, array(3), array() + 1.0, batch_size=ROWS)
    assert history.history["loss"] == pytest.approx([np.log(4)], rel=1e-5)
