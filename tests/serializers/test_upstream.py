"""Private names of Keras that dask_serializers.keras.upstream touches are as it takes them to be."""

from __future__ import annotations

import inspect

import pytest

keras = pytest.importorskip("keras")


def test_keras_still_saves_what_our_walk_finds() -> None:
    from keras.src.saving import saving_lib

    from dask_serializers.keras import upstream

    inner = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model = keras.Sequential([keras.Input((2,)), inner, keras.layers.BatchNormalization()])
    model.compile("adam", "mse", metrics=["mae"])
    for each in (model, inner, model.optimizer, *model.layers, *model.metrics):
        theirs = [name for name, _ in saving_lib._walk_saveable(each)]
        assert [name for name, _ in upstream._held(each)] == theirs


def test_a_variable_made_in_a_stateless_scope_waits_for_its_value() -> None:
    from dask_serializers.keras import upstream

    drawn = []

    def initializer(*args: object, **kwargs: object) -> object:
        drawn.append(1)
        return keras.ops.ones((2,))

    with upstream.uninitialized():
        variable = keras.Variable(initializer, shape=(2,))
        upstream.give_value(variable, keras.ops.convert_to_tensor([3.0, 4.0]))
    assert not drawn
    assert keras.ops.convert_to_numpy(variable.value).tolist() == [3.0, 4.0]


def test_hubers_delta_is_still_missing_from_its_config() -> None:
    """When this fails, Keras describes it: `missing_from_config` can go."""
    assert "delta" not in keras.losses.Huber(0.5).get_config()


def test_sequential_still_forgets_its_dtype_policy() -> None:
    """When this fails, Keras keeps it: `dtype_policy` and `Arriving.set_policies` can go."""
    keras.config.set_dtype_policy("float16")
    try:
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    finally:
        keras.config.set_dtype_policy("float32")
    assert keras.Sequential.from_config(model.get_config()).dtype_policy.name == "float32"


def test_the_patched_functions_have_the_signatures_we_give_them() -> None:
    from keras.src.models import Sequential
    from keras.src.saving import serialization_lib

    from dask_serializers.keras import upstream

    assert list(inspect.signature(upstream._describe).parameters) == ["obj"]
    assert list(inspect.signature(upstream._describe_in_lambda).parameters) == ["self", "fn"]
    assert list(inspect.signature(upstream._rebuild).parameters) == ["self"]
    assert list(inspect.signature(upstream._sequential_from_config).parameters) == ["cls", "config", "custom_objects"]
    assert callable(serialization_lib.deserialize_keras_object)
    assert Sequential is keras.Sequential


def test_outside_of_a_transfer_keras_behaves_as_ever() -> None:
    from distributed.protocol import deserialize, serialize

    model = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x)])
    deserialize(*serialize(model))
    with pytest.warns(UserWarning, match="lambda"):
        keras.saving.serialize_keras_object(lambda x: x)
    grown = keras.Sequential([keras.Input((2,))])
    grown.add(keras.layers.Dense(1))
    assert grown.built
