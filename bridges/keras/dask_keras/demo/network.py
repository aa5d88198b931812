"""The model, its training and its predictions, on the workers."""

from __future__ import annotations

from typing import Any

import keras
import pandas as pd
from dask.base import compute
from distributed import Client

import dask_keras
from dask_bridges.demo.flights import CATEGORICAL, LABEL, Flights
from dask_keras.demo.inputs import NUMBERS, Scaling, inputs

__all__ = ["EPOCHS", "build", "predict", "train"]

EPOCHS = 8
_PATIENCE = 2
_BATCH, _PREDICTED = 1024, 8192


def build(sizes: dict[str, int]) -> Any:
    """A compiled model.

    Parameters
    ----------
    sizes : dict of str to int
        How many categories each of the categorical columns has; their number 0 is for a missing one.
    """
    keras.utils.set_random_seed(0)
    categories = {name: keras.Input((), dtype="int32", name=name) for name in sizes}
    numbers = keras.Input((len(NUMBERS),), name="numbers")
    embedded = [
        keras.layers.Embedding(size + 1, _width(size), name=f"{name}_embedding")(categories[name])
        for name, size in sizes.items()
    ]
    hidden = keras.layers.Concatenate()([*embedded, numbers])
    for units in (128, 64):
        hidden = keras.layers.Dropout(0.2)(keras.layers.Dense(units, "relu")(hidden))
    late = keras.layers.Dense(1, "sigmoid", name=LABEL)(hidden)
    model = keras.Model({**categories, "numbers": numbers}, late, name="flights")
    model.compile(keras.optimizers.Adam(0.002), "binary_crossentropy", metrics=[keras.metrics.AUC(name="auc")])
    return model


def train(client: Client, flights: Flights, epochs: int | None) -> tuple[Any, Scaling, Any]:
    """A model trained on the workers, each on the partitions it holds, with its scaling and its history."""
    scaling = Scaling.of(flights.train)
    model = build({name: len(flights.train[name].cat.categories) for name in CATEGORICAL})
    history = dask_keras.fit(
        client,
        model,
        inputs(flights.train, scaling),
        flights.train[LABEL],
        batch_size=_BATCH,
        epochs=epochs or EPOCHS,
        validation_data=(inputs(flights.valid, scaling), flights.valid[LABEL]),
        callbacks=[keras.callbacks.EarlyStopping("val_auc", mode="max", patience=_PATIENCE, restore_best_weights=True)],
        seed=0,
    )
    return model, scaling, history


def predict(client: Client, model: Any, scaling: Scaling, flights: Flights) -> tuple[pd.Series, pd.Series]:
    """Labels and predicted probabilities of the test flights; their features stay on the workers."""
    predicted = dask_keras.predict(client, model, inputs(flights.test, scaling), batch_size=_PREDICTED)
    late, scores = compute(flights.test[LABEL], predicted)
    return late, scores[0] if scores.ndim == 2 else scores


def _width(size: int) -> int:
    """Numbers an embedding has for each of so many categories."""
    return max(2, min(8, size // 4))
