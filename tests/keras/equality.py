"""Models of many kinds, trained on a cluster and in one process on the same batches: what differs.

As a script, it trains those that are named (by default all) and writes a line of JSON for each.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np

#: Rows of the partitions, one a rank.
LAYOUTS = {2: (44, 44), 3: (50, 31, 7)}
BATCH = 16


@dataclass(frozen=True)
class Case:
    """A model and what it is trained with.

    Attributes
    ----------
    build : callable
        Makes the compiled model.
    inputs : callable
        ``inputs(rng, rows)`` makes what it takes.
    classes : int
        Of the targets; 0 for a number, 1 for yes or no.
    fit : dict
        More for `fit`.
    weighted : bool
        Whether rows have weights.
    exact : bool
        Whether it equals one process.
    alone : callable, optional
        Makes the model for one process, where that is another one.
    """

    build: Callable[[], Any]
    inputs: Callable[[Any, int], Any]
    classes: int = 0
    fit: Any = None
    weighted: bool = False
    exact: bool = True
    alone: Callable[[], Any] | None = None


def numbers(*shape: int) -> Callable[[Any, int], Any]:
    return lambda rng, rows: rng.normal(size=(rows, *shape)).astype("float32")


def words(rng: Any, rows: int) -> Any:
    return rng.integers(0, 20, size=(rows, 6)).astype("int32")


def compiled(layers: Sequence[Any], optimizer: Any, loss: str, metrics: Sequence[str] = ()) -> Any:
    import keras

    model = keras.Sequential(layers)
    model.compile(optimizer, loss, metrics=list(metrics))
    return model


def dense(optimizer: Callable[[], Any] | str, **regularized: Any) -> Callable[[], Any]:
    def build() -> Any:
        import keras

        layers = [keras.Input((6,)), keras.layers.Dense(8, "tanh", **regularized), keras.layers.Dense(1)]
        return compiled(layers, optimizer if isinstance(optimizer, str) else optimizer(), "mse", ["mae"])

    return build


def of(name: str, **options: Any) -> Callable[[], Any]:
    def made() -> Any:
        import keras

        return getattr(keras.optimizers, name)(**options)

    return made


def schedule() -> Any:
    import keras

    return keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5))


def conv(batch_norm: bool, optimizer: str = "adam", **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        import keras

        return compiled(
            [
                keras.Input((8, 8, 1)),
                keras.layers.Conv2D(4, 3, activation="relu"),
                *([keras.layers.BatchNormalization(momentum=0.8, **options)] if batch_norm else []),
                keras.layers.GlobalAveragePooling2D(),
                keras.layers.Dense(3, "softmax"),
            ],
            optimizer,
            "sparse_categorical_crossentropy",
            ["accuracy"],
        )

    return build


def lstm() -> Any:
    import keras

    return compiled(
        [
            keras.Input((6,), dtype="int32"),
            keras.layers.Embedding(20, 5),
            keras.layers.LSTM(6),
            keras.layers.Dense(1, "sigmoid"),
        ],
        of("Adam", learning_rate=0.01)(),
        "binary_crossentropy",
        ["accuracy", "AUC"],
    )


def two_in_two_out() -> Any:
    import keras

    left, right = keras.Input((3,), name="left"), keras.Input((2,), name="right")
    both = keras.layers.Concatenate()([left, right])
    hidden = keras.layers.Dense(6, "relu")(both)
    model = keras.Model([left, right], [keras.layers.Dense(1, name="a")(hidden), keras.layers.Dense(1, name="b")(both)])
    model.compile("adam", ["mse", "mae"], loss_weights=[1.0, 0.5])
    return model


CASES: dict[str, Case] = {
    "dense, sgd": Case(dense(of("SGD", learning_rate=0.05)), numbers(6)),
    "dense, momentum": Case(dense(of("SGD", learning_rate=0.05, momentum=0.9, nesterov=True)), numbers(6)),
    "dense, adam, l2": Case(dense(of("Adam", learning_rate=0.01), kernel_regularizer="l2"), numbers(6)),
    "dense, adamw": Case(dense(of("AdamW", learning_rate=0.01, weight_decay=0.01)), numbers(6)),
    "dense, clipnorm": Case(dense(of("SGD", learning_rate=0.1, global_clipnorm=0.1)), numbers(6)),
    "dense, clipvalue, ema": Case(dense(of("Adam", clipvalue=0.05, use_ema=True, ema_momentum=0.9)), numbers(6)),
    "dense, accumulation": Case(dense(of("Adam", gradient_accumulation_steps=2)), numbers(6)),
    "dense, schedule": Case(dense(schedule), numbers(6)),
    "dense, sample weights": Case(dense(of("Adam", learning_rate=0.01)), numbers(6), weighted=True),
    "conv, class weights": Case(
        conv(False), numbers(8, 8, 1), classes=3, fit={"class_weight": {0: 1.0, 1: 2.0, 2: 0.5}}
    ),
    "embedding, lstm": Case(lstm, words, classes=1),
    "two inputs, two outputs": Case(
        two_in_two_out, lambda rng, rows: (numbers(3)(rng, rows), numbers(2)(rng, rows)), classes=-2
    ),
    "conv, batch normalization": Case(conv(True), numbers(8, 8, 1), classes=3, exact=False),
    "conv, synchronized batch normalization": Case(
        conv(True, "sgd", synchronized=True), numbers(8, 8, 1), classes=3, alone=conv(True, "sgd")
    ),
}


def targets(rng: Any, case: Case, rows: int) -> Any:
    if case.classes == -2:
        return tuple(rng.normal(size=rows).astype("float32") for _ in range(2))
    if case.classes:
        return rng.integers(0, max(2, case.classes), size=rows).astype("int32" if case.classes > 1 else "float32")
    return rng.normal(size=rows).astype("float32")


def order(layout: Sequence[int], batch: int) -> Any:
    """The rows of all ranks, batch after batch."""
    from dask_keras.shares import Shares

    shares, starts = Shares(tuple(layout), batch), np.cumsum([0, *layout])
    taken = [shares.before(step)[1] for step in range(shares.steps)] + [tuple(layout)]
    return np.concatenate(
        [
            np.arange(starts[rank] + before[rank], starts[rank] + after[rank])
            for before, after in itertools.pairwise(taken)
            for rank in range(len(layout))
        ]
    )


def mapped(function: Callable[[Any], Any], given: Any) -> Any:
    return tuple(map(function, given)) if isinstance(given, tuple) else function(given)


def distributed(array: Any, layout: Sequence[int]) -> Any:
    return da.from_array(array, chunks=(tuple(layout), *array.shape[1:]))


def weights_of(model: Any) -> list[Any]:
    import keras

    return [keras.ops.convert_to_numpy(v.value) for v in (*model.trainable_variables, *model.optimizer.variables)]


def compare(client: Any, name: str, layout: Sequence[int], epochs: int = 2) -> dict[str, float]:
    """Train a model in both ways; how far weights and histories are apart."""
    import keras

    import dask_keras

    case, rows = CASES[name], sum(layout)
    rng = np.random.default_rng(5)
    X, y = case.inputs(rng, rows), targets(rng, case, rows)
    weight = rng.random(rows).astype("float32") if case.weighted else None
    keras.utils.set_random_seed(3)
    alone, together = (case.alone or case.build)(), case.build()
    together.set_weights(alone.get_weights())
    validation = slice(0, 30)
    at = order(layout, BATCH)
    told = {"epochs": epochs, "batch_size": BATCH, "shuffle": False, **(case.fit or {})}
    plain = alone.fit(
        mapped(lambda a: a[at], X), mapped(lambda a: a[at], y), verbose=0,
        sample_weight=None if weight is None else weight[at],
        validation_data=(mapped(lambda a: a[validation], X), mapped(lambda a: a[validation], y)), **told,
    )  # fmt: skip
    ours = dask_keras.fit(
        client, together, mapped(lambda a: distributed(a, layout), X), mapped(lambda a: distributed(a, layout), y),
        sample_weight=None if weight is None else distributed(weight, layout), workers=len(layout),
        validation_data=(
            mapped(lambda a: distributed(a[validation], (10, 20)), X),
            mapped(lambda a: distributed(a[validation], (10, 20)), y),
        ), **told,
    )  # fmt: skip
    apart = [float(np.max(np.abs(a - b))) for a, b in zip(weights_of(alone), weights_of(together)) if a.size]
    assert ours.history.keys() == plain.history.keys(), (ours.history.keys(), plain.history.keys())
    # On TensorFlow Keras takes the mean of an output's loss over batches, not over rows, however many they have.
    batchwise = {"a_loss", "b_loss", "val_a_loss", "val_b_loss"} if keras.backend.backend() == "tensorflow" else set()
    metrics = [
        float(np.max(np.abs(np.subtract(plain.history[key], ours.history[key]))))
        for key in plain.history.keys() - batchwise
    ]
    return {"weights": max(apart), "metrics": max(metrics)}


def main() -> None:
    from distributed import Client, LocalCluster

    names = sys.argv[1:] or list(CASES)
    with LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster) as client:
        for name in names:
            for layout in LAYOUTS.values():
                found = compare(client, name, layout)
                print(json.dumps({"case": name, "ranks": len(layout), **found}), flush=True)


if __name__ == "__main__":
    main()
