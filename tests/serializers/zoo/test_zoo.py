"""Every model arrives whole. Run once for each Keras backend, each in a process of its own (test_backends.py)."""

import keras
import numpy as np
import pytest
from distributed.protocol import dumps, loads, to_serialize
from models import ZOO

import dask_serializers.hooks

dask_serializers.hooks.activate()


def move(obj):
    """`obj` as the receiver of a Dask message gets it: cut into frames of the wire's size, compressed, rebuilt."""
    frames = [bytes(frame) for frame in dumps({"x": to_serialize(obj)}, frame_split_size=2**26)]
    return loads([memoryview(bytearray(frame)) for frame in frames])["x"]


def arrays(variables):
    return [keras.ops.convert_to_numpy(variable.value) for variable in variables]


def assert_same_arrays(these, those):
    assert [v.dtype for v in these] == [v.dtype for v in those]
    for mine, theirs in zip(arrays(these), arrays(those), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def assert_same_outputs(these, those):
    keras.tree.map_structure(np.testing.assert_array_equal, these, those)


def optimizers(model):
    return [each for each in vars(model).values() if isinstance(each, keras.Optimizer)]


@pytest.fixture(params=ZOO)
def animal(request):
    keras.utils.set_random_seed(7)
    model, x, y = ZOO[request.param]()
    if y is not None:
        model.fit(x, y, epochs=1, batch_size=8, verbose=0)
    return model, x, y


def test_a_model_arrives_whole_and_trains_on_as_if_it_had_not_moved(animal):
    model, x, y = animal
    moved = move(model)
    assert_same(moved, model)
    again = move(moved)
    assert_same_arrays(again.weights, model.weights)
    if x is not None:
        outputs = [each.predict(x, verbose=0) for each in (model, moved, again)]
        assert_same_outputs(outputs[1], outputs[0])
        assert_same_outputs(outputs[2], outputs[0])
    if y is not None:
        assert_trains_alike(moved, model, x, y)


def assert_same(moved, model):
    assert type(moved) is type(model)
    assert moved.get_config() == model.get_config()
    assert moved.name == model.name
    assert moved.built == model.built
    assert moved.compiled == model.compiled
    assert [v.path for v in moved.weights] == [v.path for v in model.weights]
    assert [v.path for v in moved.trainable_variables] == [v.path for v in model.trainable_variables]
    assert [layer.trainable for layer in moved.layers] == [layer.trainable for layer in model.layers]
    assert_same_arrays(moved.weights, model.weights)
    assert_same_arrays(moved.non_trainable_variables, model.non_trainable_variables)
    if model.compiled:
        assert moved.get_compile_config() == model.get_compile_config()
        assert moved.jit_compile == model.jit_compile
    for mine, theirs in zip(optimizers(moved), optimizers(model), strict=True):
        assert mine.get_config() == theirs.get_config()
        assert mine.built == theirs.built
        assert [v.path for v in mine.variables] == [v.path for v in theirs.variables]
        assert_same_arrays(mine.variables, theirs.variables)


def assert_trains_alike(moved, model, x, y):
    histories = []
    for each in (model, moved):
        keras.utils.set_random_seed(11)
        histories.append(each.fit(x, y, epochs=1, batch_size=8, shuffle=False, verbose=0).history)
    assert histories[0] == histories[1]
    assert_same_arrays(moved.weights, model.weights)
    assert_same_arrays(moved.optimizer.variables, model.optimizer.variables)
