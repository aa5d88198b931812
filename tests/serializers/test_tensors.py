"""TensorFlow's own tensors and variables; and what Dask is told that Keras objects weigh."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from dask.sizeof import sizeof
from distributed.protocol import dumps, loads, serialize, to_serialize

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")


def move(obj: Any) -> Any:
    frames = [bytes(frame) for frame in dumps({"x": to_serialize(obj)}, frame_split_size=2**26)]
    return loads([memoryview(bytearray(frame)) for frame in frames])["x"]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "half", "int8", "int64", "bool", "complex64"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0, 4)])
def test_a_tensor_arrives(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = tf.cast(tf.reshape(tf.range(np.prod(shape, dtype=int)), shape), dtype)
    assert serialize(tensor)[0]["serializer"] == "dask"
    moved = move(tensor)
    assert (moved.dtype, moved.shape) == (tensor.dtype, tensor.shape)
    np.testing.assert_array_equal(moved.numpy(), tensor.numpy())


def test_strings_arrive() -> None:
    tensor = tf.constant([["a", "bc"], ["", "ü\0"]])
    assert move(tensor).numpy().tolist() == tensor.numpy().tolist()


def test_a_variable_arrives_and_is_its_own() -> None:
    variable = tf.Variable([1.0, 2.0], trainable=False, name="mine")
    moved = move(variable)
    assert isinstance(moved, tf.Variable)
    assert (moved.name, moved.trainable) == (variable.name, False)
    moved.assign_add([1.0, 1.0])
    assert (moved.numpy().tolist(), variable.numpy().tolist()) == ([2.0, 3.0], [1.0, 2.0])


def test_what_is_sent_is_what_was_there_when_it_was_asked_for() -> None:
    variable = tf.Variable(np.ones(100_000, "float32"))
    header, frames = serialize(variable)
    variable.assign_add(np.ones(100_000, "float32"))
    from distributed.protocol import deserialize

    assert deserialize(header, frames).numpy().max() == 1.0


def test_a_moved_model_shares_no_memory_with_the_one_it_was_made_of() -> None:
    from distributed.protocol import deserialize

    model = keras.Sequential([keras.Input((300,)), keras.layers.Dense(300)])
    moved = deserialize(*serialize(model))
    before = model.get_weights()
    moved.layers[0].kernel.assign_add(np.ones((300, 300), "float32"))
    for mine, old in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(mine, old)


def test_dask_knows_what_models_weigh() -> None:
    model = keras.Sequential([keras.Input((1000,)), keras.layers.Dense(1000)])
    assert sizeof(model) == pytest.approx(4e6, rel=0.05)
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    assert sizeof(model) == pytest.approx(12e6, rel=0.05)
    assert sizeof(model.optimizer) == pytest.approx(8e6, rel=0.05)
    assert sizeof(model.layers[0].kernel) == pytest.approx(4e6, rel=0.05)
    assert sizeof(tf.zeros(1000)) == pytest.approx(4000, rel=0.2)


def test_what_is_larger_than_a_frame_of_dasks_is_cut_and_arrives() -> None:
    variable = tf.Variable(tf.range(20_000_000, dtype="float32"))  # 80 MB
    _, frames = serialize(variable)
    assert max(memoryview(frame).nbytes for frame in frames) <= 2**26
    moved = move(variable)
    assert bool(tf.reduce_all(moved == variable))
