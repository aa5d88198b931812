"""What the tests of transfers send: module-level, so that workers find it by name; and what cannot move."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any


@dataclasses.dataclass
class Holder:
    """A model inside something else."""

    name: str
    model: Any


def build(units: int = 3, seed: int = 0) -> Any:
    """A small compiled model that has been trained a little."""
    import keras
    import numpy as np

    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(units, activation="relu"), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    model.fit(np.ones((8, 4), "float32"), np.ones((8, 1), "float32"), epochs=2, verbose=0)
    return model


def outputs(model: Any) -> Any:
    """Predictions, and the optimizer's step: whether a model is there with its state."""
    import numpy as np

    x = np.linspace(-1, 1, 20, dtype="float32").reshape(5, 4)
    return np.asarray(model(x)).tolist(), int(model.optimizer.iterations.numpy())


def held_outputs(holder: Holder) -> Any:
    """`outputs` of the model in a holder."""
    return outputs(holder.model)


def with_lock() -> Any:
    """A model that no pickle can send: a Lambda over a lock."""
    import keras

    lock = threading.Lock()

    def guarded(x: Any) -> Any:
        with lock:
            return x

    return keras.Sequential([keras.Input((4,)), keras.layers.Lambda(guarded), keras.layers.Dense(1)])
