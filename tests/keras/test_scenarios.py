"""What people train with Keras, as its own trainer tests have it, comes out on a cluster as in one process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import Client

from dask_bridges import DataError, MemberFailed
from dask_bridges.testing import leftovers, wait_until_free
from dask_keras.layout import Layout
from dask_tf import encoding

sys.path.insert(0, str(Path(__file__).parent))
from equality import distributed, order

keras = pytest.importorskip("keras")
tf = pytest.importorskip("tensorflow")
dask_keras = pytest.importorskip("dask_keras")
layers, ops = keras.layers, keras.ops

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(sys.platform != "linux", reason="ranks live in child processes, which need Linux"),
]

#: Rows of the two ranks, of a batch over both, and those to validate with.
LAYOUT, BATCH, VALID = (25, 15), 8, 13
ROWS = sum(LAYOUT)


def numbers(*shape: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).normal(size=(ROWS, *shape)).astype("float32")


def mapped(function: Callable[[Any], Any], given: Any) -> Any:
    return None if given is None else keras.tree.map_structure(function, given)


def spread(given: Any, layout: tuple[int, ...] = LAYOUT) -> Any:
    return mapped(lambda array: distributed(array, layout), given)


class Both:
    """A training on the cluster, and the same in one process."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def same(
        self, make: Callable[[], Any], x: Any, y: Any = None, weight: Any = None, *, near: float = 1e-6, **more: Any
    ) -> tuple[Any, Any]:
        """Train and compare what ``make()`` makes, with some of the rows to validate with; both models."""
        alone, together = fresh(make), fresh(make)
        options = {"epochs": 2, "batch_size": BATCH, "shuffle": False, "verbose": 0, **more}
        at, some = order(LAYOUT, BATCH), (x, y, weight)[: 2 + (weight is not None)]
        held_out = tuple(mapped(lambda array: array[:VALID], part) for part in some)
        rows = [mapped(lambda array: array[at], part) for part in (x, y, weight)]
        alone.fit(rows[0], rows[1], sample_weight=rows[2], validation_data=held_out, **options)
        dask_keras.fit(
            self.client, together, spread(x), spread(y), sample_weight=spread(weight), workers=2,
            validation_data=tuple(spread(part, (5, 8)) for part in held_out), **options,
        )  # fmt: skip
        assert leftovers(self.client) == {}
        equal(alone, together, near)
        return alone, together


def fresh(make: Callable[[], Any]) -> Any:
    keras.utils.set_random_seed(4)
    return make()


def equal(alone: Any, together: Any, near: float = 1e-6) -> None:
    """Weights, the optimizer and the history; losses of single outputs are means over batches on TensorFlow."""
    for ours, theirs in zip(values_of(together), values_of(alone), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=near)
    ours, theirs = together.history.history, alone.history.history
    assert ours.keys() == theirs.keys()
    for name in theirs:
        if name in ("loss", "val_loss") or not name.endswith("_loss"):
            np.testing.assert_allclose(ours[name], theirs[name], atol=near, rtol=near, err_msg=name)


def values_of(model: Any) -> list[Any]:
    return [
        np.asarray(ops.convert_to_numpy(each.value), "float64")
        for each in (*model.variables, *model.optimizer.variables)
    ]


@pytest.fixture
def both(bridges_client: Client) -> Both:
    return Both(bridges_client)


# Inputs, outputs and weights in structures


class Nested(keras.Model):  # type: ignore[misc]
    """Takes and gives dicts, is built by its first batch, and halves one output where it does not train."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        drawn = (keras.initializers.GlorotUniform(seed=seed) for seed in range(3))  # the same in every process
        self.left, self.right, self.end = (layers.Dense(n, kernel_initializer=next(drawn)) for n in (3, 2, 1))

    def call(self, inputs: Any, training: bool = False) -> Any:
        left, right = self.left(inputs["numbers"]["left"]), self.right(inputs["numbers"]["right"])
        return {"a": self.end(ops.concatenate([left, right], 1)) * (1.0 if training else 0.5), "b": right}


@pytest.mark.slow
def test_structures_of_inputs_outputs_weights_and_metrics(both: Both) -> None:
    def make() -> Any:
        model = Nested()
        model.compile(
            "adam", {"a": "mse", "b": "mae"}, loss_weights={"a": 1.0, "b": 0.5}, metrics={"a": ["mae"]},
            weighted_metrics={"b": ["mse"]},
        )  # fmt: skip
        return model

    x = {"numbers": {"left": numbers(3), "right": numbers(2, seed=2)}}
    y, weight = {"a": numbers(1, seed=3), "b": numbers(2, seed=4)}, {"a": numbers() ** 2, "b": numbers(seed=5) ** 2}
    both.same(make, x, y, weight)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["list", "dict"])
def test_an_output_without_a_loss(both: Both, form: str) -> None:
    def make() -> Any:
        inputs = keras.Input((3,))
        hidden = layers.Dense(4, "tanh")(inputs)
        a, b = layers.Dense(1, name="a")(hidden), layers.Dense(2, name="b")(hidden)
        model = keras.Model(inputs, [a, b] if form == "list" else {"a": a, "b": b})
        model.compile("sgd", ["mse", None] if form == "list" else {"a": "mse"})
        return model

    y = numbers(1, seed=3)
    both.same(make, numbers(3), y if form == "list" else {"a": y, "b": numbers(2)})


def test_a_model_gets_the_columns_that_it_takes_and_no_others() -> None:
    part = {"X": pd.DataFrame({"a": [1.0], "b": [2.0], "city": [3]}), "w['p']": np.ones(1), "w['q']": np.zeros(1)}
    schema = encoding.merge([encoding.look(part)], tuple(part))
    ((_, blocks),) = encoding.blocks(part, schema)
    layout = Layout("X", weight={"p": "w['p']", "q": "w['q']"}, inputs=("a", "city"))
    inputs, weights = layout.element(schema, tuple(blocks))
    assert {name: column.tolist() for name, column in inputs.items()} == {"a": [1.0], "city": [3]}
    assert {name: weight.tolist() for name, weight in weights.items()} == {"p": [1.0], "q": [0.0]}


@pytest.mark.slow
@pytest.mark.parametrize("outputs", ["one of two columns", "two by their names"])
def test_frames_have_the_inputs_and_the_targets_in_columns(both: Both, outputs: str) -> None:
    frame = pd.DataFrame(numbers(4), columns=list("abcd")).assign(city=np.arange(ROWS) % 3, c=numbers(seed=7))

    def make() -> Any:
        inputs = {
            name: keras.Input((1,), name=name, dtype="int32" if name == "city" else None) for name in ("a", "city")
        }
        joined = layers.Concatenate()([inputs["a"], layers.Flatten()(layers.Embedding(3, 2)(inputs["city"]))])
        if outputs == "one of two columns":
            model = keras.Model(inputs, layers.Dense(2)(joined))
            model.compile("adam", "mse")
        else:
            model = keras.Model(inputs, {name: layers.Dense(1, name=name)(joined) for name in "cd"})
            model.compile("adam", {"c": "mse", "d": "mae"})
        return model

    alone, together = fresh(make), fresh(make)
    x = {name: frame[[name]].to_numpy() for name in ("a", "city")}
    one = outputs == "one of two columns"
    y: Any = frame[["c", "d"]].to_numpy() if one else {name: frame[[name]].to_numpy() for name in "cd"}
    at = order((20, 20), BATCH)
    options = {"epochs": 2, "batch_size": BATCH, "shuffle": False, "verbose": 0}
    alone.fit(mapped(lambda array: array[at], x), mapped(lambda array: array[at], y), **options)
    lazy = dd.from_pandas(frame, npartitions=2)
    dask_keras.fit(both.client, together, lazy[["a", "b", "city"]], lazy[["c", "d"]], workers=2, **options)
    equal(alone, together)


# Losses


class Small(layers.Layer):  # type: ignore[misc]
    """Adds what its inputs are as a loss."""

    def call(self, inputs: Any) -> Any:
        self.add_loss(ops.mean(ops.square(inputs - 0.5)))
        return inputs


@pytest.mark.slow
def test_losses_of_layers_alone_with_constraints_and_frozen_layers(both: Both) -> None:
    def make() -> Any:
        first = layers.Dense(4, "tanh", activity_regularizer="l2", kernel_constraint="non_neg", bias_regularizer="l1")
        model = keras.Sequential([keras.Input((3,)), first, layers.Dense(4, trainable=False), Small()])
        model.compile(keras.optimizers.SGD(0.1))
        return model

    _, together = both.same(make, numbers(3))
    assert (together.layers[0].kernel.numpy() >= 0).all()
    np.testing.assert_array_equal(together.layers[1].kernel, fresh(make).layers[1].kernel)


class OwnLoss(keras.Model):  # type: ignore[misc]
    """Computes its loss itself, and a metric with it."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        drawn = (keras.initializers.GlorotUniform(seed=seed) for seed in range(2))  # the same in every process
        self.hidden = layers.Dense(4, "tanh", kernel_initializer=next(drawn))
        self.end = layers.Dense(1, kernel_initializer=next(drawn))
        self.far = keras.metrics.Mean(name="far")

    def call(self, inputs: Any) -> Any:
        return self.end(self.hidden(inputs))

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        apart = ops.square(y - y_pred[:, 0])
        self.far.update_state(apart)
        return ops.mean(apart) + 0.1 * ops.mean(ops.abs(x))


@pytest.mark.slow
def test_a_loss_that_the_model_computes_itself(both: Both) -> None:
    def make() -> Any:
        model = OwnLoss()
        model.compile("adam", metrics=["mae"])
        return model

    _, together = both.same(make, numbers(3), numbers(seed=3))
    assert set(together.history.history) == {"loss", "far", "mae", "val_loss", "val_far", "val_mae"}


@pytest.mark.slow
def test_a_mask_that_ends_before_the_output(both: Both) -> None:
    def make() -> Any:
        stack = [layers.Embedding(9, 3, mask_zero=True), layers.LSTM(4), layers.Dense(1, "sigmoid")]
        model = keras.Sequential([keras.Input((6,), dtype="int32"), *stack])
        model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
        return model

    words = np.random.default_rng(2).integers(0, 9, size=(ROWS, 6)).astype("int32")
    both.same(make, words, (numbers() > 0).astype("float32"))


# Precision and compilation


@pytest.mark.slow
def test_half_precision_with_a_scaled_loss(both: Both) -> None:
    def make() -> Any:
        stack = [layers.Dense(4, "tanh", dtype="mixed_float16"), layers.Dense(1, dtype="mixed_float16")]
        model = keras.Sequential([keras.Input((3,)), *stack])
        scaled = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.05), initial_scale=2.0**30, dynamic_growth_steps=4
        )
        model.compile(scaled, "mse")
        return model

    alone, together = both.same(make, numbers(3), numbers(seed=3), near=4e-3)
    assert float(together.optimizer.dynamic_scale) == float(alone.optimizer.dynamic_scale) < 2.0**30


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"jit_compile": True}, {"run_eagerly": True}], ids=str)
def test_a_model_stays_compiled_as_it_is(both: Both, how: dict[str, bool]) -> None:
    def make() -> Any:
        model = network()
        model.compile("adam", "mse", **how)
        return model

    _, together = both.same(make, numbers(3), numbers(seed=3))
    assert {name: getattr(together, name) for name in how} == how


# Epochs


def network() -> Any:
    return keras.Sequential([keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(1)])


def dense() -> Any:
    model = network()
    model.compile("adam", "mse", metrics=["mae"])
    return model


@pytest.mark.slow
@pytest.mark.parametrize("steps", [3, 7])
def test_epochs_of_other_lengths_than_a_pass_go_on_in_the_rows(both: Both, steps: int) -> None:
    alone, together = fresh(dense), fresh(dense)
    x, y, at = numbers(3), numbers(seed=3), order(LAYOUT, BATCH)
    options = {"initial_epoch": 1, "epochs": 4, "steps_per_epoch": steps, "validation_freq": [2, 4], "verbose": 0}
    passes = tf.data.Dataset.from_tensor_slices((x[at], y[at])).batch(BATCH).repeat()
    alone.fit(passes.skip(steps), validation_data=(x[:VALID], y[:VALID]), **options)
    dask_keras.fit(
        both.client, together, spread(x), spread(y), workers=2, batch_size=BATCH, shuffle=False,
        validation_data=(spread(x[:VALID], (5, 8)), spread(y[:VALID], (5, 8))), **options,
    )  # fmt: skip
    assert together.history.epoch == alone.history.epoch == [1, 2, 3]
    assert len(together.history.history["val_loss"]) == 2
    equal(alone, together)


@pytest.mark.slow
def test_fit_after_fit_with_layers_thawed_in_between(both: Both) -> None:
    x, y, at = numbers(3), numbers(seed=3), order(LAYOUT, BATCH)
    alone, together = fresh(network), fresh(network)
    for thawed in (False, True):
        for model in (alone, together):
            model.layers[0].trainable = thawed
            model.compile("adam", "mse")
        for _ in range(2):
            alone.fit(x[at], y[at], batch_size=BATCH, shuffle=False, verbose=0)
            dask_keras.fit(both.client, together, spread(x), spread(y), workers=2, batch_size=BATCH, shuffle=False)
            equal(alone, together)
        assert int(together.optimizer.iterations) == 2 * ROWS // BATCH


# What cannot be merged


class Largest(keras.metrics.Metric):  # type: ignore[misc]
    """A metric that is no sum over rows."""

    def __init__(self, name: str = "largest", **keywords: Any) -> None:
        super().__init__(name=name, **keywords)
        self.value = self.add_variable((), initializer="zeros", name="value")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.value.assign(ops.maximum(self.value, ops.max(y_pred)))

    def result(self) -> Any:
        return self.value

    def reset_state(self) -> None:
        self.value.assign(-1e9)


@pytest.mark.slow
def test_a_metric_that_is_no_sum_is_refused(bridges_client: Client) -> None:
    model = fresh(dense)
    model.compile("adam", "mse", metrics=[Largest()])
    with pytest.raises(DataError, match=r"largest/value starts at other values than zero.*leave the metric out"):
        dask_keras.fit(bridges_client, model, spread(numbers(3)), spread(numbers()), workers=2)
    wait_until_free(bridges_client, timeout=30)


@pytest.mark.slow
def test_a_model_without_any_loss_says_so(bridges_client: Client) -> None:
    inputs = keras.Input((3,))
    model = type("Ours", (keras.Model,), {})(inputs, layers.Dense(1)(inputs))  # might add a loss, and does not
    model.compile("sgd")
    with pytest.raises(MemberFailed, match="No loss to compute"):
        dask_keras.fit(bridges_client, model, spread(numbers(3)), spread(numbers()), workers=2)
    wait_until_free(bridges_client, timeout=30)
