"""Variables, layers, optimizers and metrics by themselves; and random models."""

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers
from test_zoo import arrays, assert_same_arrays, move


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 2)])
def test_a_variable_arrives(dtype, shape):
    value = np.random.default_rng(0).integers(0, 2, size=shape).astype("int32")
    variable = keras.Variable(keras.ops.cast(value, dtype), dtype=dtype, trainable=False, name="v")
    moved = move(variable)
    assert isinstance(moved, keras.Variable)
    assert (moved.name, moved.path, moved.trainable) == ("v", "v", False)
    assert_same_arrays([moved], [variable])


def test_a_layer_arrives():
    layer = layers.Dense(3, activation="relu", name="alone")
    layer.build((None, 2))
    moved = move(layer)
    assert moved.get_config() == layer.get_config()
    assert_same_arrays(moved.weights, layer.weights)
    assert not move(layers.Dense(3)).built


def test_an_optimizer_arrives_with_its_slots():
    weight = keras.Variable(np.ones((2, 3), "float32"), name="w")
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 10))
    optimizer.apply([weight * 2], [weight])
    moved = move(optimizer)
    assert moved.get_config() == optimizer.get_config()
    assert [v.path for v in moved.variables] == [v.path for v in optimizer.variables]
    assert_same_arrays(moved.variables, optimizer.variables)
    assert not move(keras.optimizers.SGD()).built


def test_a_metric_arrives_with_what_it_has_counted():
    metric = keras.metrics.MeanAbsoluteError()
    metric.update_state([1.0, 2.0], [1.5, 4.0])
    assert float(move(metric).result()) == float(metric.result())


ACTIVATIONS = st.sampled_from(["relu", "gelu", "tanh", "linear"])
BLOCKS = st.one_of(
    st.builds(lambda units, activation: layers.Dense(units, activation=activation), st.integers(1, 5), ACTIVATIONS),
    st.builds(lambda rate: layers.Dropout(rate, seed=1), st.sampled_from([0.0, 0.5])),
    st.builds(layers.BatchNormalization),
    st.builds(layers.LayerNormalization),
    st.builds(lambda units: layers.Dense(units, use_bias=False, trainable=False), st.integers(1, 4)),
)
OPTIMIZERS = st.sampled_from(
    ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Nadam", "Ftrl", "Lion", "Adafactor", "Lamb"]
)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_stack_of_layers_arrives_with_any_optimizer(data):
    policy = data.draw(st.sampled_from(["float32", "mixed_bfloat16", "float16"]))
    keras.config.set_dtype_policy(policy)
    try:
        blocks = data.draw(st.lists(BLOCKS, min_size=1, max_size=4))
        if data.draw(st.booleans()):
            blocks = [layer.from_config(layer.get_config()) for layer in blocks]
            model = keras.Sequential([keras.Input((3,)), *blocks, layers.Dense(1)])
        else:
            x = inputs = keras.Input((3,))
            for block in blocks:
                x = block(x)
            model = keras.Model(inputs, layers.Dense(1)(x))
    finally:
        keras.config.set_dtype_policy("float32")
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    if data.draw(st.booleans()):
        optimizer = getattr(keras.optimizers, data.draw(OPTIMIZERS))(learning_rate=0.01)
        model.compile(optimizer, data.draw(st.sampled_from(["mse", "mae", keras.losses.Huber(0.3)])), metrics=["mae"])
        optimizer.build(model.trainable_variables)
        optimizer.apply([keras.ops.ones(v.shape, v.dtype) for v in model.trainable_variables])
    moved = move(model)
    assert moved.get_config() == model.get_config()
    assert moved.compiled == model.compiled
    assert_same_arrays(
        moved.variables if not model.compiled else moved.weights,
        model.variables if not model.compiled else model.weights,
    )
    if model.compiled:
        assert moved.get_compile_config() == model.get_compile_config()
        assert_same_arrays(moved.optimizer.variables, model.optimizer.variables)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(moved(x)), keras.ops.convert_to_numpy(model(x)))
    assert len(arrays(moved.weights)) == len(model.weights)
